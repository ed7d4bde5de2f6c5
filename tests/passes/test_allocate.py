"""The allocation pass: budgets kept to the byte, the best allocation taken, groups formed where quantizers agree."""

import itertools
import math
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import nn

from qpc.budget import Budget
from qpc.capture import capture
from qpc.errors import BudgetError, ModelError
from qpc.ir.annotation import Annotation, annotation
from qpc.ir.program import Program
from qpc.passes.allocate import Allocate, other_bytes, stored_bytes
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fusion import Fusion
from qpc.passes.pipeline import Pipeline
from qpc.quant.palette import Palette
from qpc.sensitivity import Loss, Sensitivities
from qpc.solver import Allocation
from tests.families import FAMILIES, PLAIN, plain_inputs
from tests.toy import ToyQuantizer

PALETTE = Palette(tuple(ToyQuantizer(bits) for bits in (2, 3, 4, 5)))


class Attention(nn.Module):
    """Linears `q`, `k`, `v` that read one value, and `o` that reads what they make; the rows of `k` fill no whole block."""

    def __init__(self, rows: tuple[int, int, int] = (128, 40, 64)) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v = (nn.Linear(32, count) for count in rows)
        self.o = nn.Linear(sum(rows), 64, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Shapes [batch, length, 32] to [batch, length, 64]."""
        return self.o(torch.cat([self.q(x), self.k(x), self.v(x)], dim=-1).tanh())


def grouped(model: nn.Module, *inputs: torch.Tensor) -> Program:
    """The model just before allocation."""
    program = capture(model, example_inputs=inputs or None)
    Pipeline((Canonicalize(), Fusion())).run(program)
    return program


def allocated(program: Program, step: Allocate) -> dict[str, Annotation]:
    """Run the pass; what each site now knows."""
    Pipeline((step,)).run(program)
    return {found.site.name: found for node in program.linears() if (found := annotation(node)).site is not None}


def sensitivities(**values: float) -> Sensitivities:
    """Values as if they had been estimated."""
    return Sensitivities(values, Loss.KL, 0.02, 0, 256)


def total_bytes(sites: dict[str, Annotation]) -> int:
    """Stored bytes of all linears, shared weights once."""
    return sum({found.site.weight: found.weight_bytes or 0 for found in sites.values() if found.site}.values())


@pytest.mark.parametrize("same", [False, True])
@pytest.mark.parametrize("bits", ["2.7", "3.5", "4.4"])
def test_no_allocation_within_the_budget_is_better(bits: str, same: bool) -> None:
    given = sensitivities(q=0.3, k=2.0, v=9.0, o=1.0)
    program = grouped(Attention((128, 64, 64)), *plain_inputs())
    sites = allocated(program, Allocate(Budget.of(bits), PALETTE, given, same_quantizer_in_group=same, may_keep=False))
    shapes = {name: found.site.shape for name, found in sites.items() if found.site}
    room = Fraction(bits) * sum(shape.weights for shape in shapes.values()) / 8
    losses = []
    for choice in itertools.product(PALETTE.quantizers, repeat=4):
        chosen = dict(zip(sites, choice, strict=True))
        size = sum(chosen[name].weight_bytes(shape.out_features, shape.in_features) for name, shape in shapes.items())
        if size <= room and (not same or chosen["q"] == chosen["k"] == chosen["v"]):
            losses.append(sum(given.values[name] * chosen[name].distortion for name in sites))
    loss = sum((found.sensitivity or 0.0) * (found.distortion or 0.0) for found in sites.values())
    assert loss == pytest.approx(min(losses), rel=1e-6)
    assert total_bytes(sites) <= room
    assert isinstance(program.allocation, Allocation)
    assert program.allocation.cost.distortion == pytest.approx(loss)
    assert program.allocation.cost.weight_bytes == total_bytes(sites)
    assert {name: found.quantizer for name, found in sites.items()} == program.allocation.choices


def test_members_with_one_quantizer_fuse_and_the_rest_is_remarked() -> None:
    program = grouped(Attention((128, 64, 64)), *plain_inputs())
    coarse, fine = ToyQuantizer(2), ToyQuantizer(5)
    shapes = [found.site.shape for node in program.linears() if (found := annotation(node)).site is not None]
    room = sum(coarse.weight_bytes(shape.out_features, shape.in_features) for shape in shapes)
    room += fine.weight_bytes(64, 32) - coarse.weight_bytes(64, 32)
    budget = Budget(bits_per_weight=Fraction(8 * room, sum(shape.weights for shape in shapes)))
    given = sensitivities(q=1.0, k=1.0, v=500.0, o=1.0)
    sites = allocated(program, Allocate(budget, Palette((coarse, fine)), given, may_keep=False))
    assert {name: found.quantizer for name, found in sites.items()} == {"q": coarse, "k": coarse, "v": fine, "o": coarse}
    assert sites["q"].group == sites["k"].group
    assert sites["q"].group is not None and sites["q"].group.members == ("q", "k")
    assert sites["v"].group is not None and sites["v"].group.members == ("v",)
    (split,) = [remark for remark in program.remarks if "split" in remark.reason]
    assert split.subject == "q, k, v"
    assert f"q, k got {coarse}, v got {fine}" in split.reason


def test_a_member_of_odd_rows_stands_alone_unless_it_is_the_last() -> None:
    program = grouped(Attention((128, 40, 64)), *plain_inputs())
    sites = allocated(program, Allocate.uniform(ToyQuantizer(4)))
    assert sites["q"].group is not None and sites["q"].group.members == ("q", "v")
    assert sites["k"].group is not None and sites["k"].group.members == ("k",)
    assert any(remark.subject == "k" and "out_features=40" in remark.reason for remark in program.remarks)

    program = grouped(Attention((128, 64, 40)), *plain_inputs())
    sites = allocated(program, Allocate.uniform(ToyQuantizer(4)))
    assert sites["q"].group is not None and sites["q"].group.members == ("q", "k", "v")
    assert not program.remarks


def test_uniform_gives_every_linear_the_one_quantizer() -> None:
    sites = allocated(grouped(FAMILIES["llama"]()), Allocate.uniform(ToyQuantizer(3)))
    assert len(sites) == 14
    assert all(found.quantizer == ToyQuantizer(3) and found.distortion == 2.0**-6 for found in sites.values())


@pytest.mark.parametrize("name", ["twice", "shared"])
def test_a_shared_weight_is_stored_once(name: str) -> None:
    program = grouped(PLAIN[name](), *plain_inputs())
    sites = allocated(program, Allocate(Budget.of(9.2), PALETTE, may_keep=False))
    one = ToyQuantizer(4).weight_bytes(32, 32)  # half of its block is padding
    assert {found.quantizer for found in sites.values()} == {ToyQuantizer(4)}
    assert isinstance(program.allocation, Allocation)
    assert program.allocation.cost.weight_bytes == total_bytes(sites) == one


def test_a_budget_of_the_whole_checkpoint_counts_every_other_tensor_once() -> None:
    model = FAMILIES["llama_tied"]()
    program = grouped(model)
    weights = [site.weight for node in program.linears() if (site := annotation(node).site) is not None]
    linear_bytes = sum(stored_bytes(model.get_parameter(name)) for name in weights)
    assert other_bytes(program, weights) + linear_bytes == sum(map(stored_bytes, model.parameters()))
    limit = other_bytes(program, weights) + linear_bytes // 8
    sites = allocated(program, Allocate(Budget.of(f"{limit}B"), PALETTE))
    assert other_bytes(program, weights) + total_bytes(sites) <= limit
    assert any(found.quantizer != ToyQuantizer(2) for found in sites.values()), "the room is used"


@pytest.mark.parametrize("budget", ["1.5bit", "500B", "3000B"])
def test_an_infeasible_budget_names_the_smallest_feasible_one(budget: str) -> None:
    def step(limit: str) -> Allocate:
        return Allocate(Budget.of(limit), PALETTE)

    with pytest.raises(BudgetError) as error:
        allocated(grouped(Attention(), *plain_inputs()), step(budget))
    rate, total = (part.split(" (")[0] for part in str(error.value).split("smallest feasible one is ")[1].split(" or "))
    for feasible in (rate, total):
        sites = allocated(grouped(Attention(), *plain_inputs()), step(feasible))
        assert {found.quantizer for found in sites.values()} == {ToyQuantizer(2)}
    assert ("never quantized" in str(error.value)) == (budget == "500B")


@pytest.mark.parametrize("budget", ["0.3nats", "0.09nats", "4.2bit, 0.09nats", "0.02nats, 5000B, 5bit"])
def test_no_allocation_within_a_predicted_loss_is_smaller(budget: str) -> None:
    given = sensitivities(q=0.3, k=2.0, v=9.0, o=1.0)
    program = grouped(Attention((128, 64, 64)), *plain_inputs())
    limits = Budget.parse(budget)
    step = Allocate(limits, PALETTE, given, may_keep=False)
    others, weights = other_bytes(program, step.weights(program)), step.weights(program)
    count = sum(weight.shape.weights for weight in weights.values())
    feasible = []
    for choice in itertools.product(PALETTE.quantizers, repeat=4):
        costs = [weight.cost(quantizer).weighted(weight.sensitivity) for weight, quantizer in zip(weights.values(), choice, strict=True)]
        size, loss = sum(cost.weight_bytes for cost in costs), math.fsum(cost.distortion for cost in costs)
        room = limits.weight_bytes(count, others)
        if limits.loss is not None and loss <= limits.loss and (room is None or size <= room):
            feasible.append(size)
    if not feasible:
        with pytest.raises(BudgetError, match="cannot be kept"):
            step.solve(program)
        return
    found = step.solve(program)
    assert limits.loss is not None and found.cost.distortion <= limits.loss
    assert found.cost.weight_bytes == min(feasible)
    allocated(program, step)
    assert program.allocation == found


@pytest.mark.parametrize("may_keep", [False, True])
@pytest.mark.parametrize("budget", ["2.5bit, 0.1nats", "1bit, 0.5nats", "2kB, 5bit, 0.2nats", "0.0001nats", "1bit, 0.0001nats"])
def test_limits_that_exclude_each_other_name_feasible_ones(budget: str, may_keep: bool) -> None:
    given = sensitivities(q=0.3, k=2.0, v=9.0, o=1.0)
    program = grouped(Attention((128, 64, 64)), *plain_inputs())
    limits = Budget.parse(budget)

    def solved(wanted: Budget) -> Allocation:
        return Allocate(wanted, PALETTE, given, may_keep=may_keep).solve(program)

    if budget == "0.0001nats" and may_keep:
        assert solved(limits).cost.distortion <= 0.0001
        return
    with pytest.raises(BudgetError, match="cannot be kept") as error:
        solved(limits)
    text = str(error.value)
    apart = budget == "1bit, 0.0001nats" and not may_keep
    assert "feasible" in text and ("on its own" in text) == apart, text
    if apart:
        limits = Budget(kl_nats=limits.kl_nats)  # each of the values is one without the other limit
    for part in text.split("least feasible KL is ")[1:]:
        kl = Budget.parse(part.split("; ")[0]).kl_nats
        assert solved(replace(limits, kl_nats=kl)).cost.distortion <= float(kl or 0)
        with pytest.raises(BudgetError):
            solved(replace(limits, kl_nats=(kl or 0) * Fraction(99, 100)))
    for part in text.split("smallest feasible size is ")[1:]:
        for size in part.split("; ")[0].split(" or "):
            solved(replace(Budget.parse(size.split(" (")[0]), kl_nats=None if apart else limits.kl_nats))


def test_a_loss_that_nothing_predicts_is_refused() -> None:
    program = grouped(Attention(), *plain_inputs())
    relative = Sensitivities(dict.fromkeys("qkvo", 1.0), Loss.RELATIVE_ERROR, 0.02, 0, 256)
    for given in (None, relative):
        with pytest.raises(BudgetError, match="give a size"):
            allocated(program, Allocate(Budget.parse("0.1nats"), PALETTE, given))


def test_a_budget_above_the_largest_leaves_the_model_as_it_is_and_says_so() -> None:
    program = grouped(Attention(), *plain_inputs())
    sites = allocated(program, Allocate(Budget.of(64), PALETTE))
    assert all(found.quantizer is None and found.distortion == 0.0 for found in sites.values())
    assert sum("as it is" in remark.reason for remark in program.remarks) == 4
    sites = allocated(grouped(Attention(), *plain_inputs()), Allocate(Budget.of(64), PALETTE, may_keep=False))
    assert all(found.quantizer == ToyQuantizer(5) for found in sites.values())


def test_a_linear_too_small_to_shrink_stays_as_it_is() -> None:
    program = grouped(nn.Sequential(nn.Linear(32, 64), nn.Linear(64, 1)), torch.zeros(2, 32))
    sites = allocated(program, Allocate(Budget.of(5), PALETTE))
    assert sites["0"].quantizer is not None
    assert sites["1"].quantizer is None
    assert any(remark.subject == "1" and "smaller" in remark.reason for remark in program.remarks)


def test_missing_sensitivities_are_named() -> None:
    with pytest.raises(ModelError, match="no value for o"):
        allocated(grouped(Attention(), *plain_inputs()), Allocate(Budget.of(4), PALETTE, sensitivities(q=1.0, k=1.0, v=1.0)))


def test_a_model_without_linears_is_refused() -> None:
    program = grouped(nn.Sequential(nn.LayerNorm(8)), torch.zeros(2, 8))
    with pytest.raises(ModelError, match="no linear"):
        allocated(program, Allocate(Budget.of(4), PALETTE))


def test_sensitive_linears_get_the_bits() -> None:
    program = grouped(FAMILIES["llama"]())
    names = [site.name for node in program.linears() if (site := annotation(node).site) is not None]
    values = {name: math.exp(position) for position, name in enumerate(names)}
    sites = allocated(program, Allocate(Budget.of(3.8), PALETTE, sensitivities(**values), may_keep=False))
    per_weight = {name: values[name] / found.site.shape.weights for name, found in sites.items() if found.site}
    rates = [sites[name].quantizer.rate for name in sorted(per_weight, key=per_weight.__getitem__)]  # type: ignore[union-attr]
    assert rates[0] < rates[-1]
