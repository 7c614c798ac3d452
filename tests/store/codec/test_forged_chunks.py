"""Forged chunks: one clear error, or other values; never a crash, a write outside the rows, or a large buffer."""

import struct
import tracemalloc
from contextlib import suppress

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from gsae.errors import CorruptError
from gsae.store.codec import planes
from gsae.store.codec import zstd_frames as frames
from gsae.store.codec.planes import HEADER, Planes

ROWS, CHANNELS, GUARD = 300, 96, 50
SIZES = st.sampled_from([0, 1, 2, 299, 300, 301, 2**16, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)


def chunk(level: int) -> bytes:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((ROWS, CHANNELS)).astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    x[rng.random(x.shape) < 0.005] = 0  # exceptions
    return planes.encode(x, level)


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    """Decode once in each form, so that what is traced below is decoding and not numba's compiler."""
    out = np.empty((ROWS, CHANNELS), np.uint16)
    noise = np.random.default_rng(0).integers(0, 1 << 16, out.shape).astype(np.uint16)
    for encoded in (chunk(0), chunk(1), planes.encode(noise, 0), planes.encode(noise, 1)):
        planes.decode_into(encoded, out, np.arange(ROWS))


def assert_decoding_stays_inside(forged: bytes) -> None:
    """Decode into the middle rows of an array; whatever the outcome, the rows around them stay as they were."""
    around = np.full((ROWS + 2 * GUARD, CHANNELS), 0xABCD, np.uint16)
    places = np.random.default_rng(1).permutation(ROWS)
    tracemalloc.start()
    try:
        with suppress(CorruptError):
            planes.decode_into(forged, around[GUARD:-GUARD], places)
        assert tracemalloc.get_traced_memory()[1] < 4 * ROWS * CHANNELS + 2 * len(forged) + 50_000
    finally:
        tracemalloc.stop()
    assert (around[:GUARD] == 0xABCD).all()
    assert (around[-GUARD:] == 0xABCD).all()


def test_the_chunk_that_is_forged_below_has_every_part() -> None:
    _, form, _, _, _, _, _, exceptions = HEADER.unpack(chunk(1)[: HEADER.size])
    assert form == planes.NIBBLES
    assert exceptions > 50


@settings(deadline=None, max_examples=150)
@given(
    level=st.sampled_from([0, 1]),
    form=st.integers(0, 2),
    packing=st.integers(0, 2),
    rows=SIZES,
    channels=SIZES,
    block_rows=SIZES,
    exceptions=SIZES,
    keep=st.integers(0, 15),
)
def test_a_forged_header_is_an_error_or_harmless(
    level: int, form: int, packing: int, rows: int, channels: int, block_rows: int, exceptions: int, keep: int
) -> None:
    original = chunk(level)
    forged = list(HEADER.unpack(original[: HEADER.size]))
    for field, value in {1: form, 2: packing, 4: rows, 5: channels, 6: block_rows, 7: exceptions}.items():
        if field < 3 or not keep >> (field - 4) & 1:
            forged[field] = value
    assert_decoding_stays_inside(HEADER.pack(*forged) + original[HEADER.size :])


@settings(deadline=None, max_examples=150)
@given(st.sampled_from([0, 1]), st.integers(HEADER.size, 3000), st.binary(min_size=1, max_size=40))
def test_forged_tables_positions_and_blocks_are_errors_or_harmless(level: int, at: int, values: bytes) -> None:
    forged = bytearray(chunk(level))
    forged[at : at + len(values)] = values
    assert_decoding_stays_inside(bytes(forged))


@pytest.mark.parametrize("level", [0, 1])
def test_any_single_bit_changed_is_an_error_or_harmless(level: int) -> None:
    original = chunk(level)
    rng = np.random.default_rng(3)
    for at in np.r_[0:400, rng.integers(0, len(original), 200)]:
        forged = bytearray(original)
        forged[at] ^= 1 << int(rng.integers(8))
        assert_decoding_stays_inside(bytes(forged))


@pytest.mark.parametrize("level", [0, 1])
def test_blocks_that_are_not_packed_as_the_header_says_are_named(level: int) -> None:
    forged = bytearray(chunk(level))
    forged[5] ^= 1
    with pytest.raises(CorruptError, match=r"block 0 of a planes chunk|zstd frame"):
        planes.decode_into(bytes(forged), np.zeros((ROWS, CHANNELS), np.uint16), np.arange(ROWS))


@pytest.mark.parametrize("first", [0, ROWS * CHANNELS, 2**32 - 1])
def test_an_exception_outside_its_block_is_named(first: int) -> None:
    forged = bytearray(chunk(0))
    at = HEADER.size + CHANNELS + 4 + 8 + 4 * 20  # the 21st exception of the only block
    forged[at : at + 4] = struct.pack("<I", first)
    with pytest.raises(CorruptError, match="exception of block 0"):
        planes.decode_into(bytes(forged), np.zeros((ROWS, CHANNELS), np.uint16), np.arange(ROWS))


@pytest.mark.parametrize("cut", [0, 5, 23, 24, 200, 5000, -1])
def test_a_chunk_cut_short_is_named_corrupt(cut: int) -> None:
    with pytest.raises(CorruptError, match="planes chunk"):
        planes.decode_into(chunk(1)[:cut], np.zeros((ROWS, CHANNELS), np.uint16), np.arange(ROWS))


def test_a_chunk_of_another_shape_is_refused_before_anything_is_decoded() -> None:
    with pytest.raises(CorruptError, match="300 x 96 values; 200 x 96 are needed"):
        planes.decode_into(chunk(1), np.zeros((200, 96), np.uint16), np.arange(200))


def test_the_numcodecs_codec_refuses_a_forged_row_count() -> None:
    bomb = bytearray(chunk(1))
    bomb[8:12] = (2**32 - 1).to_bytes(4, "little")
    with pytest.raises(CorruptError, match="cannot hold"):
        Planes(channels=CHANNELS).decode(bytes(bomb))


def zstd_frame(declared: int | None, runs: list[tuple[int, int]]) -> NDArray[np.uint8]:
    """Write a zstd frame by hand: blocks of (value, length) runs, declaring a size or none."""
    head = b"\xc0" + b"\x58" + struct.pack("<Q", declared) if declared is not None else b"\x00" + b"\x58"
    last = [i == len(runs) - 1 for i in range(len(runs))]
    blocks = [
        (length << 3 | 1 << 1 | end).to_bytes(3, "little") + bytes([value])
        for (value, length), end in zip(runs, last, strict=True)
    ]
    return np.frombuffer(zstandard.FRAME_HEADER + head + b"".join(blocks), np.uint8)


def test_a_frame_written_by_hand_is_read() -> None:
    out = np.zeros(1000, np.uint8)
    frames.decompress_into(zstd_frame(1000, [(7, 400), (8, 600)]), out)
    assert out.tolist() == [7] * 400 + [8] * 600


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (zstd_frame(2**60, [(7, 1000)]), "declares 1152921504606846976 bytes; 1000 bytes are needed"),
        (zstd_frame(400, [(7, 400)]), "declares 400 bytes"),
        (zstd_frame(None, [(7, 1 << 17)] * 5000), "does not declare its size"),
        (zstd_frame(1000, [(7, 1 << 17)] * 5000), "does not decompress to 1000"),
        (zstd_frame(1000, [(7, 400)]), "does not decompress to 1000"),
        (np.concatenate([zstd_frame(1000, [(7, 400)]), zstd_frame(600, [(8, 600)])]), "does not decompress"),
        (np.frombuffer(frames.compress(bytes(1000), 1) + b"x", np.uint8), "does not decompress"),
        (np.frombuffer(frames.compress(bytes(1000), 1)[:-1], np.uint8), "does not decompress"),
        (np.frombuffer(b"PK\x03\x04" + bytes(100), np.uint8), "does not declare its size"),
        (np.frombuffer(zstandard.FRAME_HEADER, np.uint8), "does not declare its size"),
        (np.empty(0, np.uint8), "does not declare its size"),
    ],
)
def test_a_frame_that_does_not_hold_what_is_due_is_refused(frame: NDArray[np.uint8], why: str) -> None:
    with pytest.raises(CorruptError, match=why):
        frames.decompress_into(frame, np.zeros(1000, np.uint8))


@pytest.mark.parametrize("size", [1, 255, 256, 257, 65791, 65792, 1 << 20])
def test_the_declared_size_is_read_in_all_its_widths(size: int) -> None:
    assert frames.content_size(np.frombuffer(frames.compress(bytes(size), 1), np.uint8)) == size
