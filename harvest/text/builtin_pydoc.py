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
    named = (text for part in parts for text in (part.part_of, part.content))
    digest = hashlib.sha256("\0".join(map(str, named)).encode()).hexdigest()
    seed = request.shuffle_seed
    order = range(len(parts)) if seed is None else shuffled_ids(len(parts), seed)
    source = DatasetSource(id=FORM, revision=None, split="train", text_field="text", sha256=digest)
    return Text(source, lambda: (parts[place] for place in order))


def topic_parts() -> list[Document]:
    """Return the language reference sorted by topic, with long topics cut into parts.

    A topic is the document: all its parts have the topic's number, and its name decides their split, because parts of
    one topic are alike. Topics differ a hundredfold in length, so the share of the text that is held out differs from
    seed to seed.

    Topics repeat each other: they have aliases, and longer ones repeat sections of shorter ones. Taking the longest
    topic first, a paragraph of over 20 characters that was seen before is dropped, so that held-out text is not in
    train. A part is at most 8,000 characters of whole paragraphs (or one longer paragraph), so that `--max-documents`
    and `--shuffle-documents` deal with pieces of similar length.
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
    return [
        Document(number, part, part_of=name)
        for number, name in enumerate(sorted(kept))
        for part in kept[name]
        if part.strip()
    ]


def _parts(paragraphs: list[str]) -> list[str]:
    parts: list[str] = []
    for paragraph in paragraphs:
        if parts and len(parts[-1]) + len(paragraph) < PART_CHARACTERS:
            parts[-1] += "\n\n" + paragraph
        else:
            parts.append(paragraph)
    return parts
