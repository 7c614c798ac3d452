"""What does a checkpoint cost a training run, where the loop waits for it and where a thread writes it meanwhile?

Run as `.venv/bin/python bench/checkpoint.py [--device cuda] [--gigabytes 1]`. A state of that size is saved `--rounds`
times while the loop waits, and as often behind it; a step is a product of matrices. `held`: seconds that the loop is
kept from its next step. `slower`: seconds by which the steps that are taken during the write last longer than without
it. What is wanted is that a checkpoint every ten minutes costs under 1 % in the way that `writes_behind` chooses for
the device.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from gsae.train.run import checkpoint_writer
from gsae.train.run.checkpoint import Checkpoint
from gsae.train.run.checkpoint_writer import CheckpointWriter, Unsaved

TENSOR_BYTES = 64 << 20
MINUTES, MOST = 10.0, 0.01


def main() -> int:
    """Print a line for each way and the verdict; return 0 when it is met."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the state")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk that is measured; default: that of temporary files")
    options = parser.parse_args()
    device, chosen = torch.device(options.device), checkpoint_writer.writes_behind(torch.device(options.device))
    count = max(1, round(options.gigabytes * 1e9 / TENSOR_BYTES))
    state = {f"w{number}": torch.randn(TENSOR_BYTES // 4, device=device) for number in range(count)}
    found = {}
    for behind in (False, True):
        checkpoint_writer.writes_behind = lambda device, behind=behind: behind
        with tempfile.TemporaryDirectory(dir=options.folder) as folder, CheckpointWriter(device) as writer:
            pairs = [measure(writer, Path(folder), state, device) for _ in range(options.rounds)]
        held, slower = (median(column) for column in zip(*pairs, strict=True))
        share = (held + slower) / (60 * MINUTES)
        found[behind] = {"held": held, "slower": slower, "share_of_ten_minutes": share}
        print(json.dumps({"behind": behind, "gigabytes": count * TENSOR_BYTES / 1e9} | found[behind]), flush=True)
    share = found[chosen]["share_of_ten_minutes"]
    print(json.dumps({"bench": "checkpoint", "met": share < MOST, "device": options.device, "behind": chosen}))
    return int(share >= MOST)


def measure(
    writer: CheckpointWriter, folder: Path, state: dict[str, torch.Tensor], device: torch.device
) -> tuple[float, float]:
    """Seconds that the loop is held by a checkpoint, and by which steps during the write are longer."""
    x = torch.randn(1024, 1024, device=device)

    def step() -> None:
        torch.mm(x, x)
        if device.type == "cuda":
            torch.cuda.synchronize()

    started = time.perf_counter()
    with (folder / "metrics.jsonl").open("ab") as metrics:
        begun = timed(lambda: writer.begin(1, [Unsaved(folder, metrics, Checkpoint(1, {}, "", 0, state))]))
        steps = 0
        while writer.written(wait=False) is None:
            step()
            steps += 1
    busy = time.perf_counter() - started - begun
    return begun, max(0.0, busy - timed(lambda: [step() for _ in range(steps)]))


def timed(work: Callable[[], object]) -> float:
    """Seconds of a call."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    raise SystemExit(main())
