"""Several texts as one: their documents interleaved by weights, the same way at each reading.

The next document is that of the text that is furthest behind its share; of equal ones, the first text. When a text
ends, the others go on. With n texts, document d of text t has the number d * n + t. One file of each text is open.
"""

import hashlib
from collections.abc import Iterator, Sequence
from itertools import groupby

from gsae.store import DatasetSource

from .document import Document, Text


def mix(texts: Sequence[Text], weights: Sequence[float]) -> Text:
    """Return the texts as one; weights: how many documents of each stand to those of the others."""
    sources = tuple(text.source for text in texts)
    identities = zip(sources, weights, strict=True)
    named = "".join(f"{source.sha256 or source.revision}  {weight!r}  {source.id}\n" for source, weight in identities)
    whole = DatasetSource(
        id=" + ".join(source.id for source in sources),
        revision=None,
        split=sources[0].split,
        text_field=sources[0].text_field,
        sha256=hashlib.sha256(named.encode()).hexdigest(),
        mixed=sources,
        weights=tuple(weights),
    )
    return Text(whole, lambda: _interleaved(texts, weights))


def _interleaved(texts: Sequence[Text], weights: Sequence[float]) -> Iterator[Document]:
    streams = [groupby(text.read(), key=lambda document: document.id) for text in texts]
    taken, going = [0] * len(texts), list(range(len(texts)))
    while going:
        turn = min(going, key=lambda number: (taken[number] + 1) / weights[number])
        following = next(streams[turn], None)
        if following is None:
            going.remove(turn)
            continue
        for part in following[1]:
            yield part._replace(id=part.id * len(texts) + turn)
        taken[turn] += 1
