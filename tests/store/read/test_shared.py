"""Consumers that share one decode: each gets the whole stream, none runs away, and any may leave."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from gsae.errors import CorruptError, UsageError
from gsae.store import SharedBatches, Store
from gsae.store.places.shard import Shard
from gsae.tests.support.stores import make_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(
        tmp_path_factory.mktemp("shared") / "store", contexts=150, window_rows=512, chunk_rows=32, sites={"mlp.1": 16}
    )


def drain(batches: SharedBatches, pause: float = 0) -> list[torch.Tensor]:
    found = []
    for rows in batches:
        found.append(rows.clone())
        time.sleep(pause)
    return found


def all_of(consumers: tuple[SharedBatches, ...], **options: Any) -> list[list[torch.Tensor]]:
    with ThreadPoolExecutor(len(consumers)) as pool:
        return list(pool.map(lambda c: drain(c, **options), consumers))


@pytest.mark.parametrize(("consumers", "lead"), [(1, 1), (3, 1), (8, 4)])
def test_each_consumer_gets_what_one_alone_gets_and_chunks_are_decoded_once(
    store: Store, monkeypatch: pytest.MonkeyPatch, consumers: int, lead: int
) -> None:
    site = store.site("mlp.1")
    expected = [rows.clone() for rows in site.batches(64, mix=3, epochs=2, max_norm_multiple=1.3)]
    decoded: list[tuple[Path, int]] = []
    plain = Shard.decode_into

    def counted(self: Shard, chunk: int, *rest: Any) -> None:
        decoded.append((self.path, chunk))
        plain(self, chunk, *rest)

    monkeypatch.setattr(Shard, "decode_into", counted)
    for found in all_of(site.shared_batches(consumers, 64, lead=lead, mix=3, epochs=2, max_norm_multiple=1.3)):
        assert len(found) == len(expected)
        assert all(map(torch.equal, found, expected))
    assert len(decoded) == 2 * len(set(decoded))


def test_the_fastest_waits_for_the_slowest(store: Store) -> None:
    fast, slow = store.site("mlp.1").shared_batches(2, 64, lead=3)
    taken = []
    thread = threading.Thread(target=lambda: taken.extend(0 for _ in fast))
    thread.start()
    time.sleep(0.3)
    assert len(taken) == 3
    next(slow)
    time.sleep(0.3)
    assert len(taken) == 4
    slow.close()  # and goes on when it leaves
    thread.join(20)
    assert len(taken) == -(-store.site("mlp.1").rows // 64)
    assert fast.wait_seconds > 0.3


def test_each_consumer_has_a_position_to_go_on_from(store: Store) -> None:
    site = store.site("mlp.1")
    whole = [rows.clone() for rows in site.batches(64)]
    a, b = site.shared_batches(2, 64)
    for _ in range(3):
        next(a)
    next(b)
    states = a.state_dict(), b.state_dict()
    a.close()
    b.close()
    for state, taken in zip(states, (3, 1), strict=True):
        assert all(map(torch.equal, [x.clone() for x in site.batches(64, state=state)], whole[taken:]))
    again = site.shared_batches(2, 64, state=states[0])
    assert all(all(map(torch.equal, found, whole[3:])) for found in all_of(again))


def test_an_error_reaches_every_consumer(tmp_path: Path) -> None:
    store = make_store(tmp_path / "s", contexts=60)
    file = store.path / "train/mlp.1/c/0/0"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 4
    file.write_bytes(data)
    consumers = store.site("mlp.1").shared_batches(3, 100)
    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(drain, consumer) for consumer in consumers]:
            with pytest.raises(CorruptError, match="c/0/0: chunk 0"):
                future.result()


def test_no_thread_is_left_when_all_have_left(store: Store) -> None:
    consumers = store.site("mlp.1").shared_batches(3, 64, epochs=None)
    next(consumers[0])
    for consumer in consumers:
        consumer.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("gsae-")]
    with pytest.raises(StopIteration):
        next(consumers[0])
    with pytest.raises(UsageError, match="at least 1"):
        store.site("mlp.1").shared_batches(0, 64)
