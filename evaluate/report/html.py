"""The report's page in one HTML file, put together from the files of page/ and the page's data as JSON.

The page's policy lets only its own script and style act, by their digests. The script writes data through textContent,
so no name from a run folder is ever markup.
"""

import base64
import hashlib
import json
from dataclasses import asdict
from importlib import resources

from .page_data import Page
from .shown_metrics import columns_js, definitions_html

SCRIPTS = ("data", "series", "texts", "axes", "labels", "points", "lines", "pointer", "table", "figures")  # in order


def fill_html(page: Page) -> str:
    """Return the HTML file of a page."""
    style = _part("report.css")
    script = "\n".join(_part(f"{name}.js") for name in SCRIPTS).replace("  /* {{columns}} */", columns_js())
    # The tags' contents begin with the line end after the tag.
    policy = "; ".join(
        (
            "default-src 'none'",
            f"script-src '{_digest(script)}'",
            f"style-src '{_digest(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )
    parts = {"policy": policy, "style": style, "definitions": definitions_html(), "script": script, "data": _json(page)}
    return _fill(_part("report.html"), parts)


def _part(name: str) -> str:
    return resources.files(__package__).joinpath("page", name).read_text(encoding="utf-8")


def _fill(skeleton: str, parts: dict[str, str]) -> str:
    """Put each part in the place of its name; what stands in a part is never taken for a place."""
    filled, *rest = skeleton.split("{{")
    for piece in rest:
        name, after = piece.split("}}", 1)
        filled += parts[name] + after
    return filled


def _json(page: Page) -> str:
    """Return the data as JSON that no HTML parser takes for markup."""
    text = json.dumps(asdict(page), allow_nan=False, separators=(",", ":"))
    for sign in "<>&":  # U+2028 and U+2029 are escaped already: the JSON is ASCII
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return text


def _digest(content: str) -> str:
    """Return the digest of a script or style, whose tag is followed by a line end, for the page's policy."""
    return "sha256-" + base64.b64encode(hashlib.sha256(f"\n{content}".encode()).digest()).decode()
