"""Fold: multiply gains and rotations into the weights around them, so that fewer activations are transformed at run time.

The residual stream of a decoder is written by linear maps alone, and read through norms that no rotation changes. Once the gains of these
norms are multiplied into the linears behind them, the stream can be stored rotated: tables and linears write it so, and those that
read it find their inputs rotated already. In the same way a rotation of each head goes from the rows that make values, through an
attention, to the linear behind it. `qpc.ir.regions` proves where that holds.
(Rotations that vanish in weights: QuaRot, arXiv 2404.00456, section 4; gains folded before: SliceGPT, arXiv 2401.15024, section 3.)
"""

import copy
import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from statistics import geometric_mean
from typing import ClassVar

import torch
from torch import Tensor, fx, nn

from qpc.errors import ModelError
from qpc.ir.annotation import site_of
from qpc.ir.exact import run_exactly
from qpc.ir.program import Program
from qpc.ir.random_inputs import random_inputs
from qpc.ir.regions import Gain, Region, grow, head_width
from qpc.ir.stage import Stage
from qpc.kernels.gain import TurnedGain, turned_gain
from qpc.passes.base import Pass, PassResult
from qpc.passes.borders import Borders, borders
from qpc.passes.folding import Folded, Rows, gain_price
from qpc.passes.lower import constant
from qpc.quant.hadamard import block_within
from qpc.quant.rotation import Rotation, seeded_generator

LEAST_BLOCK = 32
"""Inputs that a folded rotation must mix, unless one at run time would mix no more."""

TOLERANCE = 1e-9
"""Largest difference of outputs in float64, relative to the largest output, that rounding explains."""


@dataclass
class _Plan:
    """What is to be changed.

    changes: of parameters, by name. apart: gains that stay, with the rotation around them. readers: weights whose inputs are rotated.
    prices: of the gains in them. reasons: why the inputs of a linear are not rotated.
    """

    changes: dict[str, Folded] = field(default_factory=dict)
    apart: list[tuple[Gain, Rotation]] = field(default_factory=list)
    readers: set[str] = field(default_factory=set)
    prices: dict[str, float] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Fold(Pass):
    """Gives the program a module with folded parameters, and marks the weights that read rotated inputs.

    seed: of the signs. rotation_block: as for `Quantize`. Nothing is folded unless the outputs of the model are the same on random inputs,
    in float64.
    """

    name: ClassVar[str] = "fold"
    requires: ClassVar[Stage] = Stage.GROUPED
    ensures: ClassVar[Stage] = Stage.GROUPED
    seed: int = 0
    rotation_block: int | None = None

    def run(self, program: Program) -> PassResult:
        """Fold whatever can be."""
        plan = self._plan(program)
        remarks = [self.declined(subject, reason) for subject, reason in _summed_up(plan.reasons)]
        if not plan.changes:
            return PassResult(remarks=tuple(remarks))
        failure = _check(program, plan, self.seed)
        if failure is not None:
            return PassResult(remarks=(*remarks, self.declined(type(program.module).__name__, failure)))
        program.module = _folded(program.module, plan)
        for gain, _ in plan.apart:
            for node, name in program.tensors.items():
                if name == gain.parameter:
                    program.tensors[node] = f"{_owner(gain.parameter)}.gain"
            remarks.append(self.declined(gain.parameter, "a table shares the weight behind it: the gain stays, between two rotations"))
        if plan.prices:
            price = geometric_mean(plan.prices.values())
            reason = f"gains are in {len(plan.prices)} weights now, and ideal error feedback leaves {price:.2f} times as much error for it"
            remarks.append(self.declined(type(program.module).__name__, f"{reason} at the same rate (geometric mean)"))
        program.rotated.update(plan.readers)
        return PassResult(tuple(plan.changes), tuple(remarks))

    def _plan(self, program: Program) -> _Plan:
        """Region by region, in graph order of their first linear."""
        plan = _Plan()
        done: dict[tuple[fx.Node, int], str | None] = {}
        for node in program.linears():
            site, value = site_of(node), node.args[0]
            assert isinstance(value, fx.Node)
            width, whole = site.shape.in_features, block_within(site.shape.in_features, self.rotation_block)
            reason = self._try(program, value, width, whole, plan, done)
            if reason is not None and (head := head_width(value)) is not None and head < width and width % head == 0:
                reason = self._try(program, value, head, whole, plan, done)
            if reason is not None:
                plan.reasons[site.name] = reason
        return plan

    def _try(
        self, program: Program, value: fx.Node, width: int, whole: int, plan: _Plan, done: dict[tuple[fx.Node, int], str | None]
    ) -> str | None:
        """Plan the region of a value; why not, if it cannot be. whole: inputs that a rotation at run time would mix."""
        if (value, width) in done:
            return done[value, width]
        found = grow(program, value, width)
        reason = found.reason if not isinstance(found, Region) else self._add(program, found, whole, plan)
        done.update(((each, width), reason) for each in (value, *found.values))
        return reason

    def _add(self, program: Program, region: Region, whole: int, plan: _Plan) -> str | None:
        """Add a region to the plan; why not, if it cannot be folded."""
        found = borders(program, region)
        if not isinstance(found, Borders):
            return found
        block = block_within(region.width, self.rotation_block)
        if block < min(whole, LEAST_BLOCK):
            return f"a rotation within {region.width} would mix only {block} inputs"
        name, sites = min(found.readers), {site_of(node).weight for node in program.linears()}
        rotation = Rotation.random(region.width, seeded_generator(self.seed, f"fold {name}"), block).to(program.device)
        for weight, reader in found.readers.items():
            before = reader.gain
            factor = None if before is None else program.tensor(before.parameter).detach().double() + before.offset
            if factor is not None and weight in sites:
                matrix = program.tensor(weight).detach()
                plan.prices[weight] = gain_price(matrix.t() if reader.transposed else matrix, factor)
            _change(plan, weight, gain=factor, inputs=rotation, transposed=reader.transposed)
        for parameter, writer in found.writers.items():
            _change(plan, parameter, rows=Rows(writer.first, writer.last, rotation), transposed=writer.transposed)
        for gain in region.gains:
            if gain.parameter in found.apart:
                plan.apart.append((gain, rotation))
            else:
                _change(plan, gain.parameter, unit=1 - gain.offset)
        plan.readers |= found.readers.keys()
        return None


