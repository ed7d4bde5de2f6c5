"""Embeddings and output heads at a rate of their own: packed once, tied or not, and counted."""

import copy
import json
from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import qpc
from qpc import checkpoint
from qpc.budget import Budget
from qpc.compiler import build, lowering
from qpc.errors import CheckpointError, QuantizerError, SettingsError, VerifierError
from qpc.ir.printer import to_json, to_text
from qpc.ir.verifier import verify
from qpc.kernels.embedding import QuantizedEmbedding
from qpc.kernels.linear import QuantizedLinear
from qpc.kernels.packed_module import PackedModule
from qpc.options import Options
from qpc.passes.embeddings import lookup_scale
from qpc.passes.lower import Lower
from qpc.passes.pipeline import Pipeline
from qpc.quant.palette import Effort, default_palette
from tests.compiled import TOKENS, logits
from tests.families import FAMILIES, WIDTH, decoder

BITS = 6
TIED, APART = ("llama_tied", "gpt2", "gemma2_tied"), ("llama", "gemma3", "llama_odd")


def original(family: str) -> nn.Module:
    if family == "gemma2_tied":
        return decoder("Gemma2", sliding_window=8, query_pre_attn_scalar=16, tie_word_embeddings=True).eval()
    return FAMILIES[family]().eval()


@cache
def pair(family: str) -> tuple[nn.Module, nn.Module]:
    """A tiny model and what is made of it. Nobody may change either."""
    model = original(family)
    return model, qpc.compile(model, budget=4, effort="fast", embeddings=BITS)


