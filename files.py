"""How files appear: whole or not at all. The only place for publishing, replacing, locks and refused writes.

`publish` writes a file of a store, once and for good: temp file, fsync, link(2) to the final name, directory fsync. A
link never replaces, so of two writers one wins and the other learns it; equal bytes are then a success, and different
bytes leave the published file unchanged. A crash leaves at most temp files in `STORE/.tmp`. Each is locked by its
writer, so that a later run can remove those that no process holds. `publish_together` does the same for several files,
and syncs each folder on their way once.

`replace_file` writes a file of a run, which may change: temp file beside it, fsync, rename, directory fsync. What
that costs: two fsyncs a file, some milliseconds on a disk.
"""

import errno
import fcntl
import hashlib
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple, TypeVar

from gsae.errors import IncompatibleError, NotFoundError, SpaceError, UsageError

TMP = ".tmp"
READ_BYTES = 8 << 20
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST)
# What flock reports where a file system (Lustre or NFS, as some are mounted) has no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)

T = TypeVar("T")


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn a refused write under `where` into one clear error: SpaceError on a full disk, else UsageError."""
    try:
        yield
    except Exception as error:
        number = _errno(error)
        if number in NO_SPACE:
            raise SpaceError(
                f"No space left to write {where}: {os.strerror(number)}. "
                "Free some space and run the same command again."
            ) from error
        if number in REFUSED:
            raise UsageError(f"Cannot write {where}: {os.strerror(number)}.") from error
        raise


def _errno(error: Exception) -> int:
    """Return the number of an operating system's error, 0 for other errors; safetensors has it in its text alone."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error)) if type(error).__name__ == "SafetensorError" else None
    return int(found[1]) if found else 0


@contextmanager
def temp_file(root: Path) -> Iterator[BinaryIO]:
    """Open a locked temp file in `root/.tmp`; it is removed at the end, whatever happened."""
    folder = root / TMP
    file = _create_locked(folder)
    try:
        yield file
    finally:
        with suppress(FileNotFoundError):
            Path(file.name).unlink()
        file.close()


def _create_locked(folder: Path) -> BinaryIO:
    while True:
        _make_folder(folder)
        try:
            file = open(folder / secrets.token_hex(8), "x+b")  # noqa: PTH123, SIM115
        except FileNotFoundError:
            continue  # a sweep removed the empty folder in between
        _locked(file)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # a sweep took it for abandoned before it was locked


def _make_folder(folder: Path) -> None:
    """Make a folder that a sweep may remove at any time; raises FileExistsError where anything else has its name."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:  # also where a sweep removes the folder between mkdir(2) and pathlib's look at it
        with suppress(FileNotFoundError):
            if not stat.S_ISDIR(folder.lstat().st_mode):
                raise


class NewFile(NamedTuple):
    """A temp file to be published: its final name below the root, the open file, and the sha256 of its bytes."""

    name: str
    file: BinaryIO
    sha256: str


def publish(root: Path, name: str, file: BinaryIO, sha256: str) -> bool:
    """Give the temp file `file` of `root` its final name, durably.

    Return whether the bytes under that name are now these (sha256): a file that was there first stays.
    """
    return publish_together(root, [NewFile(name, file, sha256)], 1)[0]


def publish_together(root: Path, new: Sequence[NewFile], threads: int) -> list[bool]:
    """Give temp files of `root` their final names: all contents are made durable, then all names.

    Return for each whether the bytes under its name are now these: a file that was there first stays. All names are
    durable when this returns, and none before that, so nothing may refer to one of the files earlier. threads: so many
    files are synced at a time, then so many folders; the disk commits syncs that run at the same time together.
    """
    _each(_sync_contents, [each.file for each in new], threads)
    ours = [_link(root, each) for each in new]
    folders = {folder for each in new for folder in folders_up_to(root, (root / each.name).parent)}
    _each(sync_folder, sorted(folders), threads)  # also where another writer was first: it may not have come to this
    return ours


def _sync_contents(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())


def _link(root: Path, new: NewFile) -> bool:
    """Give a file its final name; return whether the bytes under that name are its own."""
    target = root / new.name
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(new.file.name, target)
    except FileExistsError:
        return hash_file(target) == new.sha256
    return True


def _each(work: Callable[[T], None], items: Sequence[T], threads: int) -> None:
    """Do the work for each item, on up to `threads` threads; raise the first error after all have ended."""
    if threads == 1 or len(items) == 1:
        for item in items:
            work(item)
        return
    with ThreadPoolExecutor(min(threads, len(items)), thread_name_prefix="gsae-sync") as pool:
        list(pool.map(work, items))


def publish_bytes(root: Path, name: str, data: bytes) -> None:
    """Publish a small file; raises IncompatibleError if the name has other content."""
    with disk_errors(root), temp_file(root) as file:
        file.write(data)
        if not publish(root, name, file, hashlib.sha256(data).hexdigest()):
            raise IncompatibleError(
                f"{root / name} already exists with different content; left unchanged. Use another folder."
            )


@contextmanager
def replacing(path: Path, *, shared: bool = False) -> Iterator[Path]:
    """Yield the name of a temporary file beside `path`; at the end, sync it and rename it to `path`.

    shared: other processes may replace the same file at the same time; a temporary file that a kill leaves then stays.
    Raises SpaceError on a full disk and UsageError where the folder cannot be written to.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp" if shared else f".{path.name}.tmp")
    with disk_errors(path):
        try:
            yield temporary
            _sync(temporary)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def replace_file(path: Path, write: Callable[[Path], object], *, shared: bool = False) -> None:
    """Let `write` fill a temporary file that then takes the place of `path`; `shared` and errors as in `replacing`."""
    with replacing(path, shared=shared) as temporary:
        write(temporary)


