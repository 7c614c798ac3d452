"""Fast banks with chosen passes, and steps on random inputs."""

import torch

from gsae.tests.support.params import normal, random_params
from gsae.train.architectures.base import Params
from gsae.train.step.adam import Adam
from gsae.train.step.fast_bank import FastBank
from gsae.train.step.sparse import SparsePasses

BETA2, EPS = 0.999, 1e-8


def unit_params(arch: str, d_in: int, d_sae: int, seed: int, dtype: torch.dtype = torch.float64) -> Params:
    """An SAE as it may look in the middle of training, with decoder rows of unit norm to the last bit of their type."""
    sae = random_params(arch, d_in, d_sae, seed, dtype)
    sae.W_dec.div_(sae.W_dec.norm(dim=1, keepdim=True))
    return sae


def bank_of(start: list[Params], passes: SparsePasses, path: str | None = "sparse") -> FastBank:
    """A bank on the CPU, its inputs centred, with these passes of the sparse step."""
    dtype = start[0].W_dec.dtype
    bank = FastBank(start, torch.linspace(-0.2, 0.3, start[0].W_dec.shape[1], dtype=dtype), dtype, path=path)
    bank.sparse_passes = passes
    return bank


def take_steps(bank: FastBank, steps: range, rows: int = 64) -> None:
    """Take steps of a rate of 1e-3 on random inputs, which follow from the number of the step."""
    lr = torch.full((bank.saes,), 1e-3, dtype=bank.centre.dtype)
    l1 = torch.linspace(0.1, 0.4, bank.saes, dtype=torch.float64)
    for step in steps:
        x = normal(rows, bank.d_in, seed=step).to(bank.centre)
        bank.step(x, l1, Adam(lr, BETA2, EPS, step, row_clip=True))
