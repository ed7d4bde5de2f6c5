"""What is found out beforehand, given to a compile, is what the compile would have found out itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qpc.__main__ import main
from qpc.beforehand import sampled_text, sensitivities
from qpc.calibration import Given, SelfSampled, collect, parse
from qpc.errors import ModelError, SettingsError
from qpc.integrations.transformers import load_pretrained
from qpc.sensitivity_cache import parse as parse_sensitivity
from qpc.token_file import Origin, TokenFile
from tests import interrupted
from tests.families import VOCABULARY, grouped, model, tokens

ORIGIN = Origin("self-sampled from bos at temperature 1", "0" * 32, VOCABULARY, 3)


def command(*arguments: str | Path) -> object:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return caught.value.code


def test_given_or_found_out_the_bytes_are_the_same(tiny_directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Tokens and sensitivities from files that the commands wrote; few tokens, so that there is something to remark."""
    text, numbers = tmp_path / "tokens.safetensors", tmp_path / "sensitivities.json"
    assert command("sample", tiny_directory, "-o", text, "--tokens", "100", "--seed", "2", "--json") == 0
    told = json.loads(capfd.readouterr().out)
    assert told["source"] == "self-sampled from bos at temperature 1"
    assert told["sequences"] * told["length"] >= 100 and "are few" in told["remarks"][0]
    assert command("sensitivities", tiny_directory, "-o", numbers, "--calibration", text, "--seed", "2") == 0
    assert "by gradient on" in capfd.readouterr().out
    begin = ("compile", tiny_directory, "--bits", "2.5", "--effort", "fast", "--seed", "2", "--json", "--device", "cpu")
    assert command(*begin, "-o", tmp_path / "self", "--calibration-tokens", "100") == 0
    assert command(*begin, "-o", tmp_path / "given", "--calibration", text, "--sensitivities", numbers) == 0
    assert interrupted.equal(tmp_path / "self", tmp_path / "given")


def test_a_file_holds_the_text_that_a_compile_samples(tmp_path: Path) -> None:
    wanted = SelfSampled(tokens=100)
    found, _ = sampled_text(model("llama"), wanted, seed=5)
    path = tmp_path / "tokens.safetensors"
    found.write(path)
    read = TokenFile.read(path)
    assert torch.equal(read.tokens, found.tokens) and read.origin == found.origin and read.origin.vocabulary == VOCABULARY
    program = grouped("llama")
    expected, remarks = collect(wanted, program, 5)
    samples, said = collect(parse(path), program, 0)
    assert samples is not None and expected is not None and said == remarks
    assert samples.description == expected.description
    pairs = zip([*samples.batches, *samples.held_out], [*expected.batches, *expected.held_out], strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
    fewer = parse(path, tokens=found.tokens.shape[1] + 1)
    assert isinstance(fewer, Given) and torch.equal(fewer.batches[0], found.tokens[:2])
    with pytest.raises(SettingsError, match="10000 were asked for; sample more"):
        parse(path, tokens=10000)


def test_tokens_of_another_vocabulary() -> None:
    """Sizes may differ within a family, by padding; tokens that the model does not have are refused."""
    some = tokens(20, 64)
    _, remarks = collect(Given((some,), Origin("", "", VOCABULARY + 32, 0)), grouped("llama"), 0)
    assert [remark.reason for remark in remarks] == [
        f"the tokens were sampled from a vocabulary of {VOCABULARY + 32}, this model has one of {VOCABULARY}"
    ]
    with pytest.raises(SettingsError, match=rf"must lie in 0\.\.{VOCABULARY - 1}, got .*\.\.{VOCABULARY}"):
        collect(Given((some.index_fill(0, torch.tensor([3]), VOCABULARY),), ORIGIN), grouped("llama"), 0)


def metadata(**changes: str) -> dict[str, str]:
    return {"format": "qpc tokens 1", "source": "", "model": "", "vocabulary": "96", "seed": "0"} | changes


@pytest.mark.parametrize(
    ("write", "message"),
    [
        (lambda path: None, "No such file"),
        (lambda path: path.mkdir(), "no regular file"),
        (lambda path: path.write_text("once upon a time"), "holds no tokens of `qpc sample`"),
        (lambda path: save_file({"tokens": torch.ones(2, 3, dtype=torch.int32)}, path), "its format is None"),
        (lambda path: save_file({"other": torch.ones(2, 3)}, path, metadata()), "it holds other"),
        (lambda path: save_file({"tokens": torch.ones(2, 3)}, path, metadata()), r"they are torch.float32 \(2, 3\)"),
        (lambda path: save_file({"tokens": torch.ones(3, dtype=torch.int32)}, path, metadata()), r"they are torch.int32 \(3,\)"),
        (lambda path: save_file({"tokens": torch.ones(2, 3, dtype=torch.int32)}, path, metadata(seed="x")), "invalid literal"),
        (lambda path: (TokenFile(tokens(), ORIGIN).write(path), path.write_bytes(path.read_bytes()[:-1])), "sample them again"),
    ],
)
def test_files_that_hold_no_tokens(write: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    write(tmp_path / "a.safetensors")
    with pytest.raises(SettingsError, match=message):
        parse(tmp_path / "a.safetensors")


def test_what_cannot_be_sampled_or_written(tiny_directory: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert command("sample", tiny_directory, "-o", tmp_path / "tokens.txt") == 2
    assert "must end in .safetensors" in capfd.readouterr().err
    (tmp_path / "b.safetensors").mkdir()
    for name in ("sample", "sensitivities"):
        for place, reason in (("nowhere/a.safetensors", "there is no such directory"), ("b.safetensors", "it is a directory")):
            assert command(name, tiny_directory, "-o", tmp_path / place) == 2
            assert f"cannot be written: {reason}" in capfd.readouterr().err
    with pytest.raises(SettingsError, match="cannot be written"):
        TokenFile(tokens(), ORIGIN).write(tmp_path / "b.safetensors")
    network, _ = load_pretrained(tiny_directory)
    network.config.use_cache, network.can_generate = False, lambda: False  # type: ignore[method-assign, assignment]
    with pytest.raises(ModelError, match=r"cannot generate text.*calibrate on a text file"):
        sampled_text(network, SelfSampled())


def test_a_model_without_linears_says_so() -> None:
    """A whole model, all linears of which stay as they are."""
    with pytest.raises(ModelError, match="no linear layers that could be quantized"):
        sensitivities(model("llama"), parse_sensitivity("gradient"), None, exclude=["model.layers.*"])
