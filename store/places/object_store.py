"""A prefix of an object store as a place for the files of a store: s3://, gs://, az:// (and file://).

Objects appear whole or not at all. The sha256 of a file is stored as metadata of its object, so that a copy that is
resumed need not read the object. Large files move in parts, a few at a time; a request without an answer is repeated
for GSAE_RETRY_SECONDS (120). The client library takes credentials from the environment. They are never stored, and the
library's messages are shortened before they are shown, because they may contain signatures.
"""

import hashlib
import itertools
import os
import re
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import obstore
from obstore.exceptions import BaseError, PermissionDeniedError, UnauthenticatedError
from obstore.store import LocalStore, from_url

from gsae.errors import GsaeError, IncompatibleError, NotFoundError, RemoteError, UsageError
from gsae.store.format.manifest import FileEntry

SCHEMES = ("s3", "gs", "az", "file")
PART_BYTES = 8 << 20
PARTS_IN_FLIGHT = 4
RETRY_SECONDS = 120.0
PAUSE_SECONDS = 0.5
SUM = "gsaesha256"  # letters and digits only, which every service accepts in a name
CLIENT_FAULT = re.compile(r"status code: 4(?!08|29)\d\d")

T = TypeVar("T")


def is_url(path: str | Path) -> bool:
    """Whether `path` is a URL and not a local folder."""
    return "://" in str(path)


class Remote:
    """The objects under a URL; its methods are those of `place.Place`.

    Each raises RemoteError if the server does not answer for GSAE_RETRY_SECONDS, UsageError if it refuses the request.
    """

    def __init__(self, url: str, create: bool = False) -> None:
        """Name a prefix; no request is sent yet. create: make the folder of a file:// URL. Raises UsageError."""
        self.name = url.rstrip("/")
        parts = urlsplit(self.name)
        if parts.scheme not in SCHEMES or parts.query or parts.username or parts.password:
            raise UsageError(
                f"A store's URL begins with {', '.join(f'{s}://' for s in SCHEMES)} and holds no credentials or query."
            )
        self._patience = _retry_seconds()
        retry: Any = {"max_retries": 1000, "retry_timeout": timedelta(seconds=self._patience)}
        with self._translated(""):
            if parts.scheme == "file":
                self._store: Any = LocalStore.from_url(self.name, mkdir=create) if create else _folder(self.name)
            else:
                self._store = from_url(self.name, retry_config=retry)
        self._declares = parts.scheme != "file"

    def read(self, name: str) -> bytes:
        """As `Place.read`."""
        return self._patiently(name, lambda: bytes(obstore.get(self._store, name).bytes()))

    def blocks(self, entry: FileEntry) -> Iterator[Any]:
        """As `Place.blocks`: `PART_BYTES` at a time, while the next parts are being fetched."""
        pool = ThreadPoolExecutor(PARTS_IN_FLIGHT, thread_name_prefix="gsae-fetch")

        def request(first: int) -> Future[Any]:
            size = min(PART_BYTES, entry.size - first)
            part = lambda: obstore.get_range(self._store, entry.path, start=first, length=size)  # noqa: E731
            return pool.submit(self._patiently, entry.path, part)

        try:
            firsts = iter(range(0, entry.size, PART_BYTES))
            requested = deque(map(request, itertools.islice(firsts, PARTS_IN_FLIGHT)))
            while requested:
                yield requested.popleft().result()
                requested.extend(map(request, itertools.islice(firsts, 1)))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def put(self, entry: FileEntry, blocks: Iterator[Any]) -> None:
        """As `Place.put`."""
        with self._translated(entry.path):
            obstore.put(
                self._store,
                entry.path,
                blocks,
                attributes={SUM: entry.sha256} if self._declares else None,
                use_multipart=entry.size > PART_BYTES,
                chunk_size=PART_BYTES,
                max_concurrency=PARTS_IN_FLIGHT,
            )

    def holds(self, entry: FileEntry) -> bool:
        """As `Place.holds`. The sha256 is the one stored with the object; an object without one is read."""
        try:
            found = self._patiently(entry.path, lambda: obstore.get(self._store, entry.path, options={"head": True}))
        except NotFoundError:
            return False
        declared = found.attributes.get(SUM) if found.meta["size"] == entry.size else ""
        if declared is None:
            digest = hashlib.sha256()
            for block in self.blocks(entry):
                digest.update(block)
            declared = digest.hexdigest()
        if declared != entry.sha256:
            raise IncompatibleError(
                f"{self.name}/{entry.path} already exists with different content; left unchanged. Use another URL."
            )
        return True

    def children(self, folder: str) -> tuple[list[str], dict[str, int]]:
        """As `Place.children`; "" is the URL itself."""
        found = self._patiently(folder, lambda: obstore.list_with_delimiter(self._store, folder or None))
        return sorted(found["common_prefixes"]), {o["path"]: o["size"] for o in found["objects"]}

    def _patiently(self, name: str, call: Callable[[], T]) -> T:
        """Repeat a call until it succeeds: the client library does not repeat one that broke off in the body."""
        deadline = time.monotonic() + self._patience
        while True:
            try:
                with self._translated(name):
                    return call()
            except RemoteError:
                if time.monotonic() + PAUSE_SECONDS > deadline:
                    raise
            time.sleep(PAUSE_SECONDS)

    @contextmanager
    def _translated(self, name: str) -> Iterator[None]:
        where = f"{self.name}/{name}" if name else self.name
        if _first_process() != os.getpid():
            raise UsageError(
                f"{where} cannot be read in a process that was forked from one that reads remote stores. "
                "Start workers by `spawn` or `forkserver` (DataLoader: multiprocessing_context)."
            )
        try:
            yield
        except GsaeError:
            raise
        except FileNotFoundError:
            raise NotFoundError(f"{where} is not there.") from None
        except (PermissionDeniedError, UnauthenticatedError) as error:
            raise UsageError(
                f"{where} is refused: {_reason(error)}. Credentials are taken from the environment."
            ) from None
        except (BaseError, OSError) as error:
            if CLIENT_FAULT.search(str(error)):
                raise UsageError(f"{where} is refused: {_reason(error)}.") from None
            raise RemoteError(f"{where} cannot be reached: {_reason(error)}. Run the same command again.") from None


def _folder(url: str) -> Any:
    if not Path(urlsplit(url).path).is_dir():
        raise FileNotFoundError(url)
    return LocalStore.from_url(url)


@cache
def _first_process() -> int:
    """Return the process that used the client library first: forked children do not have its threads."""
    return os.getpid()


def _retry_seconds() -> float:
    text = os.environ.get("GSAE_RETRY_SECONDS", str(RETRY_SECONDS))
    try:
        return float(text)
    except ValueError:
        raise UsageError(f"GSAE_RETRY_SECONDS is a number of seconds; got {text!r}.") from None


def _reason(error: Exception) -> str:
    """Return the message of the client library without addresses, because their queries may hold signatures."""
    line = str(error).split("\n")[0].rsplit(" - ", 1)[-1].split("<")[0]
    return re.sub(r"\S*://\S*", "…", line)[:200].strip(" :.")
