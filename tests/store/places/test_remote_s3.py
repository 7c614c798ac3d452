"""Stores on a real S3 server: copied, listed, verified and trained from, also when the server dies meanwhile."""

import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import obstore
import pytest
import torch
from obstore.store import S3Store

from gsae.errors import CorruptError, IncompatibleError, NotFoundError, RemoteError, UsageError
from gsae.store import Store, copy, list_stores, open_store, verify
from gsae.store.format.json_files import sha256
from gsae.store.format.manifest import FileEntry
from gsae.store.places.cache import Cache
from gsae.store.places.object_store import PART_BYTES, Remote
from gsae.tests.support.children import files, start
from gsae.tests.support.command import gsae, refused
from gsae.tests.support.sharing import SITE, copy_or_exit, counted, in_environment, train_from
from gsae.tests.support.stores import make_store
from gsae.tests.support.swift import SECRET, Swift, is_installed, make_bucket, serving

pytestmark = [
    pytest.mark.server,
    pytest.mark.skipif(not is_installed(), reason="the S3 server is not installed: `make swift`"),
]

BUCKET = "s3://team"


@pytest.fixture(scope="module")
def swift(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swift]:
    """A server with a bucket, and an environment that names this server only."""
    with pytest.MonkeyPatch.context() as patch, serving(tmp_path_factory.mktemp("swift")) as server:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        for name, value in server.environment.items():
            patch.setenv(name, value)
        make_bucket("team")
        yield server


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Six train windows."""
    root = tmp_path_factory.mktemp("s3") / "store"
    return make_store(root, contexts=120, window_rows=512, chunk_rows=64, sites={SITE: 32, "mlp.2": 16})


@pytest.fixture(scope="module")
def url(store: Store, swift: Swift) -> str:
    """The store, copied to the server."""
    copy(store.path, f"{BUCKET}/stores/first")
    return f"{BUCKET}/stores/first"


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSAE_RETRY_SECONDS", "1")


def put(url: str, name: str, data: bytes, sum_: str | None = None) -> FileEntry:
    entry = FileEntry(path=name, size=len(data), sha256=sum_ or sha256(data))
    Remote(url).put(entry, iter([data[i : i + (1 << 20)] for i in range(0, len(data), 1 << 20)]))
    return entry


def test_a_store_goes_there_and_back_with_the_same_bytes(store: Store, url: str, tmp_path: Path) -> None:
    told: list[Any] = []
    assert copy(url, tmp_path / "back", listen=told.append) == store.digest
    assert files(tmp_path / "back") == files(store.path)
    copy(store.path, url, listen=told.append)
    assert told[-1].sent == 0
    copy(url, f"{BUCKET}/second", listen=told.append)
    assert told[-1].sent == store.bytes


def test_a_remote_store_is_verified(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSAE_CACHE", str(tmp_path))
    assert verify(open_store(url)) == []
    assert verify(open_store(url), deep=True) == []
    copy(url, f"{BUCKET}/damaged")
    name = f"train/{SITE}/c/1/0"
    where = S3Store("team", prefix="damaged")
    data = bytearray(bytes(obstore.get(where, name).bytes()))
    data[len(data) // 2] ^= 1
    obstore.put(where, name, bytes(data))
    obstore.delete(where, "shards/train-00003.json")
    assert any("train-00003.json" in fault for fault in verify(open_store(f"{BUCKET}/damaged")))
    found = verify(open_store(f"{BUCKET}/damaged"), deep=True)
    assert any(name in fault for fault in found)
    with pytest.raises(CorruptError, match=name):
        list(open_store(f"{BUCKET}/damaged", Cache(tmp_path / "other")).site(SITE).in_order())


def test_the_stores_of_a_bucket_are_listed(store: Store, url: str) -> None:
    found = {each.path: each for each in list_stores(BUCKET)}
    assert found[url] == list_stores(url)[0]
    assert (found[url].state, found[url].sites) == ("complete", (SITE, "mlp.2"))
    assert list_stores(f"{BUCKET}/nothing") == []
    with pytest.raises(NotFoundError, match=r"s3://team/nothing is no gsae store"):
        open_store(f"{BUCKET}/nothing")


def test_another_codec_and_a_part_can_be_written_to_a_server(store: Store, url: str, tmp_path: Path) -> None:
    assert copy(store.path, f"{BUCKET}/zstd", codec="zstd") == store.digest
    digest = copy(f"{BUCKET}/zstd", f"{BUCKET}/part", sites=[SITE], windows=2)
    assert copy(f"{BUCKET}/part", tmp_path / "part") == digest
    part = open_store(tmp_path / "part")
    assert verify(part, deep=True) == []
    assert part.plan.parent == store.digest


def test_a_large_file_goes_in_parts_and_appears_whole_or_not_at_all(swift: Swift) -> None:
    data = os.urandom(2 * PART_BYTES + 12345)
    remote, entry = Remote(BUCKET), put(BUCKET, "large", data)
    assert b"".join(map(bytes, remote.blocks(entry))) == data
    assert remote.holds(entry)
    before = sorted(swift.root.rglob("*.data"))

    def broken() -> Iterator[bytes]:
        yield data
        raise CorruptError("the source is damaged")

    with pytest.raises(CorruptError, match="damaged"):
        remote.put(FileEntry(path="broken", size=len(data) + 1, sha256="0" * 64), broken())
    with pytest.raises(NotFoundError, match="s3://team/broken is not there"):
        remote.read("broken")
    assert sorted(swift.root.rglob("*.data")) == before


def test_an_object_without_a_stored_sum_is_read_and_compared(swift: Swift) -> None:
    remote, data = Remote(f"{BUCKET}/foreign"), b"some bytes" * 100
    obstore.put(S3Store("team", prefix="foreign"), "file", data)
    entry = FileEntry(path="file", size=len(data), sha256=sha256(data))
    assert remote.holds(entry)
    for other in (entry.model_copy(update={"sha256": "1" * 64}), entry.model_copy(update={"size": 5})):
        with pytest.raises(IncompatibleError, match="s3://team/foreign/file already exists with different content"):
            remote.holds(other)


def test_three_processes_that_train_from_one_store_fetch_each_shard_once_in_total(
    store: Store, url: str, tmp_path: Path
) -> None:
    log, runs = tmp_path / "log", [tmp_path / f"run{i}" for i in range(3)]
    trainers = [start(in_environment, dict(os.environ), train_from, url, tmp_path / "cache", log, run) for run in runs]
    train_from(str(store.path), tmp_path / "none", log, tmp_path / "local")
    for trainer in trainers:
        trainer.join()
    assert [trainer.exitcode for trainer in trainers] == [0] * 3
    weights = [next(run.rglob("sae_weights.safetensors")).read_bytes() for run in (*runs, tmp_path / "local")]
    assert len(set(weights)) == 1
    fetched = Counter(log.read_text().split())
    assert set(fetched.values()) == {1}
    # The trainers measure on held-out rows too.
    assert fetched.keys() - {f"heldout/{SITE}/c/0/0"} == {f"train/{SITE}/c/{w}/0" for w in store.windows("train")}


def test_the_command_works_on_urls(store: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GSAE_CACHE", str(tmp_path / "cache"))
    run, target = tmp_path / "run", f"{BUCKET}/by-command"
    assert gsae("copy", store.path, target).returncode == 0
    assert f"{target} is good" in gsae("verify", target, "--deep").stdout
    assert store.digest in gsae("info", target).stdout
    assert target in gsae("ls", BUCKET).stdout
    sae = ["--site", SITE, "--sae", "gated width=32 l1=.1", "--steps", 20, "--batch-size", 64, "--device", "cpu"]
    trained = gsae("train", target, *sae, "--out", run)
    assert trained.returncode == 0, trained.stderr
    evaluated = gsae("eval", run, "--no-model", "--device", "cpu")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "gated-w32-l1_0.1-seed0" in evaluated.stdout
    refused(3, f"{BUCKET}/nothing is no gsae store", "train", f"{BUCKET}/nothing", *sae, "--out", tmp_path / "other")


def test_a_server_that_comes_back_is_waited_for(store: Store, swift: Swift) -> None:
    swift.stop()
    with ThreadPoolExecutor(1) as pool:
        copying = pool.submit(copy, store.path, f"{BUCKET}/patient")
        time.sleep(1.5)
        assert not copying.done()
        swift.start()  # on this thread: its processes end with the thread that starts them
        assert copying.result() == store.digest
    assert list_stores(f"{BUCKET}/patient")[0].state == "complete"


def test_a_server_that_dies_during_a_copy_gives_exit_code_75_and_the_same_copy_completes(
    store: Store, swift: Swift, impatient: None
) -> None:
    told: list[Any] = []

    def listen(copied: Any) -> None:
        told.append(copied)
        if len(told) == 20:
            swift.stop()

    target = f"{BUCKET}/interrupted"
    try:
        with pytest.raises(RemoteError, match=r"s3://team/interrupted/\S+ cannot be reached") as raised:
            copy(store.path, target, listen=listen)
        copying = start(in_environment, dict(os.environ), copy_or_exit, str(store.path), target)
        copying.join()
    finally:
        swift.start()
    assert raised.value.exit_code == copying.exitcode == 75
    assert "unfinished" in list_stores(target)[0].state
    assert copy(store.path, target, listen=told.append) == store.digest
    assert told[-1].bytes > told[-1].sent > 0
    assert list_stores(target)[0].state == "complete"


def test_a_server_that_dies_while_it_is_read_from_leaves_nothing_corrupt_in_the_cache(
    store: Store, url: str, swift: Swift, tmp_path: Path, impatient: None
) -> None:
    cache = counted(tmp_path / "cache", tmp_path / "log")
    options: dict[str, Any] = {"mix": 2, "open_windows": 2, "seed": 1}
    batches = open_store(url, cache).site(SITE).batches(64, **options)
    got = [next(batches)]
    swift.stop()
    try:
        with pytest.raises(RemoteError, match="cannot be reached") as raised:
            got.extend(batches)
        state = batches.state_dict()
        batches.close()
    finally:
        swift.start()
    assert raised.value.exit_code == 75
    found = files(tmp_path / "cache" / "shards")
    assert found
    assert {name: hashlib.sha256(data).hexdigest() for name, data in found.items()} == {name: name for name in found}
    assert files(tmp_path / "cache" / "fetching") == {}
    got.extend(open_store(url, cache).site(SITE).batches(64, state=state, **options))
    assert torch.equal(torch.cat(got), torch.cat(list(store.site(SITE).batches(64, **options))))
    assert set(Counter((tmp_path / "log").read_text().split()).values()) == {1}


def test_credentials_come_from_the_environment_and_go_nowhere(
    store: Store, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy(url, tmp_path / "back")
    cached = open_store(url, Cache(tmp_path / "cache"))
    cached.tokens()
    assert not any(SECRET.encode() in data for data in files(tmp_path).values())
    assert SECRET not in repr(cached)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-and-secret")
    with pytest.raises(UsageError, match=r"is refused: .*403.* Credentials are taken from the environment") as raised:
        open_store(url)
    for hidden in ("wrong-and-secret", "Signature=", "test:tester", "127.0.0.1"):
        assert hidden not in str(raised.value)
    assert raised.value.__suppress_context__
    with pytest.raises(UsageError, match="holds no credentials") as raised:
        open_store("s3://key:wrong-and-secret@team/stores/first")
    assert "wrong-and-secret" not in str(raised.value)


def test_a_missing_bucket_and_a_missing_server_are_different_errors(
    swift: Swift, impatient: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(NotFoundError, match="s3://nobody is no gsae store"):
        open_store("s3://nobody")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    started = time.monotonic()
    with pytest.raises(RemoteError, match=r"s3://team/manifest\.json cannot be reached"):
        open_store(BUCKET)
    assert time.monotonic() - started > 0.5
    monkeypatch.setenv("GSAE_RETRY_SECONDS", "soon")
    with pytest.raises(UsageError, match="GSAE_RETRY_SECONDS is a number of seconds; got 'soon'"):
        open_store(BUCKET)
