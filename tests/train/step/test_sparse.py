"""The sparse step against autograd through the formulas, against the dense step, and its optimiser against torch's."""

import itertools
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gsae.tests.support.banks import bank_of, take_steps
from gsae.tests.support.banks import unit_params as random_params
from gsae.tests.support.params import gate_of, normal
from gsae.tests.support.row_clip import step_with_row_clip
from gsae.tests.support.selection import mostly_slow
from gsae.train.architectures.base import Params
from gsae.train.step import sparse_numba, sparse_plain
from gsae.train.step.adam import Adam
from gsae.train.step.buffers import Buffers
from gsae.train.step.compiling import kernel_threads
from gsae.train.step.fast_bank import FastBank
from gsae.train.step.gate_lists import Derivatives, GatesByLatent

F32, F64 = torch.float32, torch.float64
PASSES = [sparse_plain, sparse_numba]


def after_one_step(sae: Params, z: Tensor, l1: float, adam: Adam) -> tuple[dict[str, Tensor], Tensor]:
    """The parameters after one step of Adam without first moment, from autograd in float64; and the loss."""
    leaves = {name: getattr(sae, name).double().requires_grad_() for name in sae.names()}
    loss = type(sae)(**leaves).loss(z.double(), l1)
    moved = {}
    for name, g in zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True):
        p = leaves[name].detach()
        if name == "W_dec":
            g = g - (g * p).sum(1, keepdim=True) * p
        p = p - float(adam.lr[0]) * g / (g.abs() + adam.eps)
        moved[name] = p / p.norm(dim=1, keepdim=True) if name == "W_dec" else p
    return moved, loss.detach()


def assert_step_equals_autograd(sae: Params, z: Tensor, passes: ModuleType, within: float) -> None:
    # A large eps makes the step a smooth function of the gradient, of the same size.
    adam = Adam(torch.tensor([0.5], dtype=z.dtype), 0.999, 1.0, 1, False)
    bank = bank_of([sae], passes)
    batch = bank.step(z - bank.centre, torch.tensor([0.3], dtype=F64), adam)
    expected, loss = after_one_step(sae, z, 0.3, adam)
    own = bank.one(0)
    size = torch.cat([(expected[name] - getattr(sae, name)).flatten() for name in expected]).norm()
    for name, values in expected.items():
        assert (getattr(own, name).double() - values).norm() <= within * size, name
    assert abs(batch.loss(torch.tensor([0.3], dtype=F64))[0] / len(z) - loss) <= within * loss


