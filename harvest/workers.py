"""Which windows of a harvest this process makes: from its options, or from the variables of torchrun or SLURM.

Workers exchange no messages. Each makes the same plan, takes every world_size-th window, and publishes what it has. The
worker that finds nothing missing at its end publishes the manifest. If a worker dies, run it again, or run one worker
alone to make what is missing.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from gsae.errors import UsageError


@dataclass(frozen=True)
class Worker:
    """Worker `rank` of `world_size`. local_rank: its number on its machine, which selects its GPU."""

    rank: int = 0
    world_size: int = 1
    local_rank: int | None = None

    def makes(self, number: int) -> bool:
        """Return whether this worker makes window `number`, counted in the order of work."""
        return number % self.world_size == self.rank


ALONE = Worker()


def worker(rank: int | None, world_size: int | None, environment: Mapping[str, str]) -> Worker:
    """Return which worker this process is.

    rank, world_size: both given, or both None. If None, torchrun's RANK and WORLD_SIZE are used, then SLURM's tasks and
    array: task p of n in element i of an array of m is worker i * n + p of m * n. Raises UsageError if only one is
    given, or if the numbers do not fit together.
    """
    if (rank is None) != (world_size is None):
        raise UsageError("--rank and --world-size belong together: give both.")
    if rank is not None and world_size is not None:
        found = Worker(rank, world_size)
    elif "RANK" in environment and "WORLD_SIZE" in environment:
        number, count = _numbers(environment, "RANK", "WORLD_SIZE")
        found = Worker(number, count, _local_rank(environment, "LOCAL_RANK"))
    else:
        found = _slurm(environment)
    if not 0 <= found.rank < found.world_size:
        raise UsageError(f"Rank {found.rank} of {found.world_size}: ranks count from 0 to world size - 1.")
    return found


def device_of(device: str, worker: Worker, gpus: int) -> str:
    """Return the device that a worker uses: one GPU each for `cuda` and `auto` on a machine with several GPUs."""
    if device in ("cuda", "auto") and gpus > 1 and worker.local_rank is not None:
        return f"cuda:{worker.local_rank % gpus}"
    return device


def _slurm(environment: Mapping[str, str]) -> Worker:
    element, elements, task, tasks = 0, 1, 0, 1
    if "SLURM_ARRAY_TASK_ID" in environment:
        number, first, elements = _numbers(
            environment, "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MIN", "SLURM_ARRAY_TASK_COUNT"
        )
        step = int(environment.get("SLURM_ARRAY_TASK_STEP") or 1)
        element = (number - first) // step
    if "SLURM_STEP_NUM_TASKS" in environment:  # only srun sets it; a batch script is one process whatever its ntasks
        task, tasks = _numbers(environment, "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    return Worker(element * tasks + task, elements * tasks, _local_rank(environment, "SLURM_LOCALID"))


def _local_rank(environment: Mapping[str, str], name: str) -> int | None:
    return _numbers(environment, name)[0] if name in environment else None


def _numbers(environment: Mapping[str, str], *names: str) -> tuple[int, ...]:
    try:
        return tuple(int(environment[name]) for name in names)
    except (KeyError, ValueError):
        values = ", ".join(f"{name}={environment.get(name)!r}" for name in names)
        raise UsageError(
            f"Cannot number the workers from the environment: {values}. Give --rank and --world-size."
        ) from None
