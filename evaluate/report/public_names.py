"""Names without the folders of this machine: a report and a feature browser are shown to others.

An absolute path is cut to its last part, wherever it stands. Relative paths and URLs stay.
"""

import re
from typing import Any

# An absolute path that starts a word; its last part is what may be shown.
_PATH = re.compile(r"""(?<![^\s'"=,])(?:file://)?(?:~|[A-Za-z]:)?[\\/][^\s'"]*[\\/]([^\s'"\\/]+)""")
_WHOLE = re.compile(r"(?:file://)?(?:~|[A-Za-z]:)?[\\/]")


def public_name(text: str) -> str:
    """Return `text` with every absolute path cut to its last part."""
    last = re.split(r"[\\/]", text.rstrip("\\/"))[-1] if _WHOLE.match(text) else ""
    return last or _PATH.sub(r"\1", text)


def public_value(value: Any) -> Any:
    """Return a JSON or TOML value with every string in it cut as `public_name` does."""
    if isinstance(value, str):
        return public_name(value)
    if isinstance(value, list):
        return [public_value(each) for each in value]
    if isinstance(value, dict):
        return {key: public_value(each) for key, each in value.items()}
    return value
