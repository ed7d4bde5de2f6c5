"""The parts of all processes make the whole linear, whichever axis is split; what stands in the way is told with what to do."""

from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qpc.checkpoint import regroup
from qpc.errors import CheckpointError, ModelError
from qpc.integrations.parallel.parts import Part, Site, check
from qpc.integrations.parallel.plan import Axis, Split, splits_of
from qpc.kernels.linear import QuantizedLinear
from qpc.quant.mixed import MixedRateQuantizer
from qpc.quant.trellis import TrellisQuantizer
from qpc.report import Report, ReportRow
from tests.families import FAMILIES
from tests.mixtures import MIXTURES, STACKED
from tests.quant.coded import coded

MIXED = MixedRateQuantizer(TrellisQuantizer(4, 13), TrellisQuantizer(5, 14), Fraction(1, 4))
ROWS, COLUMNS = Split(Axis.ROWS, whole=False), Split(Axis.COLUMNS, whole=False)
GATHERED, CUT = Split(Axis.ROWS, whole=True), Split(Axis.COLUMNS, whole=True)


class Block(nn.Module):
    """Stands for a layer: `proj`, and the width of its heads if it has any."""

    def __init__(self, linear: nn.Module, head_dim: int | None = None) -> None:
        super().__init__()
        self.proj = linear
        if head_dim:
            self.head_dim = head_dim


def packed(rows: int, columns: int, block: int = 64) -> QuantizedLinear:
    bias = nn.Parameter(torch.linspace(-1, 1, rows), requires_grad=False)
    return QuantizedLinear.from_packed(coded(MIXED, rows, columns, block), bias)


def plain(rows: int, columns: int) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(columns, rows).requires_grad_(False)


def held(linear: nn.Module, part: Part) -> nn.Module:
    """A linear of the part, filled with what `places` says of the tensors of the whole one."""
    tensors = linear.state_dict()
    found = {leaf: tensors[stored][place] for leaf, (stored, place) in part.places(linear).items()}
    if not isinstance(linear, QuantizedLinear):
        local: nn.Module = nn.Linear(len(part.columns), len(part.rows), bias="bias" in found)
    else:
        local = QuantizedLinear(linear.out_features, linear.in_features, linear.quantizer, linear.block, linear.bias)
        local.narrow(part.rows, part.columns)
        if not part.biased:
            local.bias = None
    assert {leaf: tensor.shape for leaf, tensor in local.state_dict().items()} == {leaf: tensor.shape for leaf, tensor in found.items()}
    local.load_state_dict(found, assign=True)
    return local


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("split", [ROWS, COLUMNS, GATHERED, CUT], ids=["rows", "columns", "gathered", "cut"])
@pytest.mark.parametrize("make", [packed, plain])
def test_parts_make_the_whole(make: Any, split: Split, ranks: int) -> None:
    rows, columns = (320, 320) if split.whole else (384, 384)
    linear = make(rows, columns)
    x = torch.randn(2, 3, columns, generator=torch.Generator().manual_seed(1))
    site = Site.of(Block(linear), "proj", split)
    check([site], ranks)
    assert site.can_share(ranks)
    parts = [Part.of(site, rank, ranks) for rank in range(ranks)]
    products: list[Tensor] = [held(linear, part)(x[..., part.columns.start : part.columns.stop]) for part in parts]
    joined = torch.cat(products, dim=-1) if split.axis is Axis.ROWS else sum(products)
    torch.testing.assert_close(joined, linear(x), rtol=1e-4, atol=1e-3)


def test_members_that_hold_other_columns_are_no_group() -> None:
    model = nn.ModuleDict({name: packed(128, 128) for name in "abcd"})
    model["b"].narrow(range(128), range(64))
    rows = [
        ReportRow(name, 128, 128, str(MIXED), 2.25, 4608, None, None, None, group, None)
        for group in (("a", "b"), ("c", "d"))
        for name in group
    ]
    regroup(model, Report(tuple(rows), (), "2.25", 0, "fast", None, 0, 0, None, None))
    assert model["a"].group is None and model["b"].group is None
    assert model["c"].group is model["d"].group is not None


