"""What the latents of an SAE fire on: found and described, shown in a browser, passed on to other projects.

`find_features` describes every latent, `build_browser` and `build_blind` show them, `to_dictionary_learning`,
`to_delphi` and `to_neuronpedia` pass them on. The language model comes in as a callable, so nothing here imports one.
"""

from .browse.blind import build_blind, compare_ratings, ratings_of
from .browse.serving import serve
from .browse.site import build_browser
from .export.delphi import to_delphi
from .export.dictionary_learning import to_dictionary_learning
from .export.neuronpedia import to_neuronpedia
from .find.find_features import Words, find_features
from .find.portrait import Kept

__all__ = [
    "Kept",
    "Words",
    "build_blind",
    "build_browser",
    "compare_ratings",
    "find_features",
    "ratings_of",
    "serve",
    "to_delphi",
    "to_dictionary_learning",
    "to_neuronpedia",
]
