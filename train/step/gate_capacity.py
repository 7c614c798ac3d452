"""How much room a GPU's sparse step makes for its lists, which `run/memory` counts before a run: they do not grow."""

SEGMENT = 256  # entries of a latent from which on its gradients are added up in segments


def candidates(d_in: int) -> int:
    """How many gates a list has room for, for each that may be open: 1.3 to 3 are expected up to 5,120, 6 at 8,192."""
    return 4 if d_in <= 5120 else 8


def most_segments(entries: int, size: int = SEGMENT) -> int:
    """The largest number of segments of all latents that have over `size` entries, of so many together."""
    return 2 * (entries // size) + 1
