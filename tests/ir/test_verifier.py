"""Every clause of the contract, broken on purpose."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import fx, nn

from qpc.errors import VerifierError
from qpc.ir.annotation import FusionGroup, LinearShape, LinearSite, annotate, annotation
from qpc.ir.linear import LINEAR
from qpc.ir.program import Program
from qpc.ir.stage import Stage
from qpc.ir.verifier import verify
from qpc.quant.layout import BLOCK_ROWS, column_blocks, row_blocks
from qpc.quant.quantizer import PackedWeight
from qpc.quant.rotation import Rotation
from qpc.quant.trellis import TrellisQuantizer
from tests.families import captured, grouped

QUANTIZER = TrellisQuantizer(6, 12)


def site(node: fx.Node) -> LinearSite:
    found = annotation(node).site
    assert found is not None
    return found


def packed(shape: LinearShape, rotation: Rotation, quantizer: TrellisQuantizer = QUANTIZER) -> PackedWeight:
    rows, columns = row_blocks(shape.out_features), column_blocks(shape.in_features)
    codes = torch.zeros(rows, columns, quantizer.block_words, dtype=torch.int32)
    scales = torch.ones(rows * BLOCK_ROWS, dtype=torch.bfloat16)
    return PackedWeight(shape.out_features, shape.in_features, quantizer, (codes,), scales, rotation)


def quantized(name: str = "siblings") -> Program:
    """A program at QUANTIZED, with codes of zeros."""
    program = grouped(name)
    signs: dict[int, Rotation] = {}
    for node in program.linears():
        shape = site(node).shape
        rotation = signs.setdefault(shape.in_features, Rotation.random(shape.in_features, torch.Generator().manual_seed(0)))
        annotate(node, annotation(node).but(quantizer=QUANTIZER))
        program.packed[site(node).name] = packed(shape, rotation)
    program.stage = Stage.QUANTIZED
    return program


def lowered() -> Program:
    program = quantized()
    for node in list(program.linears()):
        node.target = torch.ops.aten.linear.out  # any other operator
    program.stage = Stage.LOWERED
    return program


def linear(program: Program, name: str) -> fx.Node:
    return next(node for node in program.linears() if site(node).name == name)


def change(name: str, /, **changes: object) -> Callable[[Program], None]:
    """Change annotation fields of the linear called `name`."""
    return lambda program: annotate(linear(program, name), annotation(linear(program, name)).but(**changes))


def change_site(name: str, /, **changes: object) -> Callable[[Program], None]:
    def breach(program: Program) -> None:
        annotate(linear(program, name), annotation(linear(program, name)).but(site=replace(site(linear(program, name)), **changes)))

    return breach


def change_group(name: str, /, **changes: object) -> Callable[[Program], None]:
    def breach(program: Program) -> None:
        group = annotation(linear(program, name)).group
        assert group is not None
        for node in list(program.linears()):
            if annotation(node).group == group:
                annotate(node, annotation(node).but(group=replace(group, **changes)))

    return breach


def change_packed(name: str, /, **changes: object) -> Callable[[Program], None]:
    return lambda program: program.packed.update({name: replace(program.packed[name], **changes)})


@pytest.mark.parametrize("name", ["llama", "gpt2", "mlp", "siblings", "twice", "shared"])
def test_programs_that_keep_the_contract(name: str) -> None:
    verify(captured(name))
    verify(grouped(name))
    verify(quantized(name))


def test_a_lowered_program_keeps_the_contract() -> None:
    verify(lowered())


def misorder(program: Program) -> None:
    node = linear(program, "left")
    next(iter(program.graph.nodes)).prepend(node)


def alias(program: Program) -> None:
    program.tensors["p_last_weight"] = "left.weight"


def missing_placeholder(program: Program) -> None:
    program.tensors["nowhere"] = "left.weight"


CAPTURED = {
    "malformed graph": (misorder, "malformed"),
    "book without placeholder": (missing_placeholder, "'nowhere'.*no placeholder"),
    "placeholder without book": (lambda p: p.tensors.pop("p_left_weight"), "'p_left_weight'.*either a tensor .* or an input"),
    "tensor and input": (lambda p: p.tensors.update(x="left.weight"), "'x'.*either a tensor .* or an input"),
    "input twice": (lambda p: setattr(p, "inputs", ("x", "x")), "listed twice"),
    "no such tensor": (lambda p: p.tensors.update(p_left_weight="gone"), "'p_left_weight'.*no parameter or buffer 'gone'"),
    "tied twice": (alias, "'p_last_weight'.*tied tensors share one placeholder"),
    "other shape": (lambda p: p.tensors.update(p_left_weight="right.weight", p_right_weight="left.weight"), r"\(48, 32\)"),
}


@pytest.mark.parametrize("case", CAPTURED)
def test_breaches_of_any_stage(case: str) -> None:
    breach, message = CAPTURED[case]
    program = grouped("siblings")
    breach(program)
    program.stage = Stage.CAPTURED
    with pytest.raises(VerifierError, match=f"stage CAPTURED.*{message}"):
        verify(program)


def retarget(target: object) -> Callable[[Program], None]:
    def breach(program: Program) -> None:
        node = linear(program, "left")
        node.target = target  # type: ignore[assignment]

    return breach


def computed_weight(program: Program) -> None:
    node = linear(program, "left")
    with program.graph.inserting_before(node):
        node.update_arg(1, program.graph.call_function(torch.ops.aten.mul.Tensor, (node.args[1], 2)))


def swap_weight(program: Program) -> None:
    linear(program, "left").update_arg(1, linear(program, "last").args[1])


CANONICAL = {
    "F.linear": (retarget(nn.functional.linear), "not aten.linear"),
    "site on another operator": (retarget(torch.ops.aten.add.Tensor), "carries the site left, but is aten.add.Tensor"),
    "computed weight": (computed_weight, "the weight of left is no parameter"),
    "another weight": (swap_weight, "reads 'last.weight', but its site says 'left.weight'"),
    "transposed": (change_site("left", transposed=True), "transposed is True"),
    "shape": (change_site("left", shape=LinearShape(64, 31)), "site shape 64x31, but 'left.weight' is 64x32"),
    "bias": (change_site("left", bias=None), "adds 'left.bias', but its site says None"),
    "excluded": (lambda p: p.excluded.update(left="as a test"), r"left is excluded \(as a test\)"),
    "one name for two": (change_site("right", name="left"), "have one name but differ"),
}


@pytest.mark.parametrize("case", CANONICAL)
def test_breaches_from_canonical_on(case: str) -> None:
    breach, message = CANONICAL[case]
    program = grouped("siblings")
    program.stage = Stage.CANONICAL
    breach(program)
    with pytest.raises(VerifierError, match=f"stage CANONICAL, node 'linear.*{message}"):
        verify(program)


def stale_member(program: Program) -> None:
    group = annotation(linear(program, "left")).group
    assert group is not None
    change("right", group=group.subset(["right"]))(program)


GROUPED = {
    "no group": (change("last", group=None), "last has no group"),
    "not a member": (change("last", group=FusionGroup(("left",), "x", (LinearShape(64, 32),))), "last is not among the members"),
    "absent member": (stale_member, r"the group is \('left', 'right'\), but its sites are \('left',\)"),
    "wrong order": (change_group("left", members=("right", "left")), r"its sites are \('left', 'right'\)"),
    "wrong shapes": (change_group("left", shapes=(LinearShape(64, 32),) * 2), "the group has shapes"),
    "no such input": (change_group("left", input="gone"), "'gone', which is not in the graph"),
    "another input": (change_group("left", input="mean"), "reads 'x', its group 'mean'"),
}


@pytest.mark.parametrize("case", GROUPED)
def test_breaches_from_grouped_on(case: str) -> None:
    breach, message = GROUPED[case]
    program = grouped("siblings")
    breach(program)
    with pytest.raises(VerifierError, match=f"stage GROUPED, node .*{message}"):
        verify(program)


def test_members_of_a_group_share_their_quantizer() -> None:
    program = quantized()
    program.stage = Stage.ALLOCATED
    verify(program)
    change("right", quantizer=None)(program)
    with pytest.raises(VerifierError, match="stage ALLOCATED, node 'linear_2': right has None, but its group has trellis"):
        verify(program)
    change("right", quantizer="trellis")(program)
    with pytest.raises(VerifierError, match="'trellis' is no quantizer"):
        verify(program)


def test_applications_of_a_weight_share_their_quantizer() -> None:
    program = quantized("shared")
    change("b", quantizer=TrellisQuantizer(7, 14))(program)
    with pytest.raises(VerifierError, match="but its weight has"):
        verify(program)


ROTATION = Rotation.random(32, torch.Generator().manual_seed(9))

QUANTIZED = {
    "no packed weight": (lambda p: p.packed.pop("last"), "last has no packed weight"),
    "packed but not allocated": (change("last", quantizer=None), "'last': has a packed weight, but no quantizer"),
    "wrong shape": (change_packed("last", out_features=17), "the packed weight is 17x32, the site 64x32"),
    "other quantizer": (change_packed("last", quantizer=TrellisQuantizer(7, 14)), "packed by trellis 7/2 .*allocated to trellis 3 "),
    "codes cut short": (change_packed("last", codes=(torch.zeros(1, 1, 96, dtype=torch.int32),)), r"int32 \[\(1, 2, 96\)\] is required"),
    "codes of another dtype": (change_packed("last", codes=(torch.zeros(1, 2, 96, dtype=torch.int64),)), "torch.int64"),
    "scales": (change_packed("last", scales=torch.ones(64)), "scales are torch.float32"),
    "rotation of another size": (change_packed("last", rotation=Rotation.random(48, torch.Generator())), "rotates 48 inputs of 32"),
    "rotation of its own": (change_packed("right", rotation=ROTATION), "right is rotated otherwise"),
    "no rotation in a group": (change_packed("right", rotation=None), "right is rotated otherwise"),
}


@pytest.mark.parametrize("case", QUANTIZED)
def test_breaches_from_quantized_on(case: str) -> None:
    breach, message = QUANTIZED[case]
    program = quantized()
    breach(program)
    with pytest.raises(VerifierError, match=f"stage QUANTIZED, node .*{message}"):
        verify(program)


def test_a_quantized_linear_that_was_not_lowered() -> None:
    program = lowered()
    linear(program, "last").target = LINEAR
    with pytest.raises(VerifierError, match="stage LOWERED, node 'linear_1': last is not lowered"):
        verify(program)
