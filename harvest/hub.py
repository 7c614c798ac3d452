"""Calling Hugging Face's libraries: quietly, pinned to a commit, and with each failure turned into one line.

These libraries warn, draw bars and raise dozens of types; only this file knows them. Silencing affects the whole
process, so it lasts for single calls only. Downloads keep their progress bars.
"""

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr
from typing import Literal

from gsae.errors import GsaeError, NotFoundError, UsageError

Kind = Literal["model", "dataset"]
LOGGERS = ("transformers", "datasets", "huggingface_hub", "accelerate")


@contextmanager
def quiet(bars: bool = True) -> Iterator[None]:
    """Silence the warnings and logs of the libraries inside the `with`; if not `bars`, also everything on stderr."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")
        for logger in loggers:
            stack.callback(logger.setLevel, logger.level)
            logger.setLevel(logging.CRITICAL)
        if not bars:
            stack.enter_context(redirect_stderr(io.StringIO()))
        yield


def pin(kind: Kind, name: str, revision: str | None) -> str:
    """Return the commit that `revision` of a Hub id stands for now. Raises NotFoundError or UsageError."""
    with quiet():
        from huggingface_hub import HfApi

        try:
            info = HfApi().repo_info(name, repo_type=kind, revision=revision)
        except Exception as error:  # the Hub's client raises its own, httpx's and the system's types
            raise explain(kind, name, error) from None
    if info.sha is None:
        raise NotFoundError(f"The Hub gives no commit for {kind} {name!r} at revision {revision!r}.")
    return info.sha


def explain(kind: Kind, name: str, error: Exception) -> GsaeError:
    """Return the error of gsae for a failure of the Hub, or of a library that called it."""
    from huggingface_hub import errors

    where = f"{kind} {name!r}"
    for each in _chain(error):
        if isinstance(each, errors.GatedRepoError) or "gated dataset" in str(each):
            page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
            return NotFoundError(f"The {where} is gated: accept its terms at {page}, then run `hf auth login`.")
        if isinstance(each, errors.RevisionNotFoundError):
            return NotFoundError(f"The Hub has {where}, but not this revision of it.")
        if isinstance(each, errors.RepositoryNotFoundError):
            return NotFoundError(f"There is no {where}: no such builtin, local path or Hub id.")
        if isinstance(each, errors.HFValidationError):
            return NotFoundError(f"There is no {where}: no such local path, and no Hub id looks like this.")
        if isinstance(each, (errors.LocalEntryNotFoundError, ConnectionError, TimeoutError)) or _is_network(each):
            return NotFoundError(f"There is no {where} on this machine, and huggingface.co cannot be reached.")
    if isinstance(error, FileNotFoundError):
        return NotFoundError(f"The {where} was not found: {one_line(error)}.")
    return UsageError(f"The {where} cannot be read: {one_line(error)}.")


def one_line(error: BaseException) -> str:
    """Return the text of an error in one line of at most 300 characters, without a final full stop."""
    text = " ".join(str(error).split()) or type(error).__name__
    return (text if len(text) <= 300 else text[:297] + "...").removesuffix(".")


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """Yield an error and its causes, the first cause first."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    # Causes come first, because an HTTP status says more than the library's error that wraps it.
    yield from reversed(seen)


def _is_network(error: BaseException) -> bool:
    return any(kind.__name__ in {"NetworkError", "TimeoutException", "ProxyError"} for kind in type(error).__mro__)
