"""Exported models in stock ONNX Runtime against the eager compiled model."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

import onnx
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

import qpc
from qpc.checkpoint import tensor_bytes
from qpc.errors import CheckpointError, ModelError, UsageError
from qpc.integrations.onnx import export, functions, graph
from qpc.integrations.onnx.translation import operator
from qpc.quant.trellis import TrellisQuantizer
from tests.compiled import compiled_pair
from tests.families import FAMILIES
from tests.integrations.onnx.runtime import initializers, run, session

VOCABULARY = 90


@dataclass(frozen=True)
class Exported:
    """A checkpoint, its model in float32, and the file made of it."""

    directory: Path
    path: Path

    @cached_property
    def eager(self) -> nn.Module:
        return qpc.load(self.directory).float()

    @cached_property
    def session(self) -> Any:
        return session(self.path)

    def logits(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> NDArray[Any]:
        mask = torch.ones_like(ids) if mask is None else mask
        return run(self.session, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()} | self.nothing(len(ids)))[0]

    def nothing(self, batch: int) -> dict[str, NDArray[Any]]:
        """The cache before the first token."""
        past = [value for value in self.session.get_inputs() if value.name.startswith("past_key_values.")]
        return {value.name: np.zeros((batch, value.shape[1], 0, value.shape[3]), dtype=np.float32) for value in past}

    def expected(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> NDArray[Any]:
        mask = torch.ones_like(ids) if mask is None else mask
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        model: Any = self.eager
        with torch.no_grad():
            return model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False).logits.numpy()


def exported(model: nn.Module, home: Path, cache: bool) -> Exported:
    qpc.save(model, home / "out")
    return Exported(home / "out", export(home / "out", home / "model.onnx", cache=cache)[0])


@pytest.fixture(scope="module", params=[True, False], ids=["cache", "no-cache"])
def llama(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny Llama with tied embeddings."""
    return exported(compiled_pair("llama_tied")[1], tmp_path_factory.mktemp("llama"), request.param)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(batch + length))


def close(made: NDArray[Any], expected: NDArray[Any]) -> None:
    assert made.shape == expected.shape
    assert np.abs(made - expected).max() <= 2e-5 * np.abs(expected).max()


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 7), (3, 2), (2, 33)])
def test_logits_at_any_batch_and_length(llama: Exported, batch: int, length: int) -> None:
    ids = tokens(batch, length)
    close(llama.logits(ids), llama.expected(ids))


def test_padding_on_the_left_is_masked(llama: Exported) -> None:
    ids = tokens(2, 8)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    close(llama.logits(ids, mask)[0], llama.expected(ids)[0])
    close(llama.logits(ids, mask)[1, 3:], llama.expected(ids[1:, 3:])[0])


def test_checker_and_shape_inference_are_content(llama: Exported) -> None:
    onnx.checker.check_model(str(llama.path), full_check=True)
    model = onnx.load(llama.path)
    assert {each.domain: each.version for each in model.opset_import} == {"": functions.OPSET, "qpc": functions.VERSION}
    used = {node.domain for body in (model.graph, *model.functions) for node in body.node}
    assert used == {"", "qpc"}, "nothing but standard operators and our functions"
    assert {(each.domain, each.name) for each in model.functions} >= {("qpc", "packed_linear"), ("qpc", "rotate")}


def test_sizes_have_names(llama: Exported) -> None:
    inputs = {value.name: value.shape for value in llama.session.get_inputs()}
    outputs = {value.name: value.shape for value in llama.session.get_outputs()}
    assert inputs.pop("input_ids") == ["batch", "length"]
    assert outputs.pop("logits")[:2] == ["batch", "length"]
    if inputs.pop("attention_mask") == ["batch", "past + length"]:
        names = [f"{layer}.{kind}" for layer in range(2) for kind in ("key", "value")]
        assert inputs == {f"past_key_values.{name}": ["batch", 2, "past", 32] for name in names}
        assert outputs == {f"present.{name}": ["batch", 2, "past + length", 32] for name in names}
    else:
        assert not inputs and not outputs


def test_each_tensor_is_stored_once_as_it_is(llama: Exported) -> None:
    stored = initializers(llama.path)
    packed = sum(size for name, size in tensor_bytes(llama.directory).items())
    made = sum(tensor.nbytes for tensor in stored.values())
    assert made <= packed + (1 << 15), "beside the checkpoint there are tables, Hadamard matrices and small constants only"
    state = llama.eager.state_dict()
    for name, tensor in stored.items():
        if ".codes" in name:
            assert np.array_equal(tensor.numpy(), state[name.removeprefix("model.")].numpy())
    tied = [name for name, tensor in stored.items() if tuple(tensor.shape) == tuple(state["lm_head.weight"].shape)]
    assert len(tied) == 1


def greedy(llama: Exported, ids: torch.Tensor, count: int) -> list[list[int]]:
    """A continuation through the cache, or with everything read anew."""
    names = list(llama.nothing(1))
    past, step, found = llama.nothing(len(ids)), ids, ids
    for _ in range(count):
        if not names:
            step = found
        mask = torch.ones_like(found)
        logits, *present = run(llama.session, {"input_ids": step.numpy(), "attention_mask": mask.numpy(), **past})
        past = dict(zip(names, present, strict=True))
        step = torch.from_numpy(logits[:, -1:].argmax(-1))
        found = torch.cat([found, step], dim=1)
    return found[:, ids.shape[1] :].tolist()


