"""What the rewrites take for a norm, a gate or a rotary embedding, and what they leave alone, on graphs as `make_fx` records them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch._inductor.decomposition import select_decomp_table
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional

from qpc.inductor.gates import LEAST_ROWS, fuse_gates, match_activation
from qpc.inductor.hook import GraphPass
from qpc.inductor.merge import merge_equal
from qpc.inductor.norms import fuse_norms, match_norm
from qpc.inductor.ropes import ATTENTION, FUNCTIONAL, fuse_ropes, match_turned
from qpc.kernels import operand_ops as _operands  # noqa: F401 - importing it registers torch.ops.qpc
from qpc.kernels.gate import Activation
from qpc.kernels.operand import unpack_operand

FEATURES, EPS = 32, 1e-5
X = torch.randn(2, 1, FEATURES, generator=torch.Generator().manual_seed(0))
WEIGHT = torch.rand(FEATURES, generator=torch.Generator().manual_seed(1)) + 0.5
SIGNS = torch.tensor([1, 2, 3, 4], dtype=torch.uint8)


def normalized(x: Tensor, eps: float = EPS) -> Tensor:
    wide = x.float()
    return wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)


def llama(x: Tensor, weight: Tensor) -> Tensor:
    return weight * normalized(x).to(x.dtype)


def gemma(x: Tensor, weight: Tensor) -> Tensor:
    return (normalized(x) * (1.0 + weight.float())).type_as(x)


def olmo(x: Tensor, weight: Tensor) -> Tensor:
    return (weight * normalized(x)).to(x.dtype)


def rotated(x: Tensor, signs: Tensor) -> tuple[Tensor, Tensor]:
    words, scales = torch.ops.qpc.rotate_operand(x, signs, FEATURES)
    return words, scales


def graph_of(function: Callable[..., object], *inputs: Tensor, decomposed: bool = False) -> fx.GraphModule:
    recorded = make_fx(function, select_decomp_table() if decomposed else {}, tracing_mode="fake")(*inputs)
    recorded.graph.eliminate_dead_code()
    return recorded


def targets(recorded: fx.GraphModule) -> list[str]:
    names = (str(node.target) for node in recorded.graph.nodes)
    return [name.removeprefix("qpc.").removesuffix(".default") for name in names if name.startswith("qpc.")]


def norm_twice(x: Tensor, weight: Tensor, signs: Tensor) -> tuple[Tensor, ...]:
    result = llama(x, weight)
    return (*rotated(result, signs), result + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [llama, gemma, olmo])
def test_norms_of_every_spelling(norm: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    x, weight = X.to(dtype), WEIGHT.to(dtype)
    plain = graph_of(lambda x, w, s: rotated(norm(x, w), s), x, weight, SIGNS)
    expected = plain(x, weight, SIGNS)
    assert fuse_norms(plain.graph) == (1, [])
    plain.recompile()
    assert targets(plain) == ["norm_operand"]
    (node,) = (node for node in plain.graph.nodes if "norm_operand" in str(node.target))
    assert node.args[2:4] == (EPS, 1.0 if norm is gemma else 0.0)
    found = plain(x, weight, SIGNS)
    tolerance = 1e-6 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found[1], expected[1], rtol=tolerance, atol=0)


def test_a_sum_is_computed_once_for_all_its_readers() -> None:
    def block(x: Tensor, y: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
        total = x + y
        return (*rotated(llama(total, w), s), total * 2)

    other = X.flip(0)
    recorded = graph_of(block, X, other, WEIGHT, SIGNS)
    expected = recorded(X, other, WEIGHT, SIGNS)
    assert fuse_norms(recorded.graph) == (1, [])
    recorded.recompile()
    assert targets(recorded) == ["add_norm_operand"]
    assert not any(node.target is torch.ops.aten.add.Tensor for node in recorded.graph.nodes)
    found = recorded(X, other, WEIGHT, SIGNS)
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("reason", "function"),
    [
        ("the normalized value is read by add", norm_twice),
        ("computes the signs", lambda x, w, s: rotated(llama(x, w), s + 1)),
        (None, lambda x, w, s: rotated(torch.nn.functional.layer_norm(x, (FEATURES,), w), s)),
        (None, lambda x, w, s: rotated(llama(x, w.exp()), s)),
        (None, lambda x, w, s: rotated(w * (x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + EPS)), s)),
        (None, lambda x, w, s: rotated(w * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + EPS)), s)),
        (None, lambda x, w, s: rotated(w * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + EPS)), s)),
    ],
)
def test_norms_that_are_left_alone_say_why(reason: str | None, function: Callable[..., object]) -> None:
    """None: what is no norm by a given weight, be it that the graph computes the weight, or no mean of squares along the last axis."""
    recorded = graph_of(function, X, WEIGHT, SIGNS)
    before = str(recorded.graph)
    fused, remarks = fuse_norms(recorded.graph)
    assert fused == 0 and str(recorded.graph) == before
    assert [reason in str(remark) for remark in remarks] == ([True] if reason is not None else []), remarks


def test_a_weight_of_another_width_is_left_alone() -> None:
    recorded = graph_of(lambda x, w, s: rotated(llama(x, w), s), X, WEIGHT[:1], SIGNS)
    fused, (remark,) = fuse_norms(recorded.graph)
    assert fused == 0 and "the weight is (1,) and the value (2, 1, 32); required (32,)" in str(remark)


def test_a_norm_without_weight_is_none() -> None:
    recorded = graph_of(lambda x: normalized(x), X)
    (result,) = recorded.graph.output_node().all_input_nodes
    assert match_norm(result) is None


def gelu_tanh(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


BOTH = 3 * torch.randn(LEAST_ROWS, 1, 2 * FEATURES, generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("kind", "gated"),
    [
        (Activation.SILU, lambda gate, up: functional.silu(gate) * up),
        (Activation.SILU, lambda gate, up: up * functional.silu(gate)),
        (Activation.GELU_TANH, lambda gate, up: gelu_tanh(gate) * up),
        (Activation.SILU, lambda gate, up: functional.silu(gate) * gelu_tanh(up)),
    ],
    ids=["silu", "silu last", "gelu", "both factors"],
)
def test_gates_are_computed_as_before(kind: Activation, gated: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    """Bit for bit what the graph gives operator by operator, gate and up being halves of one product; in float32 up to a step of the
    operand, since an activation that is spelled out differs in its last bit here and there."""
    both = BOTH.to(dtype)
    recorded = graph_of(lambda y, s: rotated(gated(*y.chunk(2, -1)), s), both, SIGNS, decomposed=True)
    expected = recorded(both, SIGNS)
    assert fuse_gates(recorded.graph) == (1, [])
    recorded.recompile()
    assert targets(recorded) == ["gated_operand"]
    (node,) = (node for node in recorded.graph.nodes if "gated_operand" in str(node.target))
    assert node.args[2] == kind.value and "split" in str(node.args[0].args[0].target), "gate is read where it lies"
    found = recorded(both, SIGNS)
    if dtype is torch.float32:
        steps = (unpack_operand(*found) - unpack_operand(*expected)).abs() / expected[1].double()[:, None, None]
        assert steps.max() < 1.5
    else:
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def silu_twice(gate: Tensor, up: Tensor, signs: Tensor) -> tuple[Tensor, ...]:
    product = functional.silu(gate) * up
    return (*rotated(product, signs), product + 1)


@pytest.mark.parametrize(
    ("reason", "function"),
    [
        ("the product is read by add", silu_twice),
        ("neither factor is an activation", lambda gate, up, s: rotated(functional.relu(gate) * up, s)),
        ("neither factor is an activation", lambda gate, up, s: rotated(functional.gelu(gate) * up, s)),
        ("neither factor is an activation", lambda gate, up, s: rotated((gate * torch.sigmoid(gate)).neg() * up, s)),
        ("bfloat16, torch.float32, torch.float32; required one", lambda g, up, s: rotated(functional.silu(g.bfloat16()) * up, s)),
        ("computes the signs", lambda gate, up, s: rotated(functional.silu(gate) * up, s + 1)),
        ("a row of 2 blocks", lambda gate, up, s: torch.ops.qpc.rotate_operand(functional.silu(gate) * up, s, 16)),
        (f"{LEAST_ROWS - 1} rows", lambda gate, up, s: rotated(functional.silu(gate[1:]) * up[1:], s)),
        (None, lambda gate, up, s: rotated(functional.silu(gate), s)),
        (None, lambda gate, up, s: rotated(functional.silu(gate) * 2, s)),
        (None, lambda gate, up, s: rotated(functional.silu(gate) * up[:1], s)),
        (None, lambda gate, up, s: (functional.silu(gate) * up,)),
    ],
)
def test_gates_that_are_left_alone_say_why(reason: str | None, function: Callable[..., object]) -> None:
    recorded = graph_of(function, *BOTH.chunk(2, -1), SIGNS, decomposed=True)
    before = str(recorded.graph)
    fused, remarks = fuse_gates(recorded.graph)
    assert fused == 0 and str(recorded.graph) == before
    assert [reason in str(remark) for remark in remarks] == ([True] if reason is not None else []), remarks


def test_the_hook_tells_what_was_left_alone(caplog: pytest.LogCaptureFixture) -> None:
    recorded = graph_of(silu_twice, *BOTH.chunk(2, -1), SIGNS, decomposed=True)
    with caplog.at_level("INFO", logger="qpc.inductor"):
        GraphPass()(recorded.graph)
    assert [record.getMessage() for record in caplog.records] == ["gates: mul: the product is read by add_1 too"]


def test_an_activation_reads_one_value() -> None:
    """`x / (1 + exp(-y))` is none, though it is spelled as one."""
    recorded = graph_of(lambda x, y: (functional.silu(x), x), X, X, decomposed=True)
    result, x = recorded.graph.output_node().args[0]
    assert match_activation(result) == (Activation.SILU, x)
    other = next(node for node in recorded.graph.nodes if node.op == "placeholder" and node is not x)
    reader = next(node for node in recorded.graph.nodes if x in node.args)
    reader.replace_input_with(x, other)
    assert match_activation(result) is None


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return x * cos.unsqueeze(1) + torch.cat((-high, low), dim=-1) * sin.unsqueeze(1)


Q, ANGLES = torch.randn(2, 4, 1, 16), (torch.randn(2, 1, 16), torch.randn(2, 1, 16))


@pytest.mark.parametrize(
    ("function", "found"),
    [
        (turned, True),
        (lambda x, c, s: torch.cat((-x[..., 8:], x[..., :8]), dim=-1) * s.unsqueeze(1) + x * c.unsqueeze(1), True),
        (lambda x, c, s: x * c.unsqueeze(1) + torch.cat((x[..., 8:], x[..., :8]), dim=-1) * s.unsqueeze(1), False),
        (lambda x, c, s: x * c.unsqueeze(1) + torch.cat((-x[..., :8], x[..., 8:]), dim=-1) * s.unsqueeze(1), False),
        (lambda x, c, s: x * c.unsqueeze(1) + torch.cat((-x[..., 4:], x[..., :4]), dim=-1) * s.unsqueeze(1), False),
        (lambda x, c, s: x * c.unsqueeze(1) + torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2) * s.unsqueeze(1), False),
        (lambda x, c, s: x * c.unsqueeze(1) - torch.cat((-x[..., 8:], x[..., :8]), dim=-1) * s.unsqueeze(1), False),
    ],
)
def test_rotary_embeddings(function: Callable[[Tensor, Tensor, Tensor], Tensor], found: bool) -> None:
    recorded = graph_of(function, Q, *ANGLES)
    (result,) = recorded.graph.output_node().all_input_nodes
    match = match_turned(result)
    assert (match is not None) == found
    if match is not None:
        assert [node.op for node in (match.x, match.cos, match.sin)] == ["placeholder"] * 3
        assert match.cos is not match.sin


@pytest.mark.parametrize(
    ("reason", "function"),
    [
        (None, lambda q, k, c, s: (turned(q, c, s), turned(k, c, s))),
        (None, lambda q, k, c, s: (q * 2, k * 2)),
        ("query and key are turned by other angles", lambda q, k, c, s: (turned(q, c, s), turned(k, s, c))),
        ("the key is not turned as the other is", lambda q, k, c, s: (turned(q, c, s), k * 2)),
        ("the turned query is read by", lambda q, k, c, s: (turned(q, c, s), turned(k, c, s))),
    ],
)
def test_turns_that_are_left_alone_say_why(
    reason: str | None, function: Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
) -> None:
    recorded = graph_of(function, Q, Q[:, :2], *ANGLES)
    (output,) = (node for node in recorded.graph.nodes if node.op == "output")
    q, k = output.args[0]
    with recorded.graph.inserting_before(output):
        kwargs = {"q": q, "k": k, "cos": None, "sin": None}
        attention = recorded.graph.call_function(FUNCTIONAL, (ATTENTION,), kwargs)
        other = recorded.graph.call_function(torch.ops.aten.neg.default, (q,)) if reason and "read" in reason else None
    output.args = ((attention, other),)
    fused, remarks = fuse_ropes(recorded.graph)
    assert [reason in str(remark) for remark in remarks] == ([True] if reason is not None else []), remarks
    assert fused == (reason is None and match_turned(q) is not None)


def test_equal_operators_become_one_and_others_stay() -> None:
    def function(x: Tensor, s: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return (*rotated(x, s), *rotated(x, s), *rotated(x, t), torch.rand(2), torch.rand(2))

    recorded = graph_of(function, X, SIGNS, SIGNS + 1)
    expected = recorded(X, SIGNS, SIGNS + 1)
    assert merge_equal(recorded.graph) == 3
    recorded.recompile()
    assert targets(recorded) == ["rotate_operand"] * 2
    for one, other in zip(recorded(X, SIGNS, SIGNS + 1)[:6], expected[:6], strict=True):
        assert torch.equal(one, other)
    assert sum("aten.rand" in str(node.target) for node in recorded.graph.nodes) == 2
