"""Sensitivities are estimated once for the same weights, seed and linears, and again for others."""

from pathlib import Path

import pytest
import torch
from torch import nn

from qpc.budget import Budget
from qpc.compiler import Options, captured, group
from qpc.ir.program import Program
from qpc.sensitivity import Sensitivities
from qpc.sensitivity_cache import estimated
from tests.families import FAMILIES


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QPC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def grouped(model: nn.Module, exclude: tuple[str, ...] = ()) -> Program:
    options = Options(Budget.of(3), exclude=exclude)
    program = captured(model, options)
    group(program, options)
    return program


def counted(program: Program, seed: int = 0) -> tuple[Sensitivities, bool]:
    """What is known, and whether it took an estimation."""
    steps: list[str] = []
    found, remarks = estimated(program, seed, lambda task, done, total: steps.append(task))
    assert not remarks
    return found, bool(steps)


def test_the_same_is_estimated_once(directory: Path) -> None:
    first, made = counted(grouped(FAMILIES["llama"]()))
    assert made
    assert counted(grouped(FAMILIES["llama"]())) == (first, False)
    (file,) = directory.iterdir()
    assert Sensitivities.from_json(file.read_text()) == first
    file.write_text(file.read_text()[:100])
    assert counted(grouped(FAMILIES["llama"]())) == (first, True)
    assert counted(grouped(FAMILIES["llama"]())) == (first, False)


def test_other_weights_seeds_and_linears_are_others(directory: Path) -> None:
    model = FAMILIES["llama"]()
    counted(grouped(model))
    assert counted(grouped(model), seed=1)[1]
    excluded, made = counted(grouped(model, ("*.down_proj",)))
    assert made and not any("down_proj" in name for name in excluded.values)
    with torch.no_grad():
        model.get_parameter("model.norm.weight").view(-1)[0] += 1e-3
    assert counted(grouped(model))[1]
    assert len(list(directory.iterdir())) == 4


def test_a_place_that_cannot_be_written_is_a_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QPC_CACHE", str(tmp_path / "file" / "cache"))
    found, (remark,) = estimated(grouped(FAMILIES["llama"]()), 0)
    assert found.values and "QPC_CACHE" in remark.reason
