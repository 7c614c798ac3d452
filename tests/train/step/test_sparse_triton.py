"""The sparse step of a GPU, interpreted without one: its gates are those of float32, its step that of autograd."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gsae.tests.support.banks import unit_params
from gsae.tests.support.devices import TRITON_DEVICE as DEVICE
from gsae.tests.support.params import gate_of, normal
from gsae.train.architectures.base import Params
from gsae.train.step import sparse, sparse_plain, sparse_triton
from gsae.train.step.adam import Adam
from gsae.train.step.batch_sums import BatchSums
from gsae.train.step.buffers import Buffers
from gsae.train.step.gates_triton import GateLists, Shadow, open_gates
from gsae.train.step.latent_vectors import GatedVectors, ReluVectors
from gsae.train.step.stack import Stack

# In numpy, which interprets the kernels, what overflows or is no number is a warning.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

F32, F64 = torch.float32, torch.float64
CPU = torch.device("cpu")


def stack_of(saes: list[Params], device: torch.device = DEVICE, *, seed: int = 0) -> Stack:
    """SAEs in the middle of a training: with second moments that are up to date since some steps."""
    made = torch.Generator().manual_seed(seed)
    kind = GatedVectors if "b_gate" in saes[0].names() else ReluVectors
    params = {name: torch.stack([getattr(sae, name) for sae in saes]) for name in saes[0].names()}
    moments = {name: 1e-4 * torch.rand(values.shape, generator=made) for name, values in params.items()}
    shape = params["W_dec"].shape[:2]
    stamps = torch.randint(0, 6, shape, generator=made)
    params, moments = ({n: t.clone().to(device) for n, t in some.items()} for some in (params, moments))
    return Stack(kind, params, moments, {}, torch.zeros(shape, dtype=torch.int64, device=device), stamps.to(device))


def some_saes(arch: str, saes: int, d_sae: int, d_in: int, bias: float) -> list[Params]:
    made = [unit_params(arch, d_in, d_sae, seed, F32) for seed in range(saes)]
    for sae in made:
        gate_of(sae).add_(bias)
    return made


def gates(
    stack: Stack, x: Tensor, offset: Tensor, limit: int, *, fused: bool = False
) -> tuple[GateLists, Shadow, Buffers]:
    shadow, buffers = Shadow.empty_like(stack.params["W_enc"]), Buffers(DEVICE)
    shadow.follow(stack.params["W_enc"])
    lists = open_gates(stack, x, offset, shadow, stack.vectors().gate, limit, buffers, fused=fused)
    return lists, shadow, buffers


def by_latent(lists: GateLists, rows: int) -> set[tuple[int, int]]:
    """(row, latent) of every entry, both counted through all SAEs, after a look at the order of both lists."""
    total = int(lists.latent_starts[-1])
    row, latent = lists.rows[:total].cpu(), lists.latents[:total].cpu()
    order = latent.long() * rows + row
    assert torch.equal(order, order.sort()[0])
    counts = torch.bincount(latent, minlength=len(lists.latent_starts) - 1)
    assert torch.equal(lists.latent_starts.cpu().diff(), counts)
    entries = lists.entries[:total].cpu().long()
    assert torch.equal(entries, torch.sort(row, stable=True)[1])
    assert torch.equal(lists.row_starts.cpu().diff(), torch.bincount(row, minlength=len(lists.row_starts) - 1))
    return set(zip(row.tolist(), latent.tolist(), strict=True))


@pytest.mark.parametrize("rows", [1, 31, 33, 70])
@pytest.mark.parametrize(("bias", "fused"), [(-30.0, False), (-1.0, False), (0.2, False), (-1.0, True)])
def test_the_open_gates_are_those_of_float32(rows: int, bias: float, fused: bool) -> None:
    saes, d_sae, d_in = 2, 13, 24
    stack = stack_of(some_saes("gated", saes, d_sae, d_in, bias))
    x, offset = normal(rows, d_in, seed=rows).float().to(DEVICE), 0.1 * normal(saes, d_in).float().to(DEVICE)
    stack.params["b_gate"][0, 0] = 100  # always open
    lists, _, _ = gates(stack, x, offset, rows * d_sae, fused=fused)
    found = by_latent(lists, saes * rows)
    assert not lists.overflown.any()
    pre = torch.einsum("srd,sfd->srf", x - offset[:, None], stack.params["W_enc"]).double()
    above = pre + stack.params["b_gate"][:, None].double()
    assert float(above.abs().min()) > 1e-5  # so that rounding decides nothing here
    sae, row, latent = (above > 0).nonzero().T.cpu()
    assert found == set(zip((sae * rows + row).tolist(), (sae * d_sae + latent).tolist(), strict=True))
    total = int(lists.latent_starts[-1])
    at = lists.rows[:total].long(), lists.latents[:total].long()
    expected = pre[at[0] // rows, at[0] % rows, at[1] % d_sae]
    torch.testing.assert_close(lists.values[:total].double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fused", [False, True])
def test_no_gate_is_missed_whose_bfloat16_product_is_wrong(fused: bool) -> None:
    # Every bias puts its gate a hair above 0 on one row: a product in bfloat16 alone would miss half of them.
    rows, d_sae, d_in = 40, 40, 64
    stack = stack_of(some_saes("gated", 1, d_sae, d_in, 0.0))
    x, offset = normal(rows, d_in, seed=5).float().to(DEVICE), torch.zeros(1, d_in, device=DEVICE)
    pre = (x.double() @ stack.params["W_enc"][0].double().T)[range(rows), range(d_sae)]
    stack.params["b_gate"][0] = (1e-4 - pre).float()
    low = (x.bfloat16().double() @ stack.params["W_enc"][0].bfloat16().double().T)[range(rows), range(d_sae)]
    assert (low + stack.params["b_gate"][0] <= 0).sum() > 10
    found = by_latent(gates(stack, x, offset, rows * d_sae, fused=fused)[0], rows)
    assert all((n, n) in found for n in range(d_sae))


@pytest.mark.parametrize(("limit", "overflown"), [(5, [True, False]), (40, [False, False])])
def test_a_list_that_overflows_is_noticed(limit: int, overflown: list[bool]) -> None:
    stack = stack_of(some_saes("gated", 2, 6, 8, -50.0))
    stack.params["b_gate"][0, 3] = 100  # the 33 gates of one latent of the first SAE
    x, offset = normal(33, 8).float().to(DEVICE), torch.zeros(2, 8, device=DEVICE)
    assert gates(stack, x, offset, limit)[0].overflown.tolist() == overflown


def both_steps(stack: Stack, x: Tensor, centre: Tensor, l1: Tensor, adam: Adam) -> tuple[Stack, BatchSums, BatchSums]:
    """Take the step of `stack` on the device; return a copy that took the plain step on the CPU, and both sums."""
    params, moments = ({n: t.cpu().clone() for n, t in kind.items()} for kind in (stack.params, stack.moments))
    here = Stack(stack.kind, params, moments, {}, stack.born.cpu().clone(), stack.stamps.cpu().clone())
    saes, many = len(l1), x.shape[0] * stack.born.shape[1]
    expected = BatchSums.unknown(saes, stack.born.shape[1], CPU)
    for sae in range(saes):
        own = replace(adam, lr=adam.lr[sae].cpu())
        taken = sparse.step(
            here[sae], x.cpu(), centre.cpu(), float(l1[sae]), own, many, sparse_plain, None, Buffers(CPU)
        )
        assert taken is not None
        expected.put(sae, taken)
    offset = stack.params["b_dec"] - centre
    lists, shadow, buffers = gates(stack, x, offset, many)
    batch = sparse_triton.step(stack, x, centre, l1, adam, lists, shadow, buffers)
    fresh = Shadow.empty_like(shadow.by_norm[..., None].expand_as(shadow.W_enc).float())
    fresh.follow(stack.params["W_enc"])
    assert all(torch.equal(a, b) for a, b in zip(vars(shadow).values(), vars(fresh).values(), strict=True))
    return here, batch, expected


def assert_same(stack: Stack, here: Stack, batch: BatchSums, expected: BatchSums) -> None:
    """Compare as wholes, because single gradients may cancel to nothing."""
    for name, values in here.params.items():
        for own, other in ((stack.params[name], values), (stack.moments[name], here.moments[name])):
            assert (own.cpu() - other).norm() <= 1e-5 * other.norm(), name
    assert torch.equal(stack.stamps.cpu(), here.stamps)
    for name, sums in vars(expected).items():
        torch.testing.assert_close(getattr(batch, name).cpu(), sums, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("arch", ["gated", "relu"])
@pytest.mark.parametrize("row_clip", [True, False])
def test_a_step_equals_the_plain_one(arch: str, row_clip: bool) -> None:
    # Empty rows, dead latents, one latent that is always open and one row with every gate open.
    stack = stack_of(some_saes(arch, 2, 13, 20, -1.5))
    x, centre = normal(34, 20, seed=2).float().to(DEVICE), torch.linspace(-0.2, 0.3, 20, device=DEVICE)
    stack.vectors().gate[:, :3] = -100
    stack.vectors().gate[0, 5] = 100
    x[7] = 300 * torch.nn.functional.normalize(stack.params["W_enc"][1].sum(0), dim=0)
    x[8] = 0
    l1 = torch.tensor([0.1, 0.4], dtype=F64, device=DEVICE)
    adam = Adam(torch.tensor([1e-3, 3e-3], device=DEVICE), 0.999, 1e-8, 7, row_clip)
    assert_same(stack, *both_steps(stack, x, centre, l1, adam))


def test_a_hot_latent_is_added_up_in_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_triton, "SEGMENT", 16)
    stack = stack_of(some_saes("gated", 2, 9, 12, -1.5))
    stack.params["b_gate"][0, 4] = stack.params["b_gate"][1, 8] = 100
    x, centre = normal(50, 12, seed=3).float().to(DEVICE), torch.zeros(12, device=DEVICE)
    l1, adam = (
        torch.full((2,), 0.2, dtype=F64, device=DEVICE),
        Adam(torch.full((2,), 1e-3, device=DEVICE), 0.999, 1e-8, 9, True),
    )
    assert_same(stack, *both_steps(stack, x, centre, l1, adam))


@pytest.mark.parametrize("planted", [float("nan"), 3e19])  # of the second, squares overflow
def test_what_is_not_finite_stops_its_sae_and_no_other(planted: float) -> None:
    stack = stack_of(some_saes("gated", 2, 7, 10, -0.5))
    before = {name: values.clone() for name, values in stack.params.items()}
    stack.params["b_mag"][1, 2] = planted
    stack.params["b_gate"][1, 2] = 100
    before["b_mag"][1, 2], before["b_gate"][1, 2] = planted, 100
    x, centre = normal(20, 10, seed=3).float().to(DEVICE), torch.zeros(10, device=DEVICE)
    l1, adam = (
        torch.full((2,), 0.2, dtype=F64, device=DEVICE),
        Adam(torch.full((2,), 1e-3, device=DEVICE), 0.999, 1e-8, 9, True),
    )
    here, batch, expected = both_steps(stack, x, centre, l1, adam)
    assert_same(replace_one(stack, 0), replace_one(here, 0), some(batch, 0), some(expected, 0))
    if planted != planted:
        assert not torch.isfinite(batch.squared_error[1])
        for name, values in before.items():
            torch.testing.assert_close(stack.params[name][1], values[1], equal_nan=True, rtol=0, atol=0)
            assert not torch.equal(stack.params[name][0], values[0])


def replace_one(stack: Stack, sae: int) -> Stack:
    return stack[slice(sae, sae + 1)]


def some(batch: BatchSums, sae: int) -> BatchSums:
    return BatchSums(**{name: values[sae : sae + 1] for name, values in vars(batch).items()})


def test_capacities_follow_from_the_limit_alone() -> None:
    stack = stack_of(some_saes("gated", 2, 6, 8, -50.0))
    x, offset = normal(33, 8).float().to(DEVICE), torch.zeros(2, 8, device=DEVICE)
    lists, _, _ = gates(stack, x, offset, 11)
    assert len(lists.values) == len(lists.entries) == 2 * 11
