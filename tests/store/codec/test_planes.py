"""The codec: every bit pattern is restored, sizes are close to the entropy limit, kernels equal their plain twins."""

import threading
import time
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gsae.errors import CorruptError
from gsae.store.codec import planes
from gsae.store.codec import planes_kernels as kernels
from gsae.store.codec.planes import Planes
from gsae.store.codec.scatter import STREAM_BYTES, empty_rows, scatter, scatter_plain, streamable


def decoded(chunk: bytes, shape: tuple[int, int]) -> NDArray[np.uint16]:
    out = np.empty(shape, np.uint16)
    planes.decode_into(chunk, out, np.arange(shape[0]))
    return out


def activations(rows: int, channels: int) -> NDArray[np.uint16]:
    rng = np.random.default_rng(0)
    scale = np.exp(2 * rng.standard_normal(channels))
    return (rng.standard_normal((rows, channels)) * scale).astype(ml_dtypes.bfloat16).view(np.uint16)


KINDS = [
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
    "mostly zeros",
    "zeros here and there",
]


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
        case "mostly zeros":
            x[np.random.default_rng(1).random(x.shape) < 0.9] = 0
        case "zeros here and there":
            x[np.random.default_rng(1).random(x.shape) < 0.01] = 0x8000
        case "random bits":
            x = np.random.default_rng(1).integers(0, 1 << 16, x.shape).astype(np.uint16)
    return x


@pytest.mark.parametrize("level", [0, 1])
def test_all_bit_patterns_come_back_in_any_order(level: int) -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    for x in (every.reshape(256, 256), np.random.default_rng(0).permutation(every).reshape(64, 1024)):
        assert np.array_equal(decoded(planes.encode(x, level), x.shape), x)


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
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


