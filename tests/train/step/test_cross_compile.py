"""What ptxas makes of every kernel, for GPUs that need not be there: no spilled register, wide loads, no atomics."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest

pytestmark = pytest.mark.slow

MOST_REGISTERS = 128  # so that at least two programs of eight warps fit on a multiprocessor


@pytest.mark.parametrize(("capability", "d_in"), [(80, 4096), (90, 576), (90, 4096), (100, 4096)])
def test_no_kernel_spills_and_all_load_sixteen_bytes_at_once(capability: int, d_in: int) -> None:
    kernels = compiled(capability, d_in)
    assert len(kernels) == 23
    for kernel in kernels:
        assert (kernel["stack"], kernel["spills"], kernel["atomics"]) == (0, 0, 0), kernel
        if kernel["kernel"] == "masked product":
            assert kernel["registers"] <= 255, kernel
            assert kernel["tensor_cores"] >= 4, kernel
            assert (kernel["tile_loads"] > 0) == (capability >= 90), kernel
        else:
            assert kernel["registers"] <= MOST_REGISTERS, kernel
            assert kernel["wide_loads"] >= 1, kernel


def compiled(capability: int, d_in: int) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "gsae.tests.support.cross_compile", str(capability), str(d_in)]
    environment = os.environ | {"TRITON_INTERPRET": "0"}
    found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return [json.loads(line) for line in found.stdout.splitlines()]
