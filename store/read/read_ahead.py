"""A thread that decodes mixes into slots of batches, as far ahead of the consumer as there are free slots.

A mix is placed directly behind the rows of the one before, so a batch may hold rows of both, and no row is copied to
be in its batch. The price is that slots are handed out in the order in which they are filled.
"""

import threading
from collections.abc import Iterator
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np

from .batch_memory import SlotsClosed
from .decoding import Decoder, MixDecoding
from .read_order import Position, check_position, mixes
from .reading import Reading


@dataclass(frozen=True)
class PlacedMix:
    """A mix that is being decoded into `slots`, from row `start` of the first one on."""

    decoding: MixDecoding
    start: int
    slots: list[int]

    def full_slots(self, rows: int, batch_rows: int) -> int:
        """Return how many of the slots are full when the mix has `rows` rows."""
        return (self.start + rows) // batch_rows

    def unfilled(self, rows: int, batch_rows: int) -> tuple[int, list[int]]:
        """Return the rows in the slot that the mix leaves partly filled, and that slot: [] if all are full."""
        full, rest = divmod(self.start + rows, batch_rows)
        return rest, self.slots[full : full + 1] if rest else []


class ReadAhead:
    """Decodes mixes from a position on; iterate to take them. Raises what reading raised."""

    def __init__(self, reading: Reading, position: Position | None) -> None:
        """Start the thread.

        The first mix may begin before the position. It is placed so that the first batch to hand out begins a slot.
        """
        self._placed: SimpleQueue[PlacedMix | BaseException | None] = SimpleQueue()
        self.slots = reading.take_slots()
        self._batch_rows = reading.batch_rows
        self._start = -(position or {}).get("offset", 0) % reading.batch_rows
        chunks, options = [file.chunks for file in reading.files], reading.options
        self._coming = mixes(chunks, options.shuffle, options.epochs, check_position(position))
        self._decoder = Decoder(reading)
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="gsae-read", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[PlacedMix]:
        while True:
            self.slots.release()  # the next mix may need the slots that came back
            placed = self._placed.get()
            if placed is None:
                return
            if isinstance(placed, BaseException):
                raise placed
            yield placed

    def stop(self) -> None:
        """Let the thread end soon; `join` waits for it."""
        self._stopping = True
        self.slots.close()

    def join(self) -> None:
        """Wait for the end of the thread; all files are closed then."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._place_all()
            self._placed.put(None)
        except SlotsClosed:
            self._placed.put(None)
        except BaseException as error:
            self._placed.put(error)
        finally:
            self._decoder.close(cancel=self._stopping)

    def _place_all(self) -> None:
        start, held = self._start, [self.slots.take()]
        last: PlacedMix | None = None
        for mix in self._coming:
            opened = self._decoder.open(mix)
            if last is not None:
                start, held = last.unfilled(self._known_rows(last.decoding), self._batch_rows)
            rows = len(opened.places)
            more = -(-(start + rows) // self._batch_rows) - len(held)
            slots = held + [self.slots.take() for _ in range(more)]
            places = np.array(slots)[:, None] * self._batch_rows + np.arange(self._batch_rows)
            at = places.reshape(-1)[start : start + rows]
            if self._stopping:
                raise SlotsClosed
            last = PlacedMix(self._decoder.start(opened, self.slots.rows, at), start, slots)
            for slot in slots[len(held) :]:
                self.slots.prepare(slot)
            self._placed.put(last)

    def _known_rows(self, decoding: MixDecoding) -> int:
        """Return the kept rows of a mix; only if rows are left out, this waits for its end."""
        return decoding.rows if self._decoder.limit is None else decoding.settle()