def dequantized(model: nn.Module, compiled: nn.Module) -> nn.Module:
    """The oracle: the original class with restored weights in the place of the packed ones, tied where the original is."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in compiled.named_modules():
            if isinstance(module, PackedModule):
                restored, weight = module.packed.restored(), twin.get_submodule(name).weight
                weight.copy_(restored if type(twin.get_submodule(name)).__name__ != "Conv1D" else restored.t())
    return twin


@pytest.mark.parametrize("family", [*TIED, *APART])
def test_a_lookup_is_that_of_the_restored_table(family: str) -> None:
    model, compiled = pair(family)
    assert isinstance(compiled.get_input_embeddings(), QuantizedEmbedding)
    assert isinstance(compiled.get_output_embeddings(), QuantizedLinear)
    expected, found = logits(dequantized(model, compiled)), logits(compiled)
    assert (found - expected).norm() <= 1e-3 * expected.norm()


@pytest.mark.parametrize("family", [*TIED, *APART])
def test_tied_stays_tied_and_bytes_are_as_predicted(family: str) -> None:
    model, compiled = pair(family)
    head, embedding = compiled.get_output_embeddings(), compiled.get_input_embeddings()
    tied = family in TIED
    assert all(
        (one is other) == tied for one, other in zip(head.buffers(), (*embedding.codes, embedding.scales, embedding.signs), strict=True)
    )
    report = qpc.report_of(compiled)
    rows = {row.name: row for row in report.rows if not row.budgeted}
    assert (len(rows) == 1) == (tied and family != "gpt2")  # GPT-2's positions are a table too
    quantizer = default_palette(Effort.FAST).at(Fraction(BITS))
    for row in rows.values():
        assert row.weight_bytes == quantizer.weight_bytes(row.out_features, row.in_features)
        assert row.quantizer == str(quantizer) and row.distortion is not None and row.distortion < 1.5 * quantizer.distortion
    plain = qpc.report_of(qpc.compile(model, budget=4, effort="fast"))
    assert report.linear_bytes == plain.linear_bytes and report.bits_per_weight == plain.bits_per_weight <= 4
    shrunk = sum(4 * row.weights - row.weight_bytes for row in rows.values())
    assert plain.model_bytes - report.model_bytes == shrunk > 0


@pytest.mark.parametrize("family", ["llama_tied", "gemma3"])
def test_little_is_lost_and_less_at_more_bits(family: str) -> None:
    """The distortion falls 34 times from three bits to six, and so should what the tables alone do to the output."""
    model, fine = pair(family)
    coarse = qpc.compile(model, budget=4, effort="fast", embeddings=3)
    assert 10 * tables_alone(model, fine) < tables_alone(model, coarse)
    assert tables_alone(model, fine) < 1e-4


def tables_alone(model: nn.Module, compiled: nn.Module) -> float:
    """Mean KL per token, in nats, of the model with nothing changed but its tables."""
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for name, module in compiled.named_modules():
            if module is compiled.get_input_embeddings() or module is compiled.get_output_embeddings():
                twin.get_submodule(name).weight.copy_(module.packed.restored())
    return divergence(model, twin)


def divergence(model: nn.Module, other: nn.Module) -> float:
    """Mean KL per token, in nats."""
    log_p, log_q = (logits(each).double().log_softmax(-1) for each in (model, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


@pytest.mark.parametrize("family", ["llama_tied", "gemma3", "gpt2"])
def test_generates(family: str) -> None:
    _, compiled = pair(family)
    mask = torch.ones_like(TOKENS)
    assert compiled.generate(TOKENS, attention_mask=mask, max_new_tokens=4, do_sample=False, pad_token_id=0).shape == (2, 24)


@pytest.mark.parametrize("family", ["llama_tied", "gemma3", "gpt2"])
def test_round_trip_is_bit_exact(family: str, tmp_path: Path) -> None:
    _, compiled = pair(family)
    qpc.save(compiled, tmp_path / "one")
    loaded = qpc.load(tmp_path / "one")
    assert torch.equal(logits(loaded), logits(compiled))
    assert qpc.report_of(loaded) == qpc.report_of(compiled)
    head, embedding = loaded.get_output_embeddings(), loaded.get_input_embeddings()
    assert (head.codes0 is embedding.codes0) == (head.signs is embedding.signs) == (family in TIED)
    assert embedding.factor == compiled.get_input_embeddings().factor
    size = (tmp_path / "one" / checkpoint.TENSORS).stat().st_size
    assert 0 <= size - qpc.report_of(compiled).model_bytes < 40_000
    qpc.save(loaded, tmp_path / "two")
    for name in (checkpoint.TENSORS, checkpoint.MANIFEST):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_same_seed_same_bytes() -> None:
    first = pair("llama_tied")[1].state_dict()
    second = qpc.compile(original("llama_tied"), budget=4, effort="fast", embeddings=BITS).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in (*first, *second))
    other = qpc.compile(original("llama_tied"), budget=4, effort="fast", embeddings=BITS, seed=1).state_dict()
    assert not torch.equal(first["lm_head.signs"], other["lm_head.signs"])


def test_a_budget_of_bytes_counts_packed_tables() -> None:
    model, compiled = pair("llama_tied")
    total = qpc.report_of(compiled).model_bytes
    again = qpc.compile(model, budget=f"{total}B", effort="fast", embeddings=BITS)
    assert qpc.report_of(again).model_bytes <= total
    assert qpc.report_of(again).bits_per_weight > 3.9


def test_the_lowered_graph_is_the_model() -> None:
    model, compiled = pair("gemma3")
    program = build(model, Options(Budget.parse("4"), Effort.FAST, embeddings=Fraction(BITS)))
    (line,) = [line for line in to_text(program).splitlines() if "model.embed_tokens.weight " in line and "->" in line]
    assert "96x64" in line
    facts = json.loads(to_json(program))["tables"]
    assert [entry["heads"] for entry in facts] == [[], ["lm_head"]] and facts[0]["lookups"] == [
        {"name": "model.embed_tokens", "scale": 8.0}
    ]
    Pipeline(lowering(program)).run(program)
    found = program.run((TOKENS,))[0]
    torch.testing.assert_close(found, logits(compiled), rtol=1e-4, atol=1e-4)
    lookups = (torch.ops.qpc.scalar_lookup.default, torch.ops.qpc.trellis_lookup.default)
    assert any(node.target in lookups for node in program.graph.nodes)


def test_the_verifier_knows_tables() -> None:
    program = build(pair("llama_tied")[0], Options(Budget.parse("4"), Effort.FAST, embeddings=Fraction(BITS)))
    (name, table), *_ = program.tables.items()
    program.tables[name] = replace(table, packed=replace(table.packed, scales=table.packed.scales.float()))
    with pytest.raises(VerifierError, match="the table scales are"):
        verify(program)
    program.tables[name] = table
    with pytest.raises(VerifierError, match="still read"):
        Pipeline((Lower(),)).run(program)


@pytest.mark.parametrize("family", ["llama_tied", "gemma3"])
def test_backend(family: str) -> None:
    model, compiled = pair(family)
    options = {"budget": 4, "effort": "fast", "embeddings": BITS, "inner": "eager"}
    fast: Any = torch.compile(copy.deepcopy(model), backend="qpalette", options=options)
    with torch.no_grad():
        found = fast(input_ids=TOKENS, use_cache=False).logits
    torch.testing.assert_close(found, logits(compiled), rtol=1e-3, atol=1e-3)


def test_an_excluded_head_keeps_its_table() -> None:
    compiled = qpc.compile(original("llama_tied"), budget=4, effort="fast", embeddings=BITS, exclude=["lm_head"])
    assert isinstance(compiled.get_input_embeddings(), nn.Embedding)
    assert compiled.get_input_embeddings().weight is compiled.get_output_embeddings().weight
    assert any(remark.startswith("embeddings: lm_head: excluded by the pattern") for remark in qpc.report_of(compiled).remarks)
    apart = qpc.compile(original("llama"), budget=4, effort="fast", embeddings=BITS, exclude=["lm_head"])
    assert isinstance(apart.get_input_embeddings(), QuantizedEmbedding)
    assert isinstance(apart.get_output_embeddings(), nn.Linear)


class Shifted(nn.Embedding):
    def forward(self, indices: Tensor) -> Tensor:
        return super().forward(indices) + 1


class Half(nn.Embedding):
    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.portion = 0.5

    def forward(self, indices: Tensor) -> Tensor:
        return super().forward(indices) * self.portion


class Reader(nn.Module):
    def __init__(self, embedding: nn.Embedding, width: int = WIDTH) -> None:
        super().__init__()
        self.embedding = embedding
        self.up = nn.Linear(width, 3 * width)

    def forward(self, indices: Tensor) -> Tensor:
        result: Tensor = self.up(self.embedding(indices))
        return result


class Leaky(Reader):
    """Reads its table otherwise too."""

    def forward(self, indices: Tensor) -> Tensor:
        return super().forward(indices) + self.embedding.weight.mean()


def compiled_reader(model: nn.Module) -> tuple[nn.Module, tuple[str, ...]]:
    """What is made of a module that reads indices, and the remarks about its table."""
    indices = torch.arange(12).reshape(3, 4) % 5
    compiled = qpc.compile(model.eval(), budget=6, effort="fast", embeddings=BITS, example_inputs=(indices,))
    return compiled, tuple(remark for remark in qpc.report_of(compiled).remarks if remark.startswith("embeddings"))


@pytest.mark.parametrize(
    ("build_reader", "reason"),
    [
        (lambda: Reader(Shifted(90, WIDTH)), "its class Shifted does more than look rows up and scale them"),
        (lambda: Leaky(nn.Embedding(90, WIDTH)), "also read by aten.mean"),
        (lambda: Reader(nn.Embedding(5, WIDTH)), "does not make it smaller than its 1280 bytes"),
    ],
)
def test_other_tables_stay_and_say_why(build_reader: Callable[[], nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    model = build_reader()
    compiled, remarks = compiled_reader(model)
    assert type(compiled.embedding) is type(model.embedding)
    assert len(remarks) == 1 and reason in remarks[0]


def test_a_table_that_its_lookup_changes_has_no_scale() -> None:
    assert lookup_scale(nn.Embedding(90, WIDTH, max_norm=1.0)) is None


def test_a_scale_is_found_whatever_it_is_called() -> None:
    torch.manual_seed(0)
    assert lookup_scale(Half(90, WIDTH)) == 0.5
    compiled, remarks = compiled_reader(model := Reader(Half(90, WIDTH)))
    assert remarks == () and compiled.embedding.factor == 0.5
    indices = torch.arange(90)
    torch.testing.assert_close(compiled.embedding(indices), 0.5 * compiled.embedding.packed.restored())
    assert (compiled.embedding(indices) - model.embedding(indices)).norm() < 0.05 * model.embedding(indices).norm()


@pytest.mark.parametrize(("bits", "error"), [("six", SettingsError), (5.9, QuantizerError), (0, QuantizerError)])
def test_a_rate_must_be_one_of_the_palette(bits: Any, error: type[Exception]) -> None:
    with pytest.raises(error):
        qpc.compile(original("llama"), budget=4, effort="fast", embeddings=bits)


@pytest.mark.parametrize(
    "change", [{"dtype": "int8"}, {"scale": None}, {"block": 5}, {"num_embeddings": 7}, {"quantizer": {}}, {"embedding_dim": "64"}]
)
def test_malformed_entries(change: dict[str, object], tmp_path: Path) -> None:
    qpc.save(pair("llama_tied")[1], tmp_path / "damaged")
    path = tmp_path / "damaged" / checkpoint.MANIFEST
    manifest = json.loads(path.read_text())
    manifest["embeddings"]["model.embed_tokens"] |= change
    path.write_text(json.dumps(manifest))
    with pytest.raises(qpc.QpcError) as caught:
        qpc.load(tmp_path / "damaged")
    assert isinstance(caught.value, CheckpointError | QuantizerError)
