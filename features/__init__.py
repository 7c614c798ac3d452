"""What the latents of an SAE fire on: found and described, shown in a browser, exported to other projects.

`find_features` describes every latent, `build_browser` and `build_blind` show them, and `export_sae` writes them, or
the SAE, in a format of `EXPORTS`. The language model is passed in as a `Vocabulary`, so nothing here imports one.
"""

from .browse.blind import BlindSettings, build_blind
from .browse.blind_result import compare_ratings, ratings_of
from .browse.serving import serve
from .browse.site import build_browser
from .export.delphi import to_delphi
from .export.dictionary_learning import to_dictionary_learning
from .export.neuronpedia import to_neuronpedia
from .export.registry import EXPORTS, export_sae
from .export.source import ExportSource
from .find.features_json import FeatureFacts, read_facts
from .find.find_features import check_features, find_features
from .find.settings import FeatureSettings
from .find.vocabulary import LogitEffects, Vocabulary

__all__ = [
    "EXPORTS",
    "BlindSettings",
    "ExportSource",
    "FeatureFacts",
    "FeatureSettings",
    "LogitEffects",
    "Vocabulary",
    "build_blind",
    "build_browser",
    "check_features",
    "compare_ratings",
    "export_sae",
    "find_features",
    "ratings_of",
    "read_facts",
    "serve",
    "to_delphi",
    "to_dictionary_learning",
    "to_neuronpedia",
]
