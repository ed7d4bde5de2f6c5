"""Tokens come back as they were kept, under a key that everything that matters goes into."""

from pathlib import Path

import pytest
import torch

from qpc import token_cache
from qpc.errors import SettingsError
from tests.families import FAMILIES, VOCABULARY


def test_what_is_kept_comes_back(tmp_path: Path) -> None:
    tokens = torch.randint(VOCABULARY, (3, 7))
    directory = tmp_path / "new" / "cache"
    assert token_cache.read(directory, "a") is None
    token_cache.write(directory, "a", tokens)
    found = token_cache.read(directory, "a")
    assert found is not None and found.dtype == torch.int64 and torch.equal(found, tokens)
    assert token_cache.read(directory, "b") is None
    assert [path.name for path in directory.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("size", [0, 5, 60])
def test_a_file_cut_short_is_no_file(tmp_path: Path, size: int) -> None:
    token_cache.write(tmp_path, "a", torch.zeros(3, 7, dtype=torch.int64))
    path = tmp_path / "a.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    assert token_cache.read(tmp_path, "a") is None


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="QPC_CACHE"):
        token_cache.write(tmp_path / "file" / "cache", "a", torch.zeros(1, 1, dtype=torch.int64))


def test_the_key_is_that_of_the_model_and_the_settings() -> None:
    first, second = FAMILIES["llama"](), FAMILIES["llama"]()
    second.config._name_or_path = "elsewhere"
    known = token_cache.key(first, {"seed": 0})
    assert known == token_cache.key(second, {"seed": 0}) != token_cache.key(second, {"seed": 1})
    assert known != token_cache.key(FAMILIES["llama_tied"](), {"seed": 0})
    for name in ("model.norm.weight", "model.layers.1.mlp.down_proj.weight"):
        weight = second.get_parameter(name)
        with torch.no_grad():
            before = weight.flatten()[-1].clone()
            weight.view(-1)[-1] += 1e-3
            assert token_cache.key(second, {"seed": 0}) != known, name
            weight.view(-1)[-1] = before
    assert token_cache.key(second.bfloat16(), {"seed": 0}) != known
    other = FAMILIES["llama"]()
    other.config.rope_theta = 5.0
    assert token_cache.key(other, {"seed": 0}) != known
