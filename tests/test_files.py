"""How files appear: published once and never replaced, replaced whole or not at all, one holder of a lock."""

import errno
import hashlib
import os
import threading
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
from safetensors import SafetensorError

from gsae.errors import IncompatibleError, NotFoundError, SpaceError, UsageError
from gsae.files import (
    NewFile,
    alone,
    cache_folder,
    claim,
    disk_errors,
    publish_bytes,
    publish_together,
    read_file,
    remove_temporary,
    replace_folder,
    replace_text,
    replacing,
    sweep,
    temp_file,
)


def names(folder: Path) -> list[str]:
    """Everything below a folder, hidden files included."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_equal_bytes_are_published_twice_and_other_bytes_change_nothing(tmp_path: Path) -> None:
    for _ in range(2):
        publish_bytes(tmp_path, "a/b", b"first")
    with pytest.raises(IncompatibleError, match="a/b already exists with different content; left unchanged"):
        publish_bytes(tmp_path, "a/b", b"second")
    assert (tmp_path / "a" / "b").read_bytes() == b"first"
    sweep(tmp_path)
    assert names(tmp_path) == ["a", "a/b"]


def test_contents_and_folders_are_synced_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each sync waits for another one at the same time: two of contents, then four of folders."""
    together = threading.Barrier(2)
    monkeypatch.setattr(os, "fsync", lambda _: together.wait(30))
    with ExitStack() as files:
        new = []
        for name in ("a/x", "b/c/y"):
            file = files.enter_context(temp_file(tmp_path))
            file.write(name.encode())
            new.append(NewFile(name, file, hashlib.sha256(name.encode()).hexdigest()))
        assert publish_together(tmp_path, new, threads=2) == [True, True]
    assert (tmp_path / "b" / "c" / "y").read_bytes() == b"b/c/y"


def test_no_name_appears_if_the_contents_of_one_file_cannot_be_synced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = set[int]()

    def fsync(descriptor: int) -> None:
        if descriptor in broken:
            raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(os, "fsync", fsync)
    with ExitStack() as files:
        new = [NewFile(name, files.enter_context(temp_file(tmp_path)), "") for name in ("x", "y", "z")]
        broken.add(new[1].file.fileno())
        with pytest.raises(OSError, match="broken"):
            publish_together(tmp_path, new, threads=2)
    sweep(tmp_path)
    assert names(tmp_path) == []


def test_a_replacement_that_fails_leaves_the_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_text(path, "before")
    with pytest.raises(KeyError), replacing(path) as temporary:  # noqa: PT012 (the write is part of it)
        temporary.write_text("half")
        raise KeyError("stop")
    assert (path.read_text(), names(tmp_path)) == ("before", ["file"])
    replace_text(path, "after")
    assert (path.read_text(), names(tmp_path)) == ("after", ["file"])


def test_a_file_is_never_seen_half_written(tmp_path: Path) -> None:
    path = tmp_path / "file"
    replace_text(path, "before")
    with replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "before"
        temporary.write_text("after")
    assert path.read_text() == "after"


def test_shared_replacements_do_not_use_one_temporary_file(tmp_path: Path) -> None:
    with replacing(tmp_path / "file", shared=True) as mine:
        assert str(os.getpid()) in mine.name
        mine.write_text("mine")


def test_what_a_killed_writer_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".file.tmp").write_text("half")
    (tmp_path / "file").write_text("whole")
    remove_temporary(tmp_path)
    assert names(tmp_path) == ["file"]


def test_a_folder_is_replaced_whole_or_stays(tmp_path: Path) -> None:
    def fill(text: str) -> Callable[[Path], None]:
        def write(folder: Path) -> None:
            folder.mkdir()
            (folder / text).write_text(text)
            if text == "bad":
                raise KeyError(text)

        return write

    replace_folder(tmp_path / "site", fill("one"))
    replace_folder(tmp_path / "site", fill("two"))
    with pytest.raises(KeyError):
        replace_folder(tmp_path / "site", fill("bad"))
    assert names(tmp_path) == ["site", "site/two"]


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "full"), SpaceError),
        (OSError(errno.EDQUOT, "quota"), SpaceError),
        (SafetensorError("I/O error: No space left on device (os error 28)"), SpaceError),
        (OSError(errno.EACCES, "no"), UsageError),
        (OSError(errno.EROFS, "read-only"), UsageError),
        (OSError(errno.EIO, "broken"), OSError),
        (SafetensorError("Error while deserializing header"), SafetensorError),
        (ValueError("other (os error 28)"), ValueError),
    ],
)
def test_only_what_the_system_refuses_becomes_an_error_of_ours(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind) as caught, disk_errors(Path("/some/file")):
        raise error
    assert type(caught.value) is kind
    assert kind not in (SpaceError, UsageError) or "/some/file" in str(caught.value)


def test_a_claim_has_one_holder_until_it_is_closed(tmp_path: Path) -> None:
    first = claim(tmp_path / "group" / "lock")
    assert first is not None
    assert claim(tmp_path / "group" / "lock") is None
    first.close()
    second = claim(tmp_path / "group" / "lock")
    assert second is not None
    second.close()


def test_sweeping_removes_only_what_no_process_holds(tmp_path: Path) -> None:
    held = claim(tmp_path / ".tmp" / "held")
    assert held is not None
    (tmp_path / ".tmp" / "left").write_text("half")
    sweep(tmp_path)
    assert names(tmp_path) == [".tmp", ".tmp/held"]
    held.close()
    sweep(tmp_path)
    assert names(tmp_path) == []


def test_a_sweep_that_removes_the_folder_in_between_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mkdir(2) says that the folder exists, and then it is gone: pathlib raises FileExistsError."""
    made, lost = Path.mkdir, [tmp_path / ".tmp"] * 3

    def mkdir(path: Path, *arguments: Any, **options: Any) -> None:
        if lost and path == lost[-1]:
            lost.pop()
            raise FileExistsError(errno.EEXIST, "File exists", str(path))
        made(path, *arguments, **options)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    publish_bytes(tmp_path, "file", b"bytes")
    with alone(tmp_path, "lock"):
        assert not lost
    assert (tmp_path / "file").read_bytes() == b"bytes"


@pytest.mark.parametrize("kind", ["file", "dangling link"])
def test_anything_else_in_place_of_the_folder_is_one_error(tmp_path: Path, kind: str) -> None:
    folder = tmp_path / ".tmp"
    folder.symlink_to("nowhere") if kind == "dangling link" else folder.write_text("mine")
    for write in (lambda: publish_bytes(tmp_path, "file", b"bytes"), lambda: alone(tmp_path, "lock").__enter__()):
        with pytest.raises(UsageError, match="Cannot write"):
            write()
    assert names(tmp_path) == [".tmp"]


def test_a_file_that_is_not_there_is_named_with_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"nothing is not there\. Run `gsae eval` first\."):
        read_file(tmp_path / "nothing", "Run `gsae eval` first.")


def test_the_cache_is_where_the_environment_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("GSAE_CACHE", raising=False)
    assert cache_folder() == tmp_path / "gsae"
    monkeypatch.setenv("GSAE_CACHE", str(tmp_path / "own"))
    assert cache_folder() == tmp_path / "own"
