"""What `gsae.features` exports: one list for its users and for the type checkers.

`__init__` imports this file when a name is first used, because it imports torch. To export a name, add it here.
A name must not equal that of a file of the room: Python would then give the module.
"""

from .browse.blind import build_blind
from .browse.blind_result import compare_ratings, ratings_of
from .browse.serving import serve
from .browse.settings import BlindSettings
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