def replace_text(path: Path, text: str, *, shared: bool = False) -> None:
    """Replace a file by one that holds `text` in UTF-8; `shared` and errors as in `replacing`."""
    replace_file(path, lambda temporary: temporary.write_bytes(text.encode("utf-8")), shared=shared)


def append(path: Path, data: bytes, at: int) -> None:
    """Write `data` behind the first `at` bytes of a file, cutting off the rest, and sync it; a new file is created.

    The rest is a line that a killed process left torn. Raises OSError where the disk refuses it.
    """
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o644)
    with os.fdopen(descriptor, "wb") as file:
        file.truncate(at)
        file.seek(at)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    if at == 0:
        sync_folder(path.parent)


def remove_temporary(folder: Path) -> None:
    """Remove what a killed process left half-written in a folder that only this process writes to.

    safetensors gives its own temporary files random names, so no later write replaces them.
    """
    for path in folder.glob(".*tmp*"):
        path.unlink(missing_ok=True)


def replace_folder(path: Path, fill: Callable[[Path], object]) -> None:
    """Let `fill` fill a new folder beside `path`, which then takes the place of the folder at `path`.

    For folders that can be made again: nothing is synced, and a kill between the two renames leaves `path` absent.
    """
    new, old = (path.with_name(f".{path.name}.{kind}") for kind in ("new", "old"))
    for left in (new, old):
        shutil.rmtree(left, ignore_errors=True)
    try:
        fill(new)
        if path.exists():
            path.rename(old)
        new.rename(path)
    finally:
        for left in (new, old):
            shutil.rmtree(left, ignore_errors=True)


@contextmanager
def alone(root: Path, name: str, wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Keep other processes out of the same call of `root` and `name` meanwhile; a dead one keeps nobody out.

    wait: called once, if another one is in it. Where the file system has no locks, nobody is kept out.
    """
    path = root / TMP / name
    file = _open_lock(root, path)
    if not _locked(file, wait=False):
        wait()
        _locked(file)
    while not os.fstat(file.fileno()).st_nlink:  # its last holder, or a sweep, removed it before it was locked
        file.close()
        file = _open_lock(root, path)
        _locked(file)
    try:
        yield
    finally:
        with suppress(FileNotFoundError):
            path.unlink()
        file.close()


def _open_lock(root: Path, path: Path) -> BinaryIO:
    while True:
        with disk_errors(root), suppress(FileNotFoundError):  # a sweep may remove the empty folder in between
            _make_folder(path.parent)
            return path.open("a+b")


def _locked(file: BinaryIO, *, wait: bool = True) -> bool:
    """Lock a file as `lock_file` does; True on a file system without locks, where no process is kept out."""
    try:
        return lock_file(file.fileno(), Path(file.name), wait=wait)
    except IncompatibleError:
        return True


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold a lock file, after waiting for a process that has it. Without locks, no process is kept out."""
    with path.open("a+b") as file:
        _locked(file)
        yield


def claim(path: Path) -> BinaryIO | None:
    """Lock a file until it is closed; None where another process has it. A dead process holds nothing.

    Raises IncompatibleError on a file system without locks.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("a+b")
    locked = False
    try:
        locked = lock_file(file.fileno(), path, wait=False)
    finally:
        if not locked:
            file.close()
    return file if locked else None


def lock_file(descriptor: int, path: Path, *, shared: bool = False, wait: bool = True) -> bool:
    """Lock an open file until its descriptor is closed; False if another process has it and `wait` is false.

    shared: any number of processes may hold a shared lock. path: its name in errors. Raises IncompatibleError on a
    file system without locks.
    """
    kind = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | (0 if wait else fcntl.LOCK_NB)
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        raise IncompatibleError(f"{path.parent} is on a file system without locks: {error.strerror}.") from None
    return True


def sweep(root: Path) -> None:
    """Remove what dead writers left in `root/.tmp`, and the folder when nobody uses it."""
    folder = root / TMP
    with suppress(FileNotFoundError):  # another sweep may remove the empty folder in between
        for path in list(folder.iterdir()):
            with suppress(OSError), path.open("rb") as file:  # its writer lives, or there are no locks to tell
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                path.unlink()
    with suppress(OSError):
        folder.rmdir()


def cache_folder() -> Path:
    """Return the folder for what can be made or fetched again: GSAE_CACHE, else `gsae` in the user's cache folder."""
    if own := os.environ.get("GSAE_CACHE"):
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "gsae"


def read_file(path: Path, remedy: str = "") -> bytes:
    """Read a small file whole, a pipe as an empty one; raises NotFoundError with `remedy` when it is not there."""
    try:
        with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
            return file.read()
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise NotFoundError(f"{path} is not there.{' ' if remedy else ''}{remedy}") from None
    except OSError as error:
        raise NotFoundError(f"{path} cannot be read: {error.strerror}.") from None


def hash_file(path: Path) -> str:
    """Return the sha256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            digest.update(block)
    return digest.hexdigest()


def write_back(file: BinaryIO, start: int, stop: int) -> None:
    """Let the disk begin on bytes start .. stop of a file, so that fsync finds little left to wait for."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    _sync(folder, os.O_DIRECTORY)


def _sync(path: Path, flags: int = 0) -> None:
    handle = os.open(path, os.O_RDONLY | flags)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sync_up_to(root: Path, folder: Path) -> None:
    """Make the names on the way from `root` to `folder` durable, those that a killed writer made included."""
    for each in folders_up_to(root, folder):
        sync_folder(each)


def folders_up_to(root: Path, folder: Path) -> list[Path]:
    """Return the folders from `folder` up to `root`, both included."""
    return [folder, *(parent for parent in folder.parents if parent == root or root in parent.parents)]
