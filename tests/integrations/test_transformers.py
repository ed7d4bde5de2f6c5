"""Models come from local directories whole, or an error says what is wrong with them."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from qpc.errors import ModelError
from qpc.integrations.transformers import TOKENIZER_FILES, copy_tokenizer_files, load_pretrained, load_tokenizer, skeleton


@pytest.fixture
def directory(tiny_directory: Path, tmp_path: Path) -> Path:
    """A copy that a test may damage."""
    return shutil.copytree(tiny_directory, tmp_path / "model")


def edit_config(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_what_was_saved_is_loaded(tiny_directory: Path) -> None:
    model, tokenizer = load_pretrained(tiny_directory)
    stored = load_file(tiny_directory / "model.safetensors")
    parameters = dict(model.named_parameters())
    assert parameters.keys() == stored.keys()
    assert all(torch.equal(parameters[name], tensor) for name, tensor in stored.items())
    assert not model.training
    assert tokenizer.decode(tokenizer("héllo")["input_ids"], skip_special_tokens=True) == "héllo"


def test_dtype_is_as_stored_or_as_asked(directory: Path) -> None:
    stored = {name: tensor.bfloat16() for name, tensor in load_file(directory / "model.safetensors").items()}
    save_file(stored, directory / "model.safetensors", metadata={"format": "pt"})
    edit_config(directory, dtype="bfloat16", torch_dtype="bfloat16")
    for asked, expected in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        model, _ = load_pretrained(directory, asked)
        assert {parameter.dtype for parameter in model.parameters()} == {expected}


def test_tokenizer_is_optional(directory: Path) -> None:
    for name in TOKENIZER_FILES:
        (directory / name).unlink(missing_ok=True)
    assert load_pretrained(directory)[1] is None


def test_skeleton_has_no_weights_but_everything_else(tiny_directory: Path) -> None:
    model, original = skeleton(tiny_directory), load_pretrained(tiny_directory)[0]
    assert not model.training
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert [name for name, _ in model.named_parameters()] == [name for name, _ in original.named_parameters()]
    assert model.get_output_embeddings().weight is model.get_input_embeddings().weight
    buffers, expected = dict(model.named_buffers()), dict(original.named_buffers())
    assert buffers.keys() == expected.keys()
    assert all(torch.equal(buffers[name], value) for name, value in expected.items())


def test_filled_skeleton_is_the_model(tiny_directory: Path) -> None:
    model, original = skeleton(tiny_directory), load_pretrained(tiny_directory)[0]
    model.load_state_dict(original.state_dict(), assign=True)
    tokens = torch.arange(20)[None]
    with torch.inference_mode():
        assert torch.equal(model(tokens).logits, original(tokens).logits)


def test_tokenizer_files_are_copied(tiny_directory: Path, tmp_path: Path) -> None:
    copy_tokenizer_files(tiny_directory, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    assert tokenizer("a b")["input_ids"] == load_pretrained(tiny_directory)[1]("a b")["input_ids"]
    assert not list(tmp_path.glob("*.safetensors"))


def remove(name: str) -> Callable[[Path], object]:
    return lambda directory: (directory / name).unlink()


def cut(name: str, count: int) -> Callable[[Path], object]:
    return lambda directory: (directory / name).write_bytes((directory / name).read_bytes()[:count])


def poison(value: float) -> Callable[[Path], object]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        tensors["model.layers.1.mlp.down_proj.weight"][3, 5] = value
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


def forget(name: str) -> Callable[[Path], object]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / "model.safetensors")
        del tensors[name]
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})

    return edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "does not exist"),
        (remove("config.json"), r"has no config\.json"),
        (cut("config.json", 40), "config.json cannot be read"),
        (remove("model.safetensors"), r"no \*\.safetensors and no \*\.gguf; pickled"),
        (cut("model.safetensors", 5000), "cannot be loaded: SafetensorError"),
        (cut("model.safetensors", 0), "cannot be loaded"),
        (cut("tokenizer.json", 100), "the tokenizer in .* cannot be read"),
        (forget("model.layers.0.mlp.up_proj.weight"), r"1 weights .* missing, the first is model\.layers\.0\.mlp\.up_proj\.weight"),
        (lambda directory: edit_config(directory, hidden_size=128), "of another shape|cannot be loaded"),
        (poison(math.nan), r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 values that are NaN or infinite"),
        (poison(-math.inf), r"model\.layers\.1\.mlp\.down_proj\.weight holds 1 values"),
        (lambda directory: edit_config(directory, model_type="nonesuch"), "config.json cannot be read"),
        (lambda directory: edit_config(directory, model_type="vit"), "cannot be loaded"),
        (lambda directory: edit_config(directory, quantization_config={"quant_method": "awq", "bits": 4}), r"already quantized \(awq\)"),
    ],
)
def test_bad_models(directory: Path, damage: Callable[[Path], object], message: str) -> None:
    damage(directory)
    with pytest.raises(ModelError, match=message) as caught:
        load_pretrained(directory)
    assert len(str(caught.value).splitlines()) == 1


def test_a_file_is_no_directory(tiny_directory: Path) -> None:
    with pytest.raises(ModelError, match="is a file"):
        load_pretrained(tiny_directory / "config.json")


def test_remote_code_is_never_run(directory: Path) -> None:
    (directory / "evil.py").write_text("raise SystemExit('ran')")
    edit_config(directory, model_type="evil", auto_map={"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"})
    with pytest.raises(ModelError):
        load_pretrained(directory)


@pytest.mark.parametrize("make", [lambda directory: edit_config(directory, model_type="nonesuch"), remove("config.json")])
def test_bad_skeletons(directory: Path, make: Callable[[Path], object]) -> None:
    make(directory)
    with pytest.raises(ModelError):
        skeleton(directory)
