"""What the rewrites take for a norm or a rotary embedding, and what they leave alone, on graphs as `make_fx` records them."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from qpc.inductor.merge import merge_equal
from qpc.inductor.norms import fuse_norms, match_norm
from qpc.inductor.ropes import match_turned
from qpc.kernels import operand_ops as _operands  # noqa: F401 - importing it registers torch.ops.qpc

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


def graph_of(function: Callable[..., object], *inputs: Tensor) -> fx.GraphModule:
    recorded = make_fx(function, tracing_mode="fake")(*inputs)
    recorded.graph.eliminate_dead_code()
    return recorded


def targets(recorded: fx.GraphModule) -> list[str]:
    names = (str(node.target) for node in recorded.graph.nodes)
    return [name.removeprefix("qpc.").removesuffix(".default") for name in names if name.startswith("qpc.")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("norm", [llama, gemma, olmo])
def test_norms_of_every_spelling(norm: Callable[[Tensor, Tensor], Tensor], dtype: torch.dtype) -> None:
    x, weight = X.to(dtype), WEIGHT.to(dtype)
    plain = graph_of(lambda x, w, s: rotated(norm(x, w), s), x, weight, SIGNS)
    expected = plain(x, weight, SIGNS)
    assert fuse_norms(plain.graph) == 1
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
    assert fuse_norms(recorded.graph) == 1
    recorded.recompile()
    assert targets(recorded) == ["add_norm_operand"]
    assert not any(node.target is torch.ops.aten.add.Tensor for node in recorded.graph.nodes)
    found = recorded(X, other, WEIGHT, SIGNS)
    torch.testing.assert_close(found[1:], expected[1:], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("read elsewhere", lambda x, w, s: (*rotated(llama(x, w), s), llama(x, w).sum(), llama(x, w))),
        ("a layer norm", lambda x, w, s: rotated(torch.nn.functional.layer_norm(x, (FEATURES,), w), s)),
        ("a weight that is computed", lambda x, w, s: rotated(llama(x, w.exp()), s)),
        ("no mean of squares", lambda x, w, s: rotated(w * (x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + EPS)), s)),
        ("a mean of another value", lambda x, w, s: rotated(w * (x * torch.rsqrt((x + 1).pow(2).mean(-1, keepdim=True) + EPS)), s)),
        ("a mean along another axis", lambda x, w, s: rotated(w * (x * torch.rsqrt(x.pow(2).mean(0, keepdim=True) + EPS)), s)),
    ],
)
def test_what_is_left_alone(name: str, function: Callable[..., object]) -> None:
    if name == "read elsewhere":

        def function(x: Tensor, w: Tensor, s: Tensor) -> tuple[Tensor, ...]:
            result = llama(x, w)
            return (*rotated(result, s), result + 1)

    recorded = graph_of(function, X, WEIGHT, SIGNS)
    before = str(recorded.graph)
    assert fuse_norms(recorded.graph) == 0 and str(recorded.graph) == before


def test_a_norm_without_weight_is_none() -> None:
    recorded = graph_of(lambda x: normalized(x), X)
    (result,) = recorded.graph.output_node().all_input_nodes
    assert match_norm(result) is None


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