def _change(plan: _Plan, parameter: str, **facts: object) -> None:
    plan.changes[parameter] = replace(plan.changes.get(parameter, Folded()), **facts)  # type: ignore[arg-type]


def _check(program: Program, plan: _Plan, seed: int) -> str | None:
    """Turn the gains that stay, and compare outputs in float64: how they differ. If they do, the graph is left as it was."""
    try:
        inputs = random_inputs(program, batch=2, length=8, seed=seed)
        before = run_exactly(program, program.graph, inputs, {})
        if not all(bool(one.isfinite().all()) for one in before):
            return "the outputs on random inputs are not finite"
    except (ModelError, RuntimeError) as error:
        return f"the outputs cannot be compared in float64: {str(error).splitlines()[0]}"
    _turn(program, plan.apart)
    after = run_exactly(program, program.graph, inputs, plan.changes)
    largest, worst = _largest(before), _largest([one - other for one, other in zip(before, after, strict=True)])
    if worst <= TOLERANCE * largest:
        return None
    _turn_back(program, plan.apart)
    return f"folding would change the outputs by {worst:.2g}, the largest of which is {largest:.2g}"


def _largest(values: Iterable[Tensor]) -> float:
    return max((float(value.abs().max()) for value in values if value.numel()), default=0.0)


def _turn(program: Program, apart: Iterable[tuple[Gain, Rotation]]) -> None:
    """Let these gains apply in the basis before the rotation."""
    for gain, rotation in apart:
        with program.graph.inserting_before(gain.node):
            signs = constant(program, re.sub(r"\W", "_", gain.parameter) + "_signs", rotation.signs)
        gain.node.target, gain.node.args = turned_gain, (gain.value, gain.factor, signs, rotation.block)
    program.graph_module.recompile()


def _turn_back(program: Program, apart: Iterable[tuple[Gain, Rotation]]) -> None:
    for gain, _ in apart:
        signs = gain.node.args[2]
        gain.node.target, gain.node.args = torch.ops.aten.mul.Tensor, (gain.value, gain.factor)
        assert isinstance(signs, fx.Node)
        program.graph.erase_node(signs)
        delattr(program.graph_module, str(signs.target))
    program.graph_module.recompile()


def _folded(module: nn.Module, plan: _Plan) -> nn.Module:
    """A copy of the module tree with the changed parameters; every other tensor is shared with `module`."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    kept = {id(tensor): tensor for tensor in (*parameters.values(), *module.buffers())}
    for name, change in plan.changes.items():
        old = parameters[name]
        kept[id(old)] = nn.Parameter(change.stored(old.detach()), old.requires_grad)
    result = copy.deepcopy(module, kept)
    for gain, rotation in {gain.parameter: (gain, rotation) for gain, rotation in plan.apart}.values():
        owner, _, leaf = gain.parameter.rpartition(".")
        norm, old = result.get_submodule(owner), parameters[gain.parameter]
        setattr(norm, leaf, nn.Parameter(torch.full_like(old, 1 - gain.offset), old.requires_grad))
        result.set_submodule(owner, TurnedGain(norm, old, gain.offset, rotation.signs, rotation.block))
    return result


def _owner(parameter: str) -> str:
    return parameter.rpartition(".")[0]


def _summed_up(reasons: dict[str, str]) -> list[tuple[str, str]]:
    """Reasons that differ in numbers of layers alone, as one: the first linear, how many others, and the reason of the first."""
    alike: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        alike.setdefault(re.sub(r"\d+", "", reason), []).append(name)
    return [(_several(names), reasons[names[0]]) for names in alike.values()]


def _several(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
