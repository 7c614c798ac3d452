"""The codec: every bit pattern back, close to the entropy limit, and no harm from forged chunks."""

from contextlib import suppress
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gsae.store import CorruptError, kernels, planes
from gsae.store.planes import Planes


def decoded(chunk: bytes, shape: tuple[int, int]) -> NDArray[np.uint16]:
    out = np.empty(shape, np.uint16)
    planes.decode_into(chunk, out, np.arange(shape[0]))
    return out


def activations(rows: int, channels: int) -> NDArray[np.uint16]:
    rng = np.random.default_rng(0)
    scale = np.exp(2 * rng.standard_normal(channels))
    return (rng.standard_normal((rows, channels)) * scale).astype(ml_dtypes.bfloat16).view(np.uint16)


def awkward(kind: str) -> NDArray[np.uint16]:
    x = activations(700, 300)
    match kind:
        case "outlier channel":
            x[:, 5] = (1e30 * np.arange(1, 701)).astype(ml_dtypes.bfloat16).view(np.uint16)
        case "zero channels":
            x[:, ::3] = 0
        case "constant rows":
            x[::2] = 0x3F80
        case "not numbers":
            x[::7, ::3], x[3, :] = 0x7FC1, 0xFF80
        case "odd width":
            x = np.ascontiguousarray(x[:, :299])
        case "one row":
            x = x[:1].copy()
        case "one channel":
            x = np.ascontiguousarray(x[:, :1])
        case "no rows":
            x = x[:0].copy()
        case "random bits":
            x = np.random.default_rng(1).integers(0, 1 << 16, x.shape).astype(np.uint16)
    return x


@pytest.mark.parametrize("level", [0, 1])
def test_all_bit_patterns_come_back_in_any_order(level: int) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    for x in (every.reshape(256, 256), np.random.default_rng(0).permutation(every).reshape(64, 1024)):
        assert np.array_equal(decoded(planes.encode(x, level), x.shape), x)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize(
    "kind",
    [
        "ordinary",
        "outlier channel",
        "zero channels",
        "constant rows",
        "not numbers",
        "odd width",
        "one row",
        "one channel",
        "no rows",
        "random bits",
    ],
)
def test_awkward_rows_come_back_bit_for_bit(kind: str, level: int) -> None:
    x = awkward(kind)
    chunk = planes.encode(x, level)
    assert np.array_equal(decoded(chunk, x.shape), x)
    assert len(chunk) <= x.nbytes * 1.02 + 1000  # never much larger than raw


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 70), st.integers(0, 2**32 - 1), st.sampled_from([0, 1]))
def test_any_shape_and_content_round_trips(rows: int, channels: int, seed: int, level: int) -> None:
    rng = np.random.default_rng(seed)
    x = (rng.standard_normal((rows, channels)) * 10.0 ** rng.integers(-30, 30)).astype(ml_dtypes.bfloat16)
    bits = x.view(np.uint16)
    bits[rng.random(bits.shape) < rng.random() ** 3] = rng.integers(0, 1 << 16)
    assert np.array_equal(decoded(planes.encode(bits, level), bits.shape), bits)


def test_activations_take_two_thirds_of_raw_and_three_quarters_without_zstd() -> None:
    x = activations(2048, 576)
    assert len(planes.encode(x, 1)) < 0.68 * x.nbytes
    assert len(planes.encode(x, 0)) < 0.76 * x.nbytes


def test_rows_are_scattered_to_their_places_and_touch_nothing_else() -> None:
    x = activations(600, 50)
    places = np.random.default_rng(2).permutation(1000)[:600]
    out = np.full((1000, 50), 0xABCD, np.uint16)
    planes.decode_into(planes.encode(x, 1), out, places)
    assert np.array_equal(out[places], x)
    assert (np.delete(out, places, axis=0) == 0xABCD).all()


