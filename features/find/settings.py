"""How much `gsae features` keeps of a latent. The values are part of features.json.

The options of the command are made from it, so it imports nothing heavy.
"""

from gsae.settings import Settings, setting

EXAMPLES = "Examples"


class FeatureSettings(Settings):
    """How many examples, bins, neighbours and tokens are kept of each latent."""

    top: int = setting(
        20, "Contexts with the largest features to keep of each latent.", panel=EXAMPLES, metavar="CONTEXTS", ge=0
    )
    quantiles: int = setting(
        5, "Quantiles of a latent's features to sample from.", panel=EXAMPLES, metavar="QUANTILES", ge=1, le=128
    )
    samples: int = setting(5, "Samples of each quantile.", panel=EXAMPLES, metavar="SAMPLES", ge=0)
    bins: int = setting(50, "Bins of the histogram of a latent's features.", ge=1)
    neighbours: int = setting(8, "Latents with the most similar decoder rows to name.", ge=0)
    logits: int = setting(10, "Tokens to name that a latent promotes most, and that it suppresses most.", ge=0)
