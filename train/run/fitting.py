"""Which groups are trained at a time, and how large groups are, so that they fit in memory.

A group that does not fit is cut when a run begins, and the size is recorded (`stack` in `RUN/config.toml`), because the
last bits of an SAE depend on the others of its group. Groups do not depend on one another, so which of them are trained
together is decided anew whenever a process takes some. Training them in parts costs a pass over the rows for each part.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch

from gsae.errors import SpaceError
from gsae.store import Site

from .config import ResolvedRun, ResolvedSAE
from .memory import Memory, available_memory, group_memory, reading_memory
from .ranks import Ranks

ADVICE = "a smaller --batch-size, or --precision bfloat16"
KEPT = "A run keeps these settings: continue it where there is more memory, or begin in another folder."


@dataclass(frozen=True)
class Room:
    """What the groups of a run need, and what is there for them.

    needs: of each group alone, without the rows. reading: of the rows. there: what is available.
    """

    run: ResolvedRun
    groups: tuple[tuple[ResolvedSAE, ...], ...]
    needs: tuple[Memory, ...]
    reading: Memory
    there: Memory

    @classmethod
    def of(cls, site: Site, run: ResolvedRun) -> Self:
        """For the groups of a run, with what is available now."""
        return cls._made(site, run, reading_memory(site, run), available_memory(run.device))

    def cut(self, site: Site, most: int) -> Self:
        """For the same SAEs with at most so many in a group."""
        return self._made(site, self.run.model_copy(update={"stack": most}), self.reading, self.there)

    @classmethod
    def _made(cls, site: Site, run: ResolvedRun, reading: Memory, there: Memory) -> Self:
        groups = run.groups()
        return cls(run, groups, tuple(group_memory(saes, site.d_in, run) for saes in groups), reading, there)

    def need(self, numbers: Sequence[int]) -> Memory:
        """What a process needs that trains some groups at a time."""
        return sum((self.needs[number] for number in numbers), self.reading)

    def fits(self, numbers: Sequence[int]) -> bool:
        """Whether some groups can be trained at a time."""
        return self.need(numbers).within(self.there)

    def parts(self) -> list[list[int]]:
        """All groups, in the parts that a single process trains one after the other."""
        left, parts = list(range(len(self.groups))), []
        while left:
            part: list[int] = []
            for number in left:
                if not part or self.fits([*part, number]):
                    part.append(number)
            parts.append(part)
            left = [number for number in left if number not in part]
        return parts

    def needed(self, ranks: Ranks) -> Memory:
        """The most that is needed at a time: by one process, or by the ranks that share a device and this host."""
        if ranks.alone:
            every = [self.need(part) for part in self.parts()]
            return Memory(max(one.device for one in every), max(one.host for one in every))
        beside, local = _sharing(self.run.device, ranks), ranks.local_world_size
        device = sorted((need.device for need in self.needs), reverse=True)[:beside]
        host = sorted((need.host for need in self.needs), reverse=True)[:local]
        return Memory(sum(device) + beside * self.reading.device, sum(host) + local * self.reading.host)

    def refusal(self, ranks: Ranks) -> str | None:
        """Why the run cannot be trained here, and what to change; None if it can."""
        need = self.needed(ranks)
        if need.within(self.there):
            return None
        on_device = need.device > self.there.device
        wanted, there = (need.device, self.there.device) if on_device else (need.host, self.there.host)
        where = self.run.device if on_device else "host"
        largest = self.groups[max(range(len(self.needs)), key=lambda n: (self.needs[n].device, self.needs[n].host))]
        each = "" if ranks.alone else f" in each of the {ranks.local_world_size} ranks on this machine"
        return (
            f"Training {named(largest)}{each} needs {wanted / 1e9:.1f} GB of memory, and {there / 1e9:.1f} GB are "
            f"available ({where}). {change(len(largest))}"
        )


def _sharing(device: str, ranks: Ranks) -> int:
    """How many ranks of this machine compute on one device (`Ranks.device`)."""
    gpus = torch.cuda.device_count() if device == "cuda" else 1
    return -(-ranks.local_world_size // max(1, gpus))


def named(saes: Sequence[ResolvedSAE]) -> str:
    """A group in words."""
    many = f"a group of {len(saes)} SAEs" if len(saes) > 1 else "one SAE"
    return f"{many} ({saes[0].kind}, {saes[0].d_sae:,} latents)"


def change(saes: int) -> str:
    """What to change where a group of so many SAEs does not fit."""
    fewer = f"fewer SAEs a group (--stack {saes // 2}), " if saes > 1 else "fewer latents, "
    return f"Train with {fewer}{ADVICE}."


def best_room(site: Site, run: ResolvedRun, ranks: Ranks, *, cut: bool) -> Room:
    """For a new run with the largest stacks, at most its own, with which it fits; the smallest if none fit.

    cut: whether stacks may be smaller than those of the run.
    """
    room = Room.of(site, run)
    found = room
    for most in range(run.stack, 0 if cut else run.stack - 1, -1):
        found = room.cut(site, most)
        if found.refusal(ranks) is None:
            break
    return found


def fitted(site: Site, run: ResolvedRun, ranks: Ranks, *, cut: bool) -> ResolvedRun:
    """The run of `best_room`. Raises SpaceError if it does not fit."""
    room = best_room(site, run, ranks, cut=cut)
    refused = room.refusal(ranks)
    if refused is not None:
        raise SpaceError(refused)
    return room.run


def require_room(site: Site, run: ResolvedRun, ranks: Ranks) -> None:
    """Raise SpaceError if a run that was begun cannot be trained here."""
    refused = Room.of(site, run).refusal(ranks)
    if refused is not None:
        raise SpaceError(f"{refused} {KEPT}")