def test_few_rows_stay_whole() -> None:
    site = Site.of(Block(packed(100, 64)), "proj", GATHERED)
    assert site.can_share(2) and not site.can_share(3), "they are two blocks"


@pytest.mark.parametrize(
    ("linear", "head_dim", "split", "message"),
    [
        (packed(576, 64), 64, ROWS, r"^proj cannot .* it has 9 heads of 64 rows, which are no 2 equal parts; take 3 or 9 processes$"),
        (plain(50, 64), 10, ROWS, r"it has 5 heads of 10 rows, which are no 2 equal parts; take 5 processes"),
        (
            packed(192, 64),
            None,
            ROWS,
            r"of its 192 rows each would hold 96, required a multiple of 64 \(a block of codes\); take 3 processes, or ",
        ),
        (packed(192, 64), None, ROWS, r"or compile again with --exclude '\*\.proj'$"),
        (
            packed(64, 128, 128),
            None,
            COLUMNS,
            r"each would hold 64, required a multiple of 128 .* of its rotation\); compile again with --rotation-block 64$",
        ),
        (
            packed(64, 48, 16),
            None,
            COLUMNS,
            r"each would hold 24, required a multiple of 16 \(a block of codes\); take 3 processes, or compile again with --exclude",
        ),
        (plain(8, 7), None, COLUMNS, r"it has 7 columns, which are no 2 equal parts; take 7 processes$"),
    ],
    ids=["heads", "heads of a plain one", "rows", "exclude", "rotation", "columns of a block", "columns"],
)
def test_obstacles(linear: nn.Module, head_dim: int | None, split: Split, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check([Site.of(Block(linear, head_dim), "proj", split)], 2)


def test_another_number_may_need_another_rotation() -> None:
    """As in SmolLM2: nine heads, and rotations of whole rows."""
    sites = [
        Site.of(Block(packed(576, 64), 64), "proj", ROWS),
        Site.of(Block(packed(64, 576, 576), 64), "proj", COLUMNS),
        Site.of(Block(packed(64, 1536, 1536)), "proj", COLUMNS),
    ]
    with pytest.raises(CheckpointError, match=r"no 2 equal parts; compile again with --rotation-block 64 and take 3 processes$"):
        check(sites, 2)
    with pytest.raises(
        CheckpointError, match=r"of its 9 heads of 64 columns each would hold 192, required a multiple of 576 .* --rotation-block 64$"
    ):
        check(sites, 3)
    check([Site.of(Block(packed(64, size), head), "proj", COLUMNS) for size, head in ((576, 64), (1536, None))], 3)


def test_a_plan_is_that_of_the_family() -> None:
    model = FAMILIES["phi3"]()
    found = {name.removeprefix("model.layers.0."): split for name, split in splits_of(model, ()).items() if "layers.1" not in name}
    pairs = {"self_attn.qkv_proj": GATHERED, "self_attn.o_proj": CUT, "mlp.gate_up_proj": GATHERED, "mlp.down_proj": CUT}
    assert found == pairs | {"lm_head": GATHERED}
    assert "lm_head" not in splits_of(model, ["lm_head.weight", "model.embed_tokens.weight"])


@pytest.mark.parametrize(
    ("make", "tied", "message"),
    [
        pytest.param(FAMILIES["gpt2"], (), "no plan of tensor parallelism for GPT2LMHeadModel; load it without tp", id="none"),
        pytest.param(
            MIXTURES["mixtral"],
            (),
            r"has '\w+' for model\.layers\.0\.mlp\.experts\S*, which cannot be followed: .* experts are not",
            id="experts",
            marks=STACKED,
        ),
        pytest.param(MIXTURES["gpt_oss"], (), "for GptOssForCausalLM splits none of its layers", id="only a head", marks=STACKED),
        pytest.param(
            FAMILIES["llama"],
            ["model.layers.0.mlp.up_proj.weight"],
            r"splits model\.layers\.0\.mlp\.up_proj, which is no linear with a weight of its own",
            id="tied",
        ),
    ],
)
def test_plans_that_cannot_be_followed(make: Any, tied: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        splits_of(make(), tied)
