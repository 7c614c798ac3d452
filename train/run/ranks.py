"""Which of several processes this one is, from the environment that torchrun sets, and how many threads it uses.

Ranks do not communicate: each takes the next group of the run that no process holds (`folder.claim_group`). The number
of threads decides the last bits of a result. Therefore OMP_NUM_THREADS, which torchrun sets to 1, is not used: the
cores are divided among the ranks of a machine, and the number is recorded.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from gsae.errors import UsageError
from gsae.store import all_cores


@dataclass(frozen=True)
class Ranks:
    """This is process `rank` of `world_size`. On this machine it is `local_rank` of `local_world_size`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> "Ranks":
        """Read RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE; one process without them. Raises UsageError."""
        names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
        if "RANK" not in environment or "WORLD_SIZE" not in environment:
            return cls()
        defaults = {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
        try:
            found = cls(*(int((defaults | dict(environment))[name]) for name in names))
        except ValueError:
            values = ", ".join(f"{name}={environment.get(name)!r}" for name in names)
            raise UsageError(f"The environment does not give a rank: {values}; whole numbers are needed.") from None
        if not 0 <= found.rank < found.world_size:
            raise UsageError(
                f"RANK is {found.rank} and WORLD_SIZE {found.world_size}: ranks count from 0 to WORLD_SIZE - 1."
            )
        return found

    @property
    def alone(self) -> bool:
        """Whether this is the only process."""
        return self.world_size == 1

    @property
    def threads(self) -> int:
        """The number of cores for this process: its share of those of the machine."""
        return max(1, all_cores() // self.local_world_size)

    def device(self, recorded: str, gpus: int) -> str:
        """The device to compute on; with several GPUs, each rank of a machine uses another one."""
        return f"cuda:{self.local_rank % gpus}" if recorded == "cuda" and gpus > 1 else recorded


ALONE = Ranks()