@pytest.mark.parametrize("arch", mostly_slow(["gated", "relu"], "gated"))
@pytest.mark.parametrize("passes", PASSES)
@settings(deadline=None, max_examples=40)
@given(
    rows=st.sampled_from([1, 2, 17, 70]),
    d_in=st.integers(1, 40),
    d_sae=st.sampled_from([1, 3, 7, 63, 64, 65, 130]),
    bias=st.sampled_from([-9.0, -1.0, 0.0, 9.0]),
    full_row=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_a_step_equals_autograds_in_float64(
    arch: str, passes: ModuleType, rows: int, d_in: int, d_sae: int, bias: float, full_row: bool, seed: int
) -> None:
    # A bias of -9 shuts every gate (dead latents, empty rows), 9 opens all; one long row may open every gate.
    sae = random_params(arch, d_in, d_sae, seed)
    gate_of(sae)[::2] += bias
    z = normal(rows, d_in, seed=seed)
    if full_row:
        sae.W_enc.abs_()
        z[rows // 2] = 1000.0
    assert_step_equals_autograd(sae, z, passes, 1e-12)


@pytest.mark.parametrize("arch", ["gated", "relu"])
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize(("rows", "d_in", "d_sae"), [(1, 3, 5), (50, 19, 37), (129, 100, 200)])
def test_a_step_equals_autograds_in_float32(arch: str, passes: ModuleType, rows: int, d_in: int, d_sae: int) -> None:
    assert_step_equals_autograd(
        random_params(arch, d_in, d_sae, 5, F32), normal(rows, d_in, seed=1).float(), passes, 1e-5
    )


@pytest.mark.parametrize("arch", mostly_slow(["gated", "relu"], "gated"))
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("row_clip", mostly_slow([False, True], True))
def test_two_hundred_lazy_steps_equal_torchs_adam(arch: str, passes: ModuleType, row_clip: bool) -> None:
    rows, d_sae, d_in, lr = 23, 19, 11, 3e-3
    sae = random_params(arch, d_in, d_sae, 0)
    bank, buffers = bank_of([sae], passes), Buffers(torch.device("cpu"))
    one, vectors = bank.stack[0], sae.names()[3:]
    theirs = {name: tensor.clone() for name, tensor in one.params.items() if name != "b_dec"}
    oracle, bounded = torch.optim.Adam(theirs.values(), lr=lr, betas=(0.0, 0.999), eps=1e-8), 0
    for step in range(1, 201):
        # A latent is touched every few steps, some not for a hundred.
        chance = torch.linspace(0.0005, 0.1, d_sae)
        touched = torch.rand(d_sae, rows, generator=torch.Generator().manual_seed(step)) < chance[:, None]
        count = int(touched.sum())
        records, errors, x = (
            normal(*s, seed=7 * step + i) for i, s in enumerate(((count, 4), (rows, d_in), (rows, d_in)))
        )
        records[:, 0].relu_()
        records[:, 1] *= (records[:, 0] > 0) * (arch == "gated")
        starts = torch.cat([torch.zeros(1, dtype=torch.int64), touched.sum(1).cumsum(0)])
        shuffled = torch.randperm(count, generator=torch.Generator().manual_seed(step))
        latent, row = touched.nonzero().unbind(1)
        # `records` are in the order of rows, here any other order than that of the list.
        listed = GatesByLatent(starts, torch.empty_like(shuffled).index_copy_(0, torch.arange(count), shuffled), row)
        f, by_mag, by_gate, a = records[shuffled].unbind(1)
        rate = theirs["r_mag"].exp()[latent] if arch == "gated" else torch.zeros_like(f)
        da = rate * by_mag + by_gate
        assert sum(vectors.count(name) for name in theirs) == len(vectors)
        dense = {"W_enc": da[:, None] * x[row], "W_dec": f[:, None] * errors[row]}
        dense |= dict(zip(vectors, (by_gate, by_mag, by_mag * rate * a), strict=False))
        for name, values in dense.items():
            g = torch.zeros_like(theirs[name]).index_add_(0, latent, values)
            along = (g * theirs["W_dec"]).sum(1, keepdim=True) if name == "W_dec" else 0
            theirs[name].grad = g - along * theirs["W_dec"] if name == "W_dec" else g
        through = da @ theirs["W_enc"][latent]
        if row_clip:
            bounded += step_with_row_clip(oracle, theirs, lr)
        else:
            oracle.step()
        theirs["W_dec"] /= theirs["W_dec"].norm(dim=1, keepdim=True)

        fired = torch.zeros(d_sae, dtype=torch.int32)
        if passes is not sparse_plain:
            listed = GatesByLatent(starts, listed.entries.int(), listed.rows.int())
        what = Derivatives(errors, records, errors.sum(0), torch.zeros(6, dtype=F64))
        adam = Adam(torch.tensor(lr, dtype=F64), 0.999, 1e-8, step, row_clip)
        own_through, finite = passes.latents_pass(listed, what, x, one, adam, fired, buffers)
        assert finite
        torch.testing.assert_close(own_through, through, rtol=1e-11, atol=1e-11)
        assert torch.equal(fired, torch.zeros(d_sae).index_add_(0, latent, (f > 0).float()).int())
    assert not row_clip or bounded > 300
    for name, expected in theirs.items():
        assert (one.params[name] - expected).norm() <= 1e-12 * expected.norm(), name


@pytest.mark.slow
@pytest.mark.parametrize("arch", ["gated", "relu"])
@pytest.mark.parametrize("passes", PASSES)
def test_sparse_and_dense_trainings_end_in_the_same_weights(arch: str, passes: ModuleType) -> None:
    start = [random_params(arch, 12, 70, i) for i in range(3)]
    for sae in start:
        gate_of(sae).sub_(6)  # few gates are open, and some latents are rarely touched
    banks = [bank_of(start, passes, path) for path in ("sparse", "dense")]
    for bank in banks:
        take_steps(bank, range(1, 61))
    assert banks[0].stamps.min() < 60
    for name, expected in banks[1].params.items():
        assert (banks[0].params[name] - expected).norm() <= 1e-10 * expected.norm(), name


@pytest.mark.parametrize("passes", PASSES)
def test_an_sae_changes_to_the_sparse_path_and_back_with_its_density(passes: ModuleType) -> None:
    start = [random_params("gated", 12, 200, i) for i in range(2)]
    start[1].b_gate.sub_(8)
    bank, twin = (bank_of(start, passes, path) for path in (None, "dense"))
    assert bank.paths == ("dense", "dense")
    take_steps(bank, range(1, 10))
    assert bank.paths == ("dense", "sparse")
    take_steps(twin, range(1, 10))
    for one in (bank, twin):
        one.params["b_gate"][1] += 20  # every gate is open
        take_steps(one, range(10, 12))
    assert bank.paths == ("dense", "dense")
    for name, tensor in bank.state().items():
        if tensor.is_floating_point():
            torch.testing.assert_close(tensor, twin.state()[name], rtol=1e-9, atol=1e-12)
    assert torch.equal(bank.stamps, twin.stamps)


@pytest.mark.parametrize("passes", PASSES)
def test_a_restored_bank_continues_to_the_same_bits(passes: ModuleType) -> None:
    def fresh() -> FastBank:
        start = [random_params("gated", 12, 70, i, F32) for i in range(2)]
        for sae in start:
            sae.b_gate.sub_(6)
        return bank_of(start, passes, None)

    whole, first, second = fresh(), fresh(), fresh()
    take_steps(whole, range(1, 31))
    take_steps(first, range(1, 13))
    second.restore({name: tensor.clone() for name, tensor in first.state().items()})
    take_steps(second, range(13, 31))
    assert second.paths == ("sparse", "sparse")
    for name, tensor in whole.state().items():
        assert torch.equal(tensor, second.state()[name]), name


def test_the_number_of_threads_changes_no_bit_of_the_compiled_passes() -> None:
    states = []
    for count in (1, 2):
        bank = bank_of([random_params("gated", 40, 300, 1, F32)], sparse_numba)
        with kernel_threads(count):
            take_steps(bank, range(1, 6), rows=200)
        states.append(bank.state())
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name


@pytest.mark.parametrize("arch", mostly_slow(["gated", "relu"], "gated"))
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("path", ["dense", "sparse"])
def test_reset_latents_take_a_first_step_of_the_learning_rate(arch: str, passes: ModuleType, path: str) -> None:
    bank = bank_of([random_params(arch, 8, 30, i) for i in range(2)], passes, path)
    take_steps(bank, range(1, 50))
    latents = torch.tensor([3, 17])
    bank.params["W_enc"][1, latents] = 0.5
    bank.reset(1, latents)
    before = {name: tensor.clone() for name, tensor in bank.params.items()}
    take_steps(bank, range(50, 51))
    moved = (bank.params["W_enc"] - before["W_enc"]).abs()[1, latents]
    # Adam's first step is the rate in every component; a global step count would make it 31 times that at v = 0.
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-3), rtol=1e-3, atol=0)


