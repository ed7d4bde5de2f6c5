"""Fold: no output changes, what is rotated at run time gets less, and where it does not apply a remark says why."""

import json
from collections.abc import Callable
from fractions import Fraction
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import qpc
from qpc.capture import capture
from qpc.compiler import install
from qpc.errors import CheckpointError
from qpc.ir.annotation import site_of
from qpc.ir.program import Program
from qpc.kernels.gain import TurnedGain, turned_gain
from qpc.kernels.linear import QuantizedLinear
from qpc.passes.allocate import Allocate
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fold import Fold
from qpc.passes.folding import Folded, Rows, gain_price
from qpc.passes.fusion import Fusion
from qpc.passes.lower import Lower
from qpc.passes.pipeline import Pipeline
from qpc.passes.quantize import Quantize
from qpc.quant.palette import Effort, default_palette
from qpc.quant.rotation import Rotation
from tests.compiled import dequantized, logits
from tests.families import FAMILIES, decoder, tokens

MORE: dict[str, Callable[[], nn.Module]] = {
    "qwen2_tied": partial(decoder, "Qwen2", tie_word_embeddings=True),
    "gemma": partial(decoder, "Gemma", tie_word_embeddings=False),
    "gemma_tied": partial(decoder, "Gemma", tie_word_embeddings=True),
    "granite": partial(decoder, "Granite", embedding_multiplier=3.0, residual_multiplier=0.5, logits_scaling=2.0),
    "eager": partial(decoder, "Llama", attn_implementation="eager"),
}
WHOLE = ("llama", "llama_tied", "qwen2", "qwen3", "mistral", "phi3", "qwen2_tied", "gemma", "gemma_tied", "granite", "eager")
"""Families whose stream and heads are folded."""
REFUSED = {
    "gemma2": "post_attention_layernorm.weight, which no rotation commutes with",
    "gemma3": "post_attention_layernorm.weight, which no rotation commutes with",
    "olmo2": "post_attention_layernorm.weight, which no rotation commutes with",
    "gpt2": "layer_norm",
}
"""Families whose stream stays, and a part of the reason."""


def model_of(family: str) -> nn.Module:
    """A model whose gains are not all one, as they are when it is made."""
    model, generator = (FAMILIES | MORE)[family]().eval(), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for value in model.parameters():
            if value.ndim == 1:
                value += torch.randn(value.shape, generator=generator) / 4
    return model


def grouped(module: nn.Module, example: Tensor | None = None) -> Program:
    program = capture(module, example_inputs=None if example is None else (example,))
    Pipeline((Canonicalize(), Fusion())).run(program)
    return program


def lowered(program: Program) -> Program:
    quantizer = default_palette(Effort.FAST).at(Fraction(4))
    Pipeline((Allocate.uniform(quantizer), Quantize(), Lower())).run(program)
    return program


def rotations(program: Program) -> int:
    return len(program.graph.find_nodes(op="call_function", target=torch.ops.qpc.rotate.default))


@pytest.mark.parametrize("family", WHOLE)
def test_a_folded_model_gives_the_same_outputs(family: str) -> None:
    """In float64, on the device of the test: as a graph, and as the module that takes the original's place."""
    model = model_of(family).double()
    program = grouped(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    (result,) = Pipeline((Fold(),)).run(program).values()
    expected = logits(model, tokens())
    for found in (program.run((tokens(),))[0], logits(program.module, tokens())):
        assert (found - expected).abs().max() <= 1e-6 * expected.abs().max()  # norms and softmaxes are computed in float32
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the original stays as it was"
    assert any("as much error" in remark.reason for remark in result.remarks)
    rest = {site_of(node).weight for node in program.linears()} - program.rotated
    assert rest == {name for name in rest if name.endswith("down_proj.weight")}
    one, other = program.module.get_input_embeddings().weight, program.module.get_output_embeddings().weight
    assert (one is other) == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)


