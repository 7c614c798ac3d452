"""`builtin:pydoc`: the language reference that comes with every Python, as documents without repeated paragraphs.

It needs no network and no file. Making the documents takes some milliseconds.
"""

import hashlib
import re

from gsae.store import DatasetSource

from .document import Document, Text, TextRequest, check_untokenised
from .shuffling import shuffled_ids

FORM = "builtin:pydoc"
REPEATS_OVER = 20
PART_CHARACTERS = 8000


def serves(dataset: str) -> bool:
    """Return whether `dataset` is this text."""
    return dataset == FORM


def open_text(request: TextRequest) -> Text:
    """Return the text. Raises UsageError if token ids are wanted."""
    check_untokenised(request)
    parts = topic_parts()
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()
    seed = request.shuffle_seed
    ids = range(len(parts)) if seed is None else shuffled_ids(len(parts), seed)
    source = DatasetSource(id=FORM, revision=None, split="train", text_field="text", sha256=digest)
    return Text(source, lambda: (Document(id, parts[id]) for id in ids))


def topic_parts() -> list[str]:
    """Return the language reference sorted by topic, with long topics cut into parts.

    Topics repeat each other: they have aliases, and longer ones repeat sections of shorter ones. Taking the longest
    topic first, a paragraph of over 20 characters that was seen before is dropped, so that held-out text is not in
    train. A part is at most 8,000 characters of whole paragraphs (or one longer paragraph). Topics differ a
    hundredfold in length; with parts, a tenth of the documents is about a tenth of the text for every seed.
    """
    from pydoc_data.topics import topics

    seen: set[str] = set()
    kept: dict[str, list[str]] = {}
    for name in sorted(topics, key=lambda name: (-len(topics[name]), name)):
        paragraphs = []
        for paragraph in re.split(r"\n\s*\n", topics[name].strip("\n")):
            words = " ".join(paragraph.split())
            if words in seen:
                continue
            if len(words) > REPEATS_OVER:
                seen.add(words)
            paragraphs.append(paragraph)
        kept[name] = _parts(paragraphs)
    return [part for name in sorted(kept) for part in kept[name] if part.strip()]


def _parts(paragraphs: list[str]) -> list[str]:
    parts: list[str] = []
    for paragraph in paragraphs:
        if parts and len(parts[-1]) + len(paragraph) < PART_CHARACTERS:
            parts[-1] += "\n\n" + paragraph
        else:
            parts.append(paragraph)
    return parts