@pytest.mark.parametrize("arch", mostly_slow(["gated", "relu"], "gated"))
@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("path", ["dense", "sparse", None])
@pytest.mark.parametrize("name", ["W_enc", "W_dec", "b_dec", "bias"])
def test_a_nan_stops_its_own_sae_alone(arch: str, passes: ModuleType, path: str | None, name: str) -> None:
    start = [random_params(arch, 8, 100, i, F32) for i in range(3)]
    for sae in start:
        gate_of(sae).sub_(4)
    bank = bank_of(start, passes, path)
    take_steps(bank, range(1, 4))
    bank.params[start[0].GATE if name == "bias" else name][1].view(-1)[3] = float("nan")
    before = {key: tensor.clone() for key, tensor in bank.state().items()}
    lr, l1 = torch.full((3,), 1e-3), torch.full((3,), 0.1, dtype=F64)
    lr[2] = 0
    x = normal(64, 8, seed=9).float()
    if name == "W_dec":
        x[0] = 30 * before["W_enc"][1, 0]  # so that its latent is open
    batch = bank.step(x, l1, Adam(lr, 0.999, 1e-8, 4, False))
    assert batch.loss(l1)[0].isfinite()
    assert not batch.loss(l1)[1].isfinite()
    for key, tensor in before.items():
        now = bank.state()[key]
        if key in ("steps", "sparse", "stamps") or key.endswith("second_moment"):
            continue
        assert torch.equal(now[1:].nan_to_num(7), tensor[1:].nan_to_num(7)), key
        if key != "born":
            assert not torch.equal(now[0], tensor[0]), key


@pytest.mark.parametrize("passes", PASSES)
@pytest.mark.parametrize("path", ["dense", "sparse"])
@pytest.mark.parametrize("row_clip", [False, True])
def test_an_infinite_gradient_of_a_finite_loss_stops_its_own_sae_and_writes_no_nan(
    passes: ModuleType, path: str, row_clip: bool
) -> None:
    start = [random_params("gated", 8, 40, i, F32) for i in range(2)]
    bank = bank_of(start, passes, path)
    take_steps(bank, range(1, 4))
    # exp(88) is finite and f is 0, but the derivative by r_mag and its square are not.
    r_mag, b_mag = bank.params["r_mag"], bank.params["b_mag"]  # type: ignore[index]
    r_mag[1, 5], b_mag[1, 5] = 60.0, 1.0
    bank.params["W_enc"][1, 5] *= 1e-20
    bank.params["b_gate"][1, 5] = 1.0
    before = {key: tensor.clone() for key, tensor in bank.params.items()}
    lr, l1 = torch.full((2,), 1e-3), torch.full((2,), 0.1, dtype=F64)
    batch = bank.step(normal(64, 8, seed=9).float(), l1, Adam(lr, 0.999, 1e-8, 4, row_clip))
    assert batch.loss(l1).isfinite().tolist() == [True, False]
    for name, tensor in bank.params.items():
        assert tensor.isfinite().all(), name
        assert not torch.equal(tensor[0], before[name][0]), name


def test_batch_sums_of_both_paths_agree() -> None:
    for arch, passes in itertools.product(("gated", "relu"), PASSES):
        start = [random_params(arch, 12, 70, i) for i in range(2)]
        l1, lr = torch.tensor([0.1, 0.2], dtype=F64), torch.full((2,), 1e-3, dtype=F64)
        own, expected = (
            bank_of(start, passes, path).step(normal(33, 12, seed=4), l1, Adam(lr, 0.999, 1e-8, 1, False))
            for path in ("sparse", "dense")
        )
        for name in vars(expected):
            torch.testing.assert_close(getattr(own, name), getattr(expected, name), rtol=1e-11, atol=1e-9)
