"""Checkpoints: what is read is what was written; damage is named; nothing half-written ever stands under the final name."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

import qpc
from qpc import checkpoint
from qpc.errors import CheckpointError
from qpc.kernels.linear import QuantizedLinear
from qpc.output_directory import replacing
from qpc.page import Source
from tests.compiled import compiled_pair, logits
from tests.families import FAMILIES


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, Path]:
    _, model = compiled_pair(request.param)
    directory = tmp_path_factory.mktemp("checkpoint") / request.param
    qpc.save(model, directory)
    return model, directory


@pytest.fixture
def small(tmp_path: Path) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    qpc.save(qpc.compile(model, budget=3, effort="fast", example_inputs=(torch.randn(2, 64),)), tmp_path / "small")
    return tmp_path / "small"


def fresh() -> nn.Module:
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))


def test_round_trip_is_bit_exact(saved: tuple[nn.Module, Path], tmp_path: Path) -> None:
    model, directory = saved
    loaded = qpc.load(directory)
    assert type(loaded) is type(model)
    assert torch.equal(logits(loaded), logits(model))
    assert qpc.report_of(loaded) == qpc.report_of(model)
    assert loaded.generate(torch.tensor([[1, 2, 3]]), min_new_tokens=3, max_new_tokens=3, do_sample=False, pad_token_id=0).shape == (1, 6)
    qpc.save(loaded, tmp_path / "again")
    for name in (checkpoint.TENSORS, checkpoint.MANIFEST):
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


def test_tied_weights_are_stored_once(saved: tuple[nn.Module, Path]) -> None:
    model, directory = saved
    loaded = qpc.load(directory)
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    assert (loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight) == (head.weight is embedding.weight)
    distinct = {tensor.untyped_storage().data_ptr(): tensor for tensor in model.state_dict().values()}
    size = (directory / checkpoint.TENSORS).stat().st_size
    assert size < sum(tensor.untyped_storage().nbytes() for tensor in distinct.values()) + 60_000


def test_report_counts_what_is_stored(saved: tuple[nn.Module, Path]) -> None:
    _, directory = saved
    report = checkpoint.read_report(directory)
    size = (directory / checkpoint.TENSORS).stat().st_size
    assert 0 <= size - report.model_bytes < 40_000, "only safetensors' own header may come on top"


def test_parts_are_read_without_the_tensors(saved: tuple[nn.Module, Path]) -> None:
    model, directory = saved
    with safe_open(directory / checkpoint.TENSORS, framework="pt") as file:
        assert checkpoint.tensor_bytes(directory) == {name: file.get_tensor(name).nbytes for name in file.keys()}  # noqa: SIM118
    packed = {name: module.quantizer for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert checkpoint.read_quantizers(directory) == packed


def test_plain_module_needs_its_class(small: Path) -> None:
    x = torch.randn(3, 64)
    assert qpc.load(small, fresh())(x).shape == (3, 32)
    with pytest.raises(CheckpointError, match="64x64"):
        qpc.load(small, nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 32)))
    with pytest.raises(CheckpointError, match="does not have"):
        qpc.load(small, nn.Sequential(nn.Linear(64, 64)))


@pytest.mark.parametrize("keep", [0, 7, 100, 0.5, 0.99])
@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.MANIFEST])
def test_cut_short(small: Path, name: str, keep: float) -> None:
    path = small / name
    whole = path.read_bytes()
    path.write_bytes(whole[: int(keep * len(whole)) if keep < 1 else int(keep)])
    with pytest.raises(CheckpointError, match=r"cut short|damaged|not a manifest"):
        qpc.load(small, fresh())
    if name == checkpoint.MANIFEST or keep in (0, 7, 100):  # beyond, the header of the tensors is whole
        with pytest.raises(CheckpointError, match=r"cut short|damaged|not a manifest"):
            Source.read(small)


def edit(directory: Path, change: dict[str, object]) -> None:
    path = directory / checkpoint.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | change))


def test_unknown_version(small: Path) -> None:
    edit(small, {"format_version": 99})
    with pytest.raises(CheckpointError, match="format version 99, this qpc reads 3"):
        qpc.load(small, fresh())


def test_missing_parts(small: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="not a directory"):
        qpc.load(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"no qpc\.json"):
        qpc.load(tmp_path / "empty")
    (small / checkpoint.TENSORS).unlink()
    for read in (lambda: qpc.load(small, fresh()), lambda: Source.read(small)):
        with pytest.raises(CheckpointError, match="missing"):
            read()


@pytest.mark.parametrize(
    "entry",
    [
        None,
        {},
        {"out_features": "64"},
        {"out_features": 64, "in_features": 64, "block": 5, "quantizer": {}},
        {"out_features": -1, "in_features": 64, "block": 64},
    ],
)
def test_malformed_entries(small: Path, entry: object) -> None:
    linears = json.loads((small / checkpoint.MANIFEST).read_text())["linears"]
    edit(small, {"linears": linears | {"0": entry}})
    with pytest.raises(qpc.QpcError):
        qpc.load(small, fresh())
    with pytest.raises(qpc.QpcError):
        Source.read(small)


def test_interrupted_write_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "out") as partial:
        (partial / "half").write_text("half")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


def test_existing_directory_is_kept_unless_overwriting_succeeds(tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "precious").write_text("old")
    with pytest.raises(CheckpointError, match="not empty"), replacing(target):
        pass
    with pytest.raises(RuntimeError), replacing(target, overwrite=True):
        raise RuntimeError
    assert (target / "precious").read_text() == "old"
    with replacing(target, overwrite=True) as partial:
        (partial / "new").write_text("new")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert [path.name for path in target.iterdir()] == ["new"]


def test_a_group_is_on_one_device() -> None:
    model = qpc.compile(FAMILIES["llama"]().eval(), budget=3, effort="fast", calibration=None, same_quantizer_in_group=True)
    report = qpc.report_of(model)
    checkpoint.regroup(model, report)
    member = next(row.group[-1] for row in report.rows if len(row.group) > 1)
    model.get_submodule(member).to("meta")
    with pytest.raises(CheckpointError, match=f"{member} are one weight, and cannot be on cpu and meta"):
        checkpoint.regroup(model, report)


def test_unwritable_place(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="writable directory"), replacing(tmp_path / "file" / "out"):
        pass
    with pytest.raises(CheckpointError, match="is a file"), replacing(tmp_path / "file"):
        pass
    if os.geteuid() != 0:  # root may write anywhere
        (tmp_path / "locked").mkdir(mode=0o500)
        with pytest.raises(CheckpointError, match="writable"), replacing(tmp_path / "locked" / "out"):
            pass
