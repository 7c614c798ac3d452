"""Which of several processes this one is, and how many threads it should take, by torchrun's environment.

Ranks never talk to each other: each takes the next group of the run that nobody holds (`folder.claimed`). torchrun
sets OMP_NUM_THREADS to 1 where nobody did; how many threads compute decides the last bits of a result, so that is
never taken over, but the cores are shared out and the count is recorded.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from gsae.errors import UsageError
from gsae.store import all_cores


@dataclass(frozen=True)
class Ranks:
    """This is process `rank` of `world_size`, of which `local_world_size` run on this machine, it as `local_rank`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Ranks":
        """Read torchrun's RANK, WORLD_SIZE and their like; one process where they are not set. Raises UsageError."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return cls()
        defaults = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        try:
            found = cls(*(int((defaults | dict(environment))[name]) for name in names))
        except ValueError:
            values = ", ".join(f"{name}={environment.get(name)!r}" for name in names)
            raise UsageError(f"The environment names no rank: {values}.") from None
        if not 0 <= found.rank < found.world_size:
            raise UsageError(f"Rank {found.rank} of {found.world_size}: ranks count from 0 to world size - 1.")
        return found

    @property
    def alone(self) -> bool:
        """Whether there is no other."""
        return self.world_size == 1

    @property
    def threads(self) -> int:
        """This process's share of the cores."""
        return max(1, all_cores() // self.local_world_size)

    def device(self, recorded: str, gpus: int) -> str:
        """The device to compute on: of several GPUs, each rank its own."""
        return f"cuda:{self.local_rank % gpus}" if recorded == "cuda" and gpus > 1 else recorded


ALONE = Ranks()
