"""Regions: closed under operators that commute with a rotation of the last axis, and a reason where something in them does not."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as attention

from qpc.capture import capture
from qpc.ir.annotation import site_of
from qpc.ir.program import Program
from qpc.ir.regions import Obstacle, Region, grow, head_width
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fusion import Fusion
from qpc.passes.pipeline import Pipeline

WIDTH, HEADS = 32, 4


class Block(nn.Module):
    """A stream of `WIDTH` that one linear writes, and one reads behind whatever `between` does to it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.gain, self.other = nn.Parameter(torch.rand(WIDTH)), nn.Parameter(torch.rand(WIDTH))

    def between(self, x: Tensor) -> Tensor:
        return x

    def normalized(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)

    def forward(self, x: Tensor) -> Tensor:
        start = self.first(torch.tanh(x))
        stream = start + self.middle(torch.tanh(self.last(self.between(start))))
        return torch.tanh(self.last(self.between(stream)))


class Gained(Block):
    def between(self, x: Tensor) -> Tensor:
        return (1 + self.gain) * self.normalized(x) / 2


class Centred(Block):
    def between(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True)


class Shifted(Block):
    def between(self, x: Tensor) -> Tensor:
        return x + self.other


class TwoGains(Block):
    def between(self, x: Tensor) -> Tensor:
        return self.normalized(x * self.gain) * self.other


class GainInTheStream(Block):
    def between(self, x: Tensor) -> Tensor:
        return x + self.normalized(x) * self.gain


class Gated(Block):
    def between(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(x)


class Reversed(Block):
    def between(self, x: Tensor) -> Tensor:
        return x.flip(-1)


class Halved(Block):
    """Its blocks of 32 are torn apart."""

    def between(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (2, WIDTH // 2)).transpose(-1, -2).flatten(-2)


class Normalized(Block):
    def between(self, x: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (WIDTH,))


class InPlace(Block):
    def between(self, x: Tensor) -> Tensor:
        y = x.clone()
        y[..., 1:].mul_(2)
        return y


class Rounded(Block):
    def between(self, x: Tensor) -> Tensor:
        return x.to(torch.int32).to(x.dtype)


class Whole(Block):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        start = self.first(torch.tanh(x))
        return start, self.last(start)


class Returned(Block):
    def forward(self, x: Tensor) -> Tensor:
        start = self.first(torch.tanh(x))
        return torch.cat([start, self.last(start)], dim=1)


def analysed(module: nn.Module, length: int = 5) -> Program:
    program = capture(module.eval(), example_inputs=(torch.randn(2, length, WIDTH),))
    Pipeline((Canonicalize(), Fusion())).run(program)
    return program


def around(program: Program, name: str, width: int = WIDTH) -> Region | Obstacle:
    node = next(node for node in program.linears() if site_of(node).name == name)
    return grow(program, node.args[0], width)  # type: ignore[arg-type]


def names(program: Program, region: Region) -> tuple[list[str], list[str]]:
    return [site_of(node).name for node in region.readers], [site_of(node).name for node in region.writers]


@pytest.mark.parametrize("module", [Block, Gained])
def test_a_stream_is_closed(module: type[Block]) -> None:
    program = analysed(module())
    region = around(program, "last")
    assert isinstance(region, Region)
    readers, writers = names(program, region)
    assert (readers, sorted(writers)) == (["last", "last"], ["first", "middle"])
    expected = ["gain"] * 2 if module is Gained else []
    assert [gain.parameter for gain in region.gains] == expected
    assert {gain and (gain.parameter, gain.offset) for gain in region.readers.values()} == ({("gain", 1.0)} if expected else {None})


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (Centred, "aten.sub.Tensor|aten.mean.dim"),
        (Shifted, "does not commute"),
        (TwoGains, "behind the gain gain"),
        (GainInTheStream, "behind the gain gain"),
        (Gated, "aten.sigmoid.default|aten.mul.Tensor"),
        (Reversed, "aten.flip.default"),
        (Halved, "not made of blocks of 32"),
        (Normalized, "aten.layer_norm.default"),
        (InPlace, "in place|does not commute"),
        (Rounded, "not made of blocks"),
        (Returned, "aten.cat.default"),
        (Whole, "what the graph returns"),
    ],
)
def test_what_does_not_commute_is_named(module: type[Block], reason: str) -> None:
    found = around(analysed(module()), "last")
    assert isinstance(found, Obstacle)
    assert any(each in found.reason for each in reason.split("|")), found.reason


class Attention(nn.Module):
    """Grouped heads, of which values are rows `cut` on of a fused projection."""

    def __init__(self, shift: int = 0, gated: bool = False) -> None:
        super().__init__()
        self.shift, self.gated = shift, gated
        self.fused, self.out = nn.Linear(WIDTH, WIDTH + 2 * (WIDTH // 2)), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        half, shape = WIDTH // 2, (*x.shape[:2], -1, WIDTH // HEADS)
        query, key = self.fused(x)[..., :WIDTH], self.fused(x)[..., WIDTH : WIDTH + half]
        value = self.fused(x)[..., WIDTH + half - self.shift : WIDTH + 2 * half - self.shift]
        q, k, v = (each.reshape(shape).transpose(1, 2) for each in (query, key, value))
        k, v = (each[:, :, None].expand(-1, -1, 2, -1, -1).reshape(x.shape[0], HEADS, x.shape[1], -1) for each in (k, v))
        heads = attention(q, k, v).transpose(1, 2).reshape(x.shape)
        result: Tensor = self.out(torch.sigmoid(x) * heads if self.gated else heads)
        return torch.tanh(result)


def test_heads_lead_to_rows_of_a_fused_projection() -> None:
    program = analysed(Attention())
    out = next(node for node in program.linears() if site_of(node).name == "out")
    width = head_width(out.args[0])  # type: ignore[arg-type]
    assert width == WIDTH // HEADS
    region = around(program, "out", width)
    assert isinstance(region, Region)
    assert list(region.writers.values()) == [(WIDTH + WIDTH // 2, 2 * WIDTH)]


def test_a_gate_behind_the_heads_stands_in_the_way() -> None:
    program = analysed(Attention(gated=True))
    out = next(node for node in program.linears() if site_of(node).name == "out")
    assert head_width(out.args[0]) is None  # type: ignore[arg-type]
    assert isinstance(around(program, "out", WIDTH // HEADS), Obstacle)
