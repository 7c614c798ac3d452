"""Up to which share of open gates the sparse step costs less than the dense one, for each kind of GPU and precision.

Measured by `bench/gpu.py --part C`, which prints a line for this table. On a GPU that is not in it every step is dense:
a guess could make training slower, and never makes it wrong. CPUs have their shares in `latent_vectors`.
"""

# (what the name of the GPU contains, precision): share of open gates. Measured so far: none.
MEASURED: dict[tuple[str, str], float] = {}


# What the names of GPUs contain on which the encoder product is faster with the mask as its epilogue. So far: none.
FUSED_ENCODER: tuple[str, ...] = ()


def sparse_share_of(gpu: str, precision: str) -> float:
    """The share for a GPU of this name; 0 where nobody measured it."""
    return next((share for (name, of), share in MEASURED.items() if name in gpu and of == precision), 0.0)


def fuses_encoder(gpu: str) -> bool:
    """Whether the sparse step of a GPU of this name takes the fused encoder product. The same gates are open."""
    return any(name in gpu for name in FUSED_ENCODER)