@pytest.mark.parametrize("family", ["llama", "phi3", "llama_tied"])
def test_one_transform_of_four_is_left_in_a_layer(family: str) -> None:
    model = model_of(family)
    layers = model.config.num_hidden_layers
    assert rotations(lowered(grouped(model))) == 4 * layers
    program = grouped(model)
    Pipeline((Fold(),)).run(program)
    assert rotations(lowered(program)) == layers
    compiled = install(program)
    turned = [name for name, module in compiled.named_modules() if isinstance(module, QuantizedLinear) and module.block]
    assert len(turned) == layers and all(name.endswith("down_proj") for name in turned)
    expected = logits(dequantized(compiled), tokens())
    for found in (logits(compiled, tokens()), program.run((tokens(),))[0]):
        assert (found - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("family", REFUSED)
def test_where_it_does_not_apply_a_remark_says_why(family: str) -> None:
    program = grouped(model_of(family))
    (result,) = Pipeline((Fold(),)).run(program).values()
    assert any(REFUSED[family] in remark.reason for remark in result.remarks)
    heads = {name for name in program.rotated if name.endswith("o_proj.weight")}
    assert program.rotated == heads


def test_heads_that_are_too_narrow_are_rotated_at_run_time() -> None:
    program = grouped(FAMILIES["llama_odd"]())
    (result,) = Pipeline((Fold(),)).run(program).values()
    assert any("would mix only 20 inputs" in remark.reason for remark in result.remarks)
    assert not any("o_proj" in name for name in program.rotated)


@pytest.mark.parametrize("family", ["llama", "llama_tied", "gemma_tied"])
def test_checkpoints_keep_what_was_folded(family: str, tmp_path: Path) -> None:
    compiled = qpc.compile(model_of(family), budget=4, effort="fast", calibration=None, sensitivity="random", fold=True)
    qpc.save(compiled, tmp_path / "out")
    loaded = qpc.load(tmp_path / "out")
    assert torch.equal(logits(loaded), logits(compiled))
    assert [type(module) for module in loaded.modules()] == [type(module) for module in compiled.modules()]
    turned = [module for module in loaded.modules() if isinstance(module, TurnedGain)]
    assert len(turned) == ("tied" in family)
    whole = torch.compile(loaded, backend="eager", fullgraph=True)
    assert torch.equal(logits(whole), logits(compiled))
    ids = loaded.generate(tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0)
    assert torch.equal(ids, compiled.generate(tokens(), max_new_tokens=3, do_sample=False, pad_token_id=0, use_cache=False))
    half = loaded.bfloat16()
    assert logits(half).dtype == torch.bfloat16 and all(module.signs.dtype == torch.uint8 for module in turned)


@pytest.mark.parametrize(("key", "value"), [("offset", None), ("block", 0), ("block", 7)])
def test_a_damaged_gain_is_named(key: str, value: object, tmp_path: Path) -> None:
    compiled = qpc.compile(model_of("llama_tied"), budget=4, effort="fast", calibration=None, sensitivity="random", fold=True)
    qpc.save(compiled, tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "qpc.json").read_text())
    manifest["gains"]["model.norm"][key] = value
    (tmp_path / "out" / "qpc.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match=r"model\.norm"):
        qpc.load(tmp_path / "out")


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_packed_tables_that_are_folded_are_not_rotated_again(family: str) -> None:
    model = model_of(family)
    compiled = qpc.compile(model, budget=4, effort="fast", embeddings=6, calibration=None, sensitivity="random", fold=True)
    assert compiled.get_input_embeddings().block == compiled.get_output_embeddings().block == 0
    expected = logits(dequantized(compiled))
    assert (logits(compiled) - expected).norm() <= 1e-3 * expected.norm()


class Drawn(nn.Module):
    """Adds noise to its stream, anew each time: no two runs agree."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.last(self.first(torch.tanh(x)))) + torch.rand_like(x)


def test_nothing_is_folded_if_the_outputs_are_not_the_same() -> None:
    module = Drawn()
    program = grouped(module, torch.randn(4, 64))
    (result,) = Pipeline((Fold(),)).run(program).values()
    assert any("would change the outputs" in remark.reason for remark in result.remarks)
    assert program.module is module and not program.rotated and not result.changed


class Norm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 + torch.rand(width))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Residual(nn.Module):
    """Linears with biases around a stream of any width."""

    def __init__(self, width: int, inner: int, tied: bool) -> None:
        super().__init__()
        self.read, self.write = nn.Linear(inner, width), nn.Linear(width, inner)
        self.norm, self.head = Norm(width), nn.Linear(width, inner)
        if tied:
            self.head.weight = self.write.weight

    def forward(self, x: Tensor) -> Tensor:
        stream = self.read(torch.tanh(x))
        stream = stream + self.read(torch.tanh(self.write(self.norm(stream)))) * 0.5
        return torch.tanh(self.head(stream))


@settings(max_examples=12)
@given(st.integers(2, 80), st.integers(1, 40), st.booleans(), st.one_of(st.none(), st.sampled_from([1, 4, 16])))
def test_streams_of_any_width(width: int, inner: int, tied: bool, limit: int | None) -> None:
    torch.manual_seed(width)
    module, x = Residual(width, inner, tied).double().eval(), torch.randn(4, inner, dtype=torch.float64)
    program = grouped(module, x)
    (result,) = Pipeline((Fold(rotation_block=limit),)).run(program).values()
    torch.testing.assert_close(program.module(x), module(x), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(program.run((x,))[0], module(x), rtol=1e-12, atol=1e-12)
    assert "write.weight" in program.rotated
    assert any(isinstance(each, TurnedGain) for each in program.module.modules()) == tied
    assert any("norm.weight" in remark.subject for remark in result.remarks) == tied


@settings(max_examples=30)
@given(st.integers(1, 48), st.integers(1, 3), st.integers(0, 5), st.booleans())
def test_a_fold_undoes_a_rotation_of_the_inputs_and_makes_one_of_the_outputs(
    width: int, blocks: int, before: int, transposed: bool
) -> None:
    generator = torch.Generator().manual_seed(width)
    inside, outside = Rotation.random(width, generator), Rotation.random(width, generator)
    features, rows = width * blocks, before + width + 3
    weight, gain = torch.randn(rows, features, dtype=torch.float64), torch.rand(features, dtype=torch.float64)
    x = torch.randn(7, features, dtype=torch.float64)
    folded = Folded(gain, inside, Rows(before, before + width, outside), transposed)(weight.t() if transposed else weight)
    turned = inside.apply(x.reshape(7, blocks, width)).reshape(7, features)
    found, expected = turned @ (folded if transposed else folded.t()), (gain * x) @ weight.t()
    expected[:, before : before + width] = outside.apply(expected[:, before : before + width])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_the_price_of_a_gain_is_that_of_ideal_feedback() -> None:
    """Its definition: the mean square of the weight, times the geometric mean of the eigenvalues of the moment of its inputs."""
    generator = torch.Generator().manual_seed(0)
    weight, gain, inputs = (torch.randn(size, generator=generator, dtype=torch.float64) for size in ((40, 24), (24,), (99, 24)))
    moment = inputs.T @ inputs

    def left(weight: Tensor, moment: Tensor) -> Tensor:
        return weight.square().mean() * (torch.logdet(moment) / 24).exp()

    behind = gain[:, None] * moment * gain
    assert gain_price(weight, gain) == pytest.approx(float(left(weight * gain, moment) / left(weight, behind)), rel=1e-9)
    assert gain_price(weight, torch.full((24,), 0.5)) == pytest.approx(1)
    assert gain_price(weight, torch.zeros(24)) == 1
    balanced = torch.randn(40, 24, generator=generator, dtype=torch.float64).sign() / gain
    assert gain_price(balanced, gain) <= 1, "the gain makes all columns alike"


def test_a_turned_gain_is_that_of_the_values_before_the_rotation() -> None:
    rotation = Rotation.random(36, torch.Generator().manual_seed(0))
    x, gain = torch.randn(2, 5, 36, dtype=torch.float64), torch.rand(36, dtype=torch.float64)
    found = turned_gain(rotation.apply(x), gain, rotation.signs, rotation.block)
    torch.testing.assert_close(found, rotation.apply(x * gain), rtol=1e-12, atol=1e-12)