def entropy_limit(x: NDArray[np.uint16]) -> float:
    """Bytes of x if exponents minus the median of their channel are coded by one ideal table, and the rest is raw."""
    e = (x >> 7).astype(np.uint8)
    counts = np.bincount((e - np.sort(e, axis=0)[len(e) // 2]).ravel())
    counts = counts[counts > 0]
    return float(x.size - np.sum(counts * np.log2(counts / x.size)) / 8)


@pytest.mark.parametrize(("rows", "channels"), [(4096, 256), (2048, 577), (256, 8192)])
def test_channels_of_any_scale_come_within_a_hundredth_of_the_entropy_limit(rows: int, channels: int) -> None:
    x = activations(rows, channels)
    x[:, 7] = 0
    x[:, 9] = (1e30 * np.random.default_rng(1).standard_normal(rows)).astype(ml_dtypes.bfloat16).view(np.uint16)
    assert len(planes.encode(x, 1)) < 1.01 * entropy_limit(x)
    assert len(planes.encode(x, 0)) < 0.756 * x.nbytes


@pytest.mark.parametrize("octaves", [0.0, 0.2, 0.4, 0.6, 0.8])
def test_equal_channels_share_a_base_wherever_between_two_steps_their_mean_falls(octaves: float) -> None:
    normal = np.random.default_rng(0).standard_normal((2048, 64))
    x = (normal * 2.0**octaves).astype(ml_dtypes.bfloat16).view(np.uint16)
    one_table = entropy_limit(x.reshape(-1, 1))
    assert len(planes.encode(x, 1)) < 1.008 * one_table
    louder = (normal * 2.0 ** (octaves + np.arange(64) % 3)).astype(ml_dtypes.bfloat16).view(np.uint16)
    assert len(planes.encode(louder, 1)) < 1.008 * one_table


def test_rows_are_scattered_to_their_places_and_touch_nothing_else() -> None:
    x = activations(600, 50)
    places = np.random.default_rng(2).permutation(1000)[:600]
    out = np.full((1000, 50), 0xABCD, np.uint16)
    planes.decode_into(planes.encode(x, 1), out, places)
    assert np.array_equal(out[places], x)
    assert (np.delete(out, places, axis=0) == 0xABCD).all()


def test_places_that_are_not_in_the_array_are_refused() -> None:
    x = activations(4, 32)
    chunk, out = planes.encode(x, 0), np.zeros((5, 64), np.uint16)
    for places in ([0, 1, 2, 5], [-1, 0, 1, 2]):
        with pytest.raises(ValueError, match="places"):
            planes.decode_into(chunk, np.zeros((5, 32), np.uint16), np.array(places))
    with pytest.raises(ValueError, match="C-contiguous"):
        planes.decode_into(chunk, out[:, ::2], np.arange(4))


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


def assert_one_result(kernel: Any, oracle: Any, arguments: Any) -> list[Any]:
    """Run a kernel and its plain twin on copies of the same arguments; return the filled arguments of the kernel."""
    ours, plain = ([a.copy() if isinstance(a, np.ndarray) else a for a in arguments] for _ in range(2))
    assert kernel(*ours) == oracle(*plain)
    for a, b in zip(ours, plain, strict=True):
        assert np.array_equal(a, b), kernel
    return ours


@pytest.mark.parametrize("channels", [1, 7, 64, 129])
def test_kernels_equal_their_plain_versions(channels: int) -> None:
    x = activations(37, channels)
    x[::5, ::3] = 0x7F80
    rng = np.random.default_rng(1)
    e = (x >> 7).astype(np.uint8)
    base = np.full(channels, 120, np.uint8)
    half = (channels + 1) // 2
    low, nibbles = np.empty((37, channels), np.uint8), np.empty((37, half), np.uint8)
    at, exponents = np.zeros(5000, np.uint32), np.zeros(5000, np.uint8)
    places, out = rng.permutation(37), np.zeros((37, channels), np.uint16)
    eighths = rng.integers(0, 8, channels).astype(np.uint8)
    packed = (x, base, low, nibbles, at, exponents)
    _, _, low, nibbles, at, exponents = assert_one_result(kernels.pack, kernels.pack_plain, packed)
    n = kernels.pack(*packed)
    assert n > 0
    for kernel, oracle, arguments in (
        (kernels.channel_medians, kernels.channel_medians_plain, (e, np.empty(channels, np.uint8))),
        (kernels.deviation_sums, kernels.deviation_sums_plain, (e, base, 2, np.empty(channels, np.int32))),
        (kernels.deviation_counts, kernels.deviation_counts_plain, (e, base, eighths, np.empty((8, 256), np.int64))),
        (kernels.unpack, kernels.unpack_plain, (low, nibbles, base, at[:n], exponents[:n], 0, out, places)),
        (kernels.join_bytes, kernels.join_bytes_plain, (low, low[::-1].copy(), out, places)),
        (kernels.split_bytes, kernels.split_bytes_plain, (x, low, low.copy())),
        (scatter, scatter_plain, (x, out, places)),
    ):
        assert_one_result(kernel, oracle, arguments)


@pytest.mark.parametrize("at", [[3, 700], [3, 640], [8 * 64 - 1, 5], [2**32 - 1], []])
def test_exceptions_outside_their_block_or_out_of_order_are_left_out_and_counted(at: list[int]) -> None:
    low = np.zeros((10, 64), np.uint8)
    arguments = (low, low[:, :32].copy(), low[0], np.array(at, np.uint32), np.full(len(at), 9, np.uint8), 0)
    arguments += (np.zeros((10, 64), np.uint16), np.arange(10))
    ours = assert_one_result(kernels.unpack, kernels.unpack_plain, arguments)
    assert kernels.unpack(*ours) == sum(i < 640 for i in at) - (at == [8 * 64 - 1, 5])


@pytest.mark.parametrize("level", [0, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_the_plain_kernels_write_the_same_bytes(kind: str, level: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = awkward(kind)
    ours = planes.encode(x, level)
    for name in (
        "channel_medians",
        "deviation_sums",
        "deviation_counts",
        "pack",
        "unpack",
        "split_bytes",
        "join_bytes",
    ):
        monkeypatch.setattr(kernels, name, getattr(kernels, f"{name}_plain"))
    assert planes.encode(x, level) == ours
    assert np.array_equal(decoded(ours, x.shape), x)


@pytest.mark.parametrize("width", [320, 4096, 31])
def test_rows_streamed_past_the_caches_are_the_same_rows(width: int) -> None:
    rows = 1 + STREAM_BYTES // (2 * width)
    out = empty_rows(rows, width, np.uint16)
    assert streamable(out) == (width % 32 == 0)
    x = activations(600, width)
    places = np.random.default_rng(2).permutation(rows)[:600]
    for write in (
        lambda: planes.decode_into(planes.encode(x, 1), out, places),
        lambda: scatter(x, out, places),
    ):
        out[:] = 0xABCD
        write()
        assert np.array_equal(out[places], x)
        assert (np.delete(out, places, axis=0) == 0xABCD).all()


def test_rows_that_are_not_contiguous_are_scattered_without_streaming() -> None:
    every = activations(40, 640)
    large = empty_rows(1 + STREAM_BYTES // 640, 320, np.uint16)
    for rows, out in ((every[:, ::2], large), (every[:, :320].copy(), large.repeat(2, axis=1)[:, ::2])):
        scatter(rows, out, np.arange(0, 80, 2))
        assert np.array_equal(out[:80:2], rows)


@pytest.mark.slow
def test_the_parts_of_a_chunk_are_copied_without_pythons_lock() -> None:
    """Another thread runs meanwhile, as the one that launches the passes of a model does; a large chunk takes long."""
    low, nibbles = np.ones((1 << 14, 8192), np.uint8), np.ones((1 << 14, 4096), np.uint8)
    nothing = np.empty(0, np.uint32)
    ran, ended = list[float](), threading.Event()

    def launch() -> None:
        while not ended.is_set():
            ran.append(time.perf_counter())
            time.sleep(0.0002)

    thread = threading.Thread(target=launch)
    thread.start()
    began = time.perf_counter()
    planes._assemble(planes.NIBBLES, 0, low, nibbles, np.ones(8192, np.uint8), nothing, np.empty(0, np.uint8))
    took = time.perf_counter() - began
    ended.set()
    thread.join()
    assert max(np.diff(ran)) < took / 2