def test_greedy_continuation(llama: Exported) -> None:
    ids = tokens(2, 5)
    model: Any = llama.eager
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False, eos_token_id=None)
    assert greedy(llama, ids, 32) == expected[:, 5:].tolist()


def test_decoding_at_each_run_gives_the_same(llama: Exported) -> None:
    ids = tokens(1, 6)
    inputs = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()} | llama.nothing(1)
    close(run(session(llama.path, packed=True), inputs)[0], llama.expected(ids))


@pytest.mark.parametrize("family", ["llama_odd", "gemma3", "gpt2"])
def test_families(family: str, tmp_path: Path) -> None:
    """Padded shapes, windows that are shorter than the context, biases."""
    made = exported(compiled_pair(family)[1], tmp_path, cache=True)
    for batch, length in ((1, 1), (2, 21)):
        ids = tokens(batch, length)
        close(made.logits(ids), made.expected(ids))


def test_packed_embeddings_are_read_by_rows(tmp_path: Path) -> None:
    compiled = qpc.compile(FAMILIES["llama_tied"](), budget=4, effort="fast", embeddings=5, calibration=None, tune="off")
    made = exported(compiled, tmp_path, cache=False)
    ids = tokens(2, 9)
    close(made.logits(ids), made.expected(ids))
    assert sum(tensor.nbytes for tensor in initializers(made.path).values()) <= sum(tensor_bytes(made.directory).values()) + (1 << 15)


def test_large_models_have_a_second_file_where_halves_stay_halves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "EXTERNAL_BYTES", 1000)
    original = FAMILIES["llama_tied"]().bfloat16()
    made = exported(qpc.compile(original, budget=3.5, effort="fast", calibration=None, tune="off"), tmp_path, cache=False)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.data", "out"]
    onnx.checker.check_model(str(made.path), full_check=True)
    ids = tokens(2, 9)
    close(made.logits(ids), made.expected(ids))
    table = tuple(made.eager.state_dict()["lm_head.weight"].shape)
    assert [tensor.dtype.name for tensor in initializers(made.path).values() if tuple(tensor.shape) == table] == ["BFLOAT16"]


def test_what_is_replaced_leaves_nothing_behind(tmp_path: Path) -> None:
    qpc.save(compiled_pair("llama_tied")[1], tmp_path / "out")
    (tmp_path / "model.onnx.data").write_text("of a larger model")
    with pytest.raises(UsageError, match=r"model\.onnx\.data exists"):
        export(tmp_path / "out", tmp_path / "model.onnx")
    assert export(tmp_path / "out", tmp_path / "model.onnx", cache=False, overwrite=True) == (tmp_path / "model.onnx",)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "out"]


@pytest.mark.parametrize("family", ["llama", "llama_tied"])
def test_folded_models_keep_their_turned_gains(family: str, tmp_path: Path) -> None:
    """A table that is the output head too turns what it gives in the graph."""
    compiled = qpc.compile(FAMILIES[family](), budget=4, effort="fast", fold=True, calibration=None, tune="off")
    made = exported(compiled, tmp_path, cache=False)
    ids = tokens(2, 9)
    close(made.logits(ids), made.expected(ids))


class packed_linear(OpRun):
    """`qpc::packed_linear` as one operator; its class is found by this name."""

    op_domain = "qpc"
    op_schema = operator(functions.packed_linear).op_schema

    def _run(self, x: Any, codes: Any, table: Any, scales: Any, bias: Any, **attributes: int) -> tuple[NDArray[Any]]:
        part = TrellisQuantizer(attributes["step_bits"], attributes["window_bits"])
        weight = part.decode(torch.from_numpy(codes.copy())).numpy() * scales.astype(np.float32)[:, None]
        return (x @ weight[: attributes["out_features"], : x.shape[-1]].T + bias,)


def test_one_operator_may_take_the_place_of_a_function(llama: Exported) -> None:
    """As a runtime with a kernel of its own does it, here the reference evaluator of onnx."""
    model = onnx.load(llama.path)
    kept = [each for each in model.functions if each.name != "packed_linear"]
    assert len(kept) == len(model.functions) - 1
    del model.functions[:]
    model.functions.extend(kept)
    ids = tokens(1, 5)
    inputs = {"input_ids": ids.numpy(), "attention_mask": torch.ones_like(ids).numpy()} | llama.nothing(1)
    logits = ReferenceEvaluator(model, new_ops=[packed_linear]).run(["logits"], inputs)[0]
    close(logits, llama.expected(ids))


def test_mistakes_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    qpc.save(compiled_pair("llama_tied")[1], tmp_path / "out")
    (tmp_path / "taken.onnx").write_text("")
    with pytest.raises(UsageError, match="exists"):
        export(tmp_path / "out", tmp_path / "taken.onnx")
    with pytest.raises(UsageError, match="directory"):
        export(tmp_path / "out", tmp_path)
    with pytest.raises(UsageError, match="writable"):
        export(tmp_path / "out", tmp_path / "none" / "model.onnx")
    with pytest.raises(CheckpointError, match="not a directory"):
        export(tmp_path / "none", tmp_path / "model.onnx")
    monkeypatch.delitem(graph.TRANSLATIONS, torch.ops.qpc.trellis_linear.default)
    with pytest.raises(ModelError, match=r"qpc\.trellis_linear"):
        export(tmp_path / "out", tmp_path / "model.onnx")
    monkeypatch.setattr("qpc.integrations.onnx.PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(UsageError, match=r"no_such_package: pip install 'qpc\[onnx\]'"):
        export(tmp_path / "out", tmp_path / "model.onnx")
    assert not (tmp_path / "model.onnx").exists()
