"""Verification: what was saved by any door is found intact, and each kind of damage is named, wherever a bit was turned."""

import json
import random
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import qpc
from qpc import checkpoint, tensor_files
from qpc.__main__ import main
from qpc.errors import CheckpointError
from qpc.sensitivity import Loss, Sensitivities
from tests.families import decoder

NAME = "model.layers.0.mlp.down_proj.codes0"


@cache
def compiled() -> nn.Module:
    """A tiny model with a packed, tied embedding. Nobody may change it."""
    model = decoder("Llama", tie_word_embeddings=True, num_hidden_layers=1)
    alike = Sensitivities({name: 1.0 for name, _ in model.named_modules() if name.endswith("_proj")}, Loss.KL, 0.0, 0, 1)
    return qpc.compile(model, 2.1, effort="fast", calibration=None, sensitivities=alike, embeddings=8)


@pytest.fixture(scope="module", params=["save", "save_pretrained", "shards"])
def pristine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory: Path = tmp_path_factory.mktemp("pristine") / request.param
    if request.param == "save":
        qpc.save(compiled(), directory)
    else:
        compiled().save_pretrained(directory, max_shard_size="5GB" if request.param == "save_pretrained" else "20KB")
    return directory


@pytest.fixture
def saved(pristine: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return shutil.copytree(pristine, tmp_path / "saved")


def test_what_was_saved_is_intact(pristine: Path) -> None:
    found = qpc.verify(pristine)
    stored = checkpoint.stored(compiled())
    assert found.intact and found.problems == ()
    assert found.tensors == len(stored) and found.tensor_bytes == sum(tensor.nbytes for tensor in stored.values())
    assert qpc.load(pristine, verify=True).state_dict().keys() == compiled().state_dict().keys()


def test_every_door_writes_the_same_checksums(pristine: Path) -> None:
    expected = {name: tensor_files.checksum(tensor) for name, tensor in checkpoint.stored(compiled()).items()}
    assert checkpoint.checksums_of(checkpoint.read_manifest(pristine), pristine) == expected
    assert {name: stored.checksum() for name, stored in tensor_files.headers(pristine).items()} == expected


def test_what_others_write_beside_it_is_theirs(saved: Path) -> None:
    """A new card, generation configuration or tokenizer is no damage."""
    (saved / "README.md").write_text("mine")
    (saved / "generation_config.json").write_text('{"temperature": 0.5}')
    (saved / "tokenizer.json").write_text("{}")
    assert qpc.verify(saved).intact


def test_another_layout_of_the_same_tensors_is_intact(saved: Path, tmp_path: Path) -> None:
    qpc.load(saved).save_pretrained(tmp_path / "again", max_shard_size="50KB")
    shutil.copy(saved / checkpoint.MANIFEST, tmp_path / "again")
    assert qpc.verify(tmp_path / "again").intact


def content(directory: Path) -> tuple[object, dict[str, tuple[torch.dtype, tuple[int, ...], bytes]]]:
    """All that a reader gets of a checkpoint."""
    tensors = tensor_files.read(directory)
    return checkpoint.read_manifest(directory), {
        name: (tensor.dtype, tuple(tensor.shape), bytes(tensor_files.raw(tensor))) for name, tensor in tensors.items()
    }


def test_any_turned_bit_is_found(saved: Path) -> None:
    """Wherever it is, in tensors, headers, manifest or index: only where readers get the same may a checkpoint be called intact."""
    draw, expected, noticed = random.Random(0), content(saved), 0
    covered = [*sorted(saved.glob("*.safetensors")), saved / checkpoint.MANIFEST, *saved.glob("*.index.json")]
    for _ in range(60):
        path = draw.choice(covered)
        whole = path.read_bytes()
        place, bit = draw.randrange(len(whole)), draw.randrange(8)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1 << bit]) + whole[place + 1 :])
        try:
            intact = qpc.verify(saved).intact
        except CheckpointError:
            intact = False
        assert not intact or content(saved) == expected, (path.name, place, bit)
        noticed += not intact
        path.write_bytes(whole)
    assert noticed > 30 and qpc.verify(saved).intact


def test_the_damaged_tensor_is_named(saved: Path) -> None:
    stored = tensor_files.headers(saved)[NAME]
    with stored.file.open("r+b") as file:
        file.seek(stored.stop - 1)
        last = file.read(1)
        file.seek(stored.stop - 1)
        file.write(bytes([last[0] ^ 1]))
    assert qpc.verify(saved).problems == (f"{NAME} in {stored.file.name} is not what was saved",)
    with pytest.raises(CheckpointError, match=NAME.replace(".", r"\.")):
        qpc.load(saved, verify=True)
    qpc.load(saved)


def test_missing_and_foreign_tensors_are_named(saved: Path) -> None:
    path = tensor_files.headers(saved)[NAME].file
    tensors = load_file(path)
    tensors["foreign"] = tensors.pop(NAME)
    save_file(tensors, path, metadata={"format": "pt"})
    problems = qpc.verify(saved).problems
    assert f"the tensor {NAME} is missing" in problems and f"{path.name} holds a tensor foreign that was not saved" in problems
    path.unlink()
    assert any(f"{path} is missing" in problem for problem in qpc.verify(saved).problems)


def test_a_file_that_was_cut_short(saved: Path) -> None:
    path = tensor_files.headers(saved)[NAME].file
    path.write_bytes(path.read_bytes()[:-1])
    assert any("cut short" in problem for problem in qpc.verify(saved).problems)


def test_a_changed_manifest_is_found(saved: Path) -> None:
    manifest = checkpoint.read_manifest(saved)
    manifest["report"]["seed"] = 7
    (saved / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    assert qpc.verify(saved).problems == ("qpc.json was changed after it was saved",)
    with pytest.raises(CheckpointError, match=r"qpc\.json was changed"):
        qpc.load(saved, verify=True)


def test_a_checkpoint_without_checksums_is_neither_whole_nor_damaged(saved: Path) -> None:
    manifest = checkpoint.read_manifest(saved)
    del manifest["checksums"]
    (saved / checkpoint.MANIFEST).write_text(json.dumps(manifest))
    for read in (lambda: qpc.verify(saved), lambda: qpc.load(saved, verify=True)):
        with pytest.raises(CheckpointError, match="no checksums"):
            read()
    qpc.load(saved)


def test_plain_modules_have_checksums_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    qpc.save(qpc.compile(model, budget=3, effort="fast", example_inputs=(torch.randn(2, 64),)), tmp_path / "small")
    assert qpc.verify(tmp_path / "small").intact


def test_the_command(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    def run(*arguments: str) -> tuple[object, str, str]:
        with pytest.raises(SystemExit) as caught:
            main(["verify", *arguments])
        return (caught.value.code, *capfd.readouterr())

    capfd.readouterr()
    code, out, _ = run(str(saved))
    assert code == 0 and "all as it was saved" in out
    code, out, _ = run(str(saved), "--json")
    assert code == 0 and json.loads(out) == json.loads(json.dumps(qpc.verify(saved).to_json()))
    tensor_files.headers(saved)[NAME].file.unlink()
    code, out, _ = run(str(saved))
    assert code == 1 and "missing" in out and "damaged" in out
    code, out, _ = run(str(saved), "--json")
    assert code == 1 and json.loads(out)["intact"] is False
    code, out, err = run(str(tmp_path / "nothing"))
    assert code == 2 and out == "" and err.startswith("error: ") and err.count("\n") == 1
