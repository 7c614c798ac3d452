"""How a file appears in a store: whole or not at all, once, and for good.

Temp file, fsync, link(2) to the final name, directory fsync. A link never replaces, so of two writers one wins and
the other learns it; equal bytes are then a success and different bytes keep what was published. A crash leaves at
most temp files in `STORE/.tmp`, each locked by its writer while it lives, so that a later run can tell and remove
what nobody owns.
"""

import errno
import fcntl
import hashlib
import os
import secrets
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from .errors import IncompatibleError, NotFoundError, SpaceError, UsageError

TMP = ".tmp"
READ_BYTES = 8 << 20
# What flock says where a file system (Lustre or NFS, as some are mounted) has no locks.
NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


@contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write under `where` into one clear error."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise SpaceError(
                f"No space left to write under {where}: {error.strerror}. Free some and run the same command again."
            ) from error
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR):
            raise UsageError(f"Cannot write under {where}: {error.strerror}.") from error
        raise


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
        folder.mkdir(parents=True, exist_ok=True)
        try:
            file = open(folder / secrets.token_hex(8), "x+b")  # noqa: PTH123, SIM115
        except FileNotFoundError:
            continue  # a sweep removed the empty folder in between
        _locked(file)
        if os.fstat(file.fileno()).st_nlink:
            return file
        file.close()  # a sweep took it for abandoned before it was locked


def publish(root: Path, name: str, file: BinaryIO, sha256: str) -> bool:
    """Give the temp file `file` of `root` its final name, durably.

    Return whether the bytes under that name are now these (sha256): a file that was there first stays.
    """
    target = root / name
    file.flush()
    os.fsync(file.fileno())
    target.parent.mkdir(parents=True, exist_ok=True)
    ours = True
    try:
        os.link(file.name, target)
    except FileExistsError:
        ours = hash_file(target) == sha256
    sync_up_to(root, target.parent)  # also where another writer was first: it may not have come to this
    return ours


def publish_bytes(root: Path, name: str, data: bytes) -> None:
    """Publish a small file; raises IncompatibleError when another one has its name, which is kept."""
    with disk_errors(root), temp_file(root) as file:
        file.write(data)
        if not publish(root, name, file, hashlib.sha256(data).hexdigest()):
            raise IncompatibleError(
                f"{root / name} exists with other content than this run made; it was kept. Use another folder."
            )


@contextmanager
def alone(root: Path, name: str, wait: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Keep other processes out of the same call of `root` and `name` meanwhile; a dead one keeps nobody out.

    wait: called once, if another one is in it. Where the file system has no locks, nobody is kept out.
    """
    path = root / TMP / name
    file = _open_lock(root, path)
    if not _locked(file, fcntl.LOCK_NB):
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
            path.parent.mkdir(parents=True, exist_ok=True)
            return path.open("a+b")


def _locked(file: BinaryIO, flags: int = 0) -> bool:
    """Lock a file, waiting unless `flags` says otherwise; False when another process has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | flags)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
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


def raw_sha256(arrays: Iterable[NDArray[Any]]) -> str:
    """Return the sha256 of the bytes of arrays laid end to end."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


def write_back(file: BinaryIO, start: int, stop: int) -> None:
    """Let the disk begin on bytes start .. stop of a file, so that fsync finds little left to wait for."""
    if hasattr(os, "posix_fadvise"):
        os.posix_fadvise(file.fileno(), start, stop - start, os.POSIX_FADV_DONTNEED)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable."""
    fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def sync_up_to(root: Path, folder: Path) -> None:
    """Make the names on the way from `root` to `folder` durable, those that a killed writer made included."""
    sync_folder(folder)
    while folder != root:
        folder = folder.parent
        sync_folder(folder)
