"""Which windows of a harvest this process makes: asked for, or as torchrun or SLURM numbered it.

Workers never talk to each other. Every one makes the same plan, takes each world_size-th window, and publishes what
it has; whoever finds at its end that nothing is missing publishes the manifest. A worker that died is made good by
running it again, or by one run alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from gsae.errors import UsageError


@dataclass(frozen=True)
class Worker:
    """Number `rank` of `world_size` workers; local_rank: its number on its machine, which chooses its GPU."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None

    def takes(self, number: int) -> bool:
        """Whether window `number`, counted in the order of work, is this worker's."""
        return number % self.world_size == self.rank


ALONE = Worker()


def worker(rank: int | None, world_size: int | None, environment: Mapping[str, str]) -> Worker:
    """Return who this process is.

    rank, world_size: as asked for, both or neither. Otherwise torchrun's RANK and WORLD_SIZE count, or SLURM's tasks
    and array: task p of n in element i of an array of m is number i * n + p of m * n. Raises UsageError for numbers
    that do not fit together.
    """
    if (rank is None) != (world_size is None):
        raise UsageError("--rank and --world-size belong together: give both.")
    if rank is not None and world_size is not None:
        found = Worker(rank, world_size)
    elif "RANK" in environment and "WORLD_SIZE" in environment:
        number, count = _numbers(environment, "RANK", "WORLD_SIZE")
        found = Worker(number, count, _local(environment, "LOCAL_RANK"))
    else:
        found = _slurm(environment)
    if not 0 <= found.rank < found.world_size:
        raise UsageError(f"Rank {found.rank} of {found.world_size}: ranks count from 0 to world size - 1.")
    return found


def device_of(device: str, own: Worker, gpus: int) -> str:
    """Return the device that a worker uses: `cuda` and `auto` become its own GPU where the machine has several."""
    if device in ("cuda", "auto") and gpus > 1 and own.local_rank is not None:
        return f"cuda:{own.local_rank % gpus}"
    return device


def _slurm(environment: Mapping[str, str]) -> Worker:
    element, elements, task, tasks = 0, 1, 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        number, first, elements = _numbers(
            environment, "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT"
        )
        step = int(environment.get("SLURM_ARRAY_TASK_STEP") or 1)
        element = (number - first) // step
    if "SLURM_STEP_NUM_TASKS" in environment:  # set by srun alone: a batch script is one process, whatever its ntasks
        task, tasks = _numbers(environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    return Worker(element * tasks + task, elements * tasks, _local(environment, "SLURM_LOCALID"))


def _local(environment: Mapping[str, str], name: str) -> int | None:
    return _numbers(environment, name)[0] if name in environment else None


def _numbers(environment: Mapping[str, str], *names: str) -> tuple[int, ...]:
    try:
        return tuple(int(environment[name]) for name in names)
    except (KeyError, ValueError):
        values = ", ".join(f"{name}={environment.get(name)!r}" for name in names)
        raise UsageError(f"The environment names no worker: {values}. Use --rank and --world-size.") from None
