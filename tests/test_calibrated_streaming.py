"""Streaming with error feedback: the same bytes as a compile in memory, in files of bounded size, whatever interrupts it."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import qpc
from qpc.compiler import build, finish
from qpc.integrations.transformers import load_pretrained
from qpc.options import Options
from tests import interrupted
from tests.families import tokens
from tests.test_streaming import MODELS, given, sensitivities

TEXT = tokens(20, 24)


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a model, with its sensitivities."""

    @cache
    def store(name: str) -> Path:
        model, directory = MODELS[name](), tmp_path_factory.mktemp(name)
        model.save_pretrained(directory, max_shard_size="100KB")
        (directory / "sensitivities.json").write_text(sensitivities(model).to_json())
        return directory

    return store


def in_memory(directory: Path, output: Path, budget: object, **options: Any) -> None:
    """The oracle: what `qpc.compile` makes of it with moments of the same kind."""
    parsed = Options.of(budget, calibration=TEXT, tune="off", effort="fast", **options)  # type: ignore[arg-type]
    object.__setattr__(parsed, "weigh_positions", False)
    program = build(load_pretrained(directory)[0], parsed, sensitivities=given(directory))
    qpc.save(finish(program, parsed), output, tokenizer_from=directory, shard_bytes=interrupted.SHARD_BYTES)


@pytest.mark.parametrize(("name", "embeddings"), [("llama_tied", 8), ("gpt2", None)])
def test_the_bytes_are_those_of_a_compile_in_memory(
    name: str, embeddings: int | None, stored: Callable[[str], Path], tmp_path: Path
) -> None:
    directory = stored(name)
    options: dict[str, Any] = {"seed": 3, "embeddings": embeddings}
    in_memory(directory, tmp_path / "memory", interrupted.BUDGET, **options)
    qpc.stream(
        directory,
        tmp_path / "stream",
        interrupted.BUDGET,
        calibration=TEXT,
        sensitivities=given(directory),
        effort="fast",
        shard_bytes=interrupted.SHARD_BYTES,
        **options,
    )
    assert interrupted.equal(tmp_path / "stream", tmp_path / "memory")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["memory", "stream"]