@pytest.mark.parametrize("level", [0, 1])
def test_a_damaged_chunk_is_an_error_or_harmless_but_never_a_crash(level: int) -> None:
    x = activations(900, 100)
    chunk = bytearray(planes.encode(x, level))
    rng = np.random.default_rng(3)
    for at in np.r_[0 : 200 + 100, rng.integers(0, len(chunk), 300)]:
        forged = chunk.copy()
        forged[at] ^= 1 << int(rng.integers(8))
        with suppress(CorruptError):
            assert decoded(bytes(forged), x.shape).shape == x.shape


@pytest.mark.parametrize("cut", [0, 5, 23, 24, 200, 5000, -1])
def test_a_chunk_cut_short_is_named_corrupt(cut: int) -> None:
    x = activations(100, 100)
    with pytest.raises(CorruptError, match="planes chunk"):
        decoded(planes.encode(x, 1)[:cut], x.shape)


def test_a_chunk_of_another_shape_is_refused_before_anything_is_decoded() -> None:
    chunk = planes.encode(activations(100, 64), 1)
    with pytest.raises(CorruptError, match="100 x 64 values; 200 x 64 are due"):
        decoded(chunk, (200, 64))


def test_the_numcodecs_codec_round_trips_and_refuses_a_forged_row_count() -> None:
    import numcodecs

    x = activations(64, 48)
    codec = numcodecs.get_codec(Planes(channels=48).get_config())
    chunk = codec.encode(x)
    assert np.array_equal(codec.decode(chunk).view(np.uint16).reshape(x.shape), x)
    out = np.empty_like(x)
    codec.decode(chunk, out)
    assert np.array_equal(out, x)
    bomb = bytearray(chunk)
    bomb[8:12] = (2**32 - 1).to_bytes(4, "little")
    with pytest.raises(CorruptError, match="cannot hold"):
        codec.decode(bytes(bomb))


def both(kernel: Any, arguments: Any) -> tuple[Any, Any]:
    """Run a kernel and its plain version on copies of the same arguments; return both argument lists."""
    ours, plain = ([a.copy() if isinstance(a, np.ndarray) else a for a in arguments] for _ in range(2))
    assert kernel(*ours) == kernel.plain(*plain)
    return ours, plain


@pytest.mark.parametrize("channels", [1, 7, 64, 129])
def test_kernels_equal_their_plain_versions(channels: int) -> None:
    x = activations(37, channels)
    x[::5, ::3] = 0x7F80
    base = np.full(channels, 120, np.uint8)
    half = (channels + 1) // 2
    low, nibbles = np.empty((37, channels), np.uint8), np.empty((37, half), np.uint8)
    at, exponents = np.zeros(5000, np.uint32), np.zeros(5000, np.uint8)
    wide = np.random.default_rng(0).standard_normal((37, channels)).astype(np.float32)
    places = np.random.default_rng(1).permutation(37)
    bins = np.random.default_rng(2).integers(-1, 4, 37)
    out = np.zeros((37, channels), np.uint16)
    calls = {
        kernels.channel_medians: (x, np.empty(channels, np.uint8)),
        kernels.delta_counts: (x, base, np.empty(256, np.int64)),
        kernels.pack: (x, base, 11, low, nibbles, at, exponents, 3),
        kernels.unpack: (low, nibbles, base, out, places),
        kernels.join_bytes: (low, low[::-1].copy(), out, places),
        kernels.split_bytes: (x, low, low.copy()),
        kernels.scatter: (x, out, places),
        kernels.squared_norms: (wide, np.empty(37)),
        kernels.binned_sums: (wide, bins, np.zeros((4, channels)), np.zeros((4, channels))),
    }
    packed, _ = both(kernels.pack, calls[kernels.pack])
    for kernel, arguments in calls.items():
        if kernel is kernels.unpack:
            arguments = (packed[3], packed[4], base, out, places)
        ours, plain = both(kernel, arguments)
        for a, b in zip(ours, plain, strict=True):
            assert np.array_equal(a, b), kernel
