"""Sensitivities are estimated once for the same weights, method, seed and linears, and again for others."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import qpc
from qpc.budget import Budget
from qpc.calibration import Given, Samples
from qpc.compiler import captured, group, prepare
from qpc.errors import SettingsError
from qpc.ir.program import Program
from qpc.options import Options
from qpc.sensitivity import Method, Sensitivities
from qpc.sensitivity_cache import Gradients, Wanted, estimated, parse, weighed
from tests.families import FAMILIES, VOCABULARY

TOKENS = torch.randint(VOCABULARY, (8, 32), generator=torch.Generator().manual_seed(0))
SAMPLES = Samples((TOKENS[:6],), (TOKENS[6:],), "some")
RANDOM = Wanted(Method.RANDOM)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("QPC_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def grouped(model: nn.Module, exclude: tuple[str, ...] = ()) -> Program:
    options = Options(Budget.of(3), exclude=exclude)
    program = captured(model, options)
    group(program, options)
    return program


def counted(program: Program, seed: int = 0, wanted: Wanted = RANDOM, samples: Samples | None = None) -> tuple[Sensitivities, bool]:
    """What is known, and whether it took an estimation."""
    steps: list[str] = []
    gradients = None if samples is None else Gradients(program, samples, seed)
    found, remarks = estimated(program, wanted, seed, gradients, lambda task, done, total: steps.append(task))
    assert not [remark for remark in remarks if "checked" not in remark.reason]
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


@pytest.mark.parametrize(
    ("wanted", "samples"),
    [
        (RANDOM, None),
        (Wanted(Method.SELF), None),
        (Wanted(Method.GRADIENT), None),
        (Wanted(Method.GRADIENT), SAMPLES),
        (Wanted(Method.GIVEN, Given((TOKENS,))), None),
    ],
    ids=["random", "self", "gradient", "gradient of samples", "given"],
)
def test_every_method_is_cached_and_checked(directory: Path, wanted: Wanted, samples: Samples | None) -> None:
    program = grouped(FAMILIES["llama"]())
    found, made = counted(program, wanted=wanted, samples=samples)
    assert made and found.method is wanted.method
    assert found.linearity is not None and found.linearity.growth
    assert counted(program, wanted=wanted, samples=samples) == (found, False)
    assert not list(directory.glob("*.journal"))


def test_an_interrupted_estimate_goes_on_where_it_was(directory: Path) -> None:
    def interrupting(task_name: str) -> Callable[[str, int, int], None]:
        def progress(task: str, done: int, total: int) -> None:
            if task == task_name and done == total // 2:
                raise KeyboardInterrupt

        return progress

    program = grouped(FAMILIES["llama"]())
    with pytest.raises(KeyboardInterrupt):
        estimated(program, RANDOM, 0, None, interrupting("sensitivities"))
    (journal,) = directory.glob("*.journal")
    known = len(journal.read_text().splitlines())
    with pytest.raises(KeyboardInterrupt):
        estimated(program, RANDOM, 0, None, interrupting("linearity"))
    assert len(journal.read_text().splitlines()) > 2 * known - 4
    interrupted, _ = counted(program)
    assert not list(directory.glob("*.journal"))
    for file in directory.iterdir():
        file.unlink()
    assert counted(program)[0] == interrupted


def test_what_passes_backwards_found_is_kept(directory: Path) -> None:
    program = grouped(FAMILIES["llama"]())
    samples, remarks = weighed(Gradients(program, SAMPLES, 0))
    assert not remarks and samples.importance is not None and samples.held_out_importance is not None
    assert [len(batch) for batch in (*samples.importance, *samples.held_out_importance)] == [len(list(program.linears()))] * 2
    (one, other) = sorted(directory.glob("gradients-*"))
    one.write_bytes(other.read_bytes()[:50])
    again, _ = weighed(Gradients(program, SAMPLES, 0))
    assert again.importance is not None
    for name, values in samples.importance[0].items():
        assert torch.equal(values, again.importance[0][name])
    counted(program, wanted=Wanted(Method.GRADIENT), samples=SAMPLES)
    assert len(list(directory.glob("gradients-*"))) == 2, "sensitivities on the same samples take the same passes"


def test_sensitivities_and_moments_share_their_passes_without_a_cache() -> None:
    passes: list[int] = []
    options = Options(Budget.of(3), calibration=Given((TOKENS,)))
    program = captured(FAMILIES["llama"](), options)
    group(program, options)
    found = prepare(program, options, None, lambda task, done, total: passes.append(done) if task == "gradients" else None)
    assert found.sensitivities.method is Method.GRADIENT and found.samples is not None and found.samples.importance is not None
    assert passes and passes == sorted(set(passes)), "each pass once"


def test_what_cannot_be_differentiated_is_estimated_by_noise(directory: Path) -> None:
    class Steps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.only = nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.only(x).detach() + 1

    options = Options(Budget.of(3))
    program = captured(Steps(), options, (torch.zeros(2, 16),))
    group(program, options)
    rows = torch.randn(8, 16)
    found, remarks = estimated(program, Wanted(Method.GRADIENT), 0, Gradients(program, Samples((rows,), (), "rows"), 0))
    assert found.method is Method.RANDOM and found.values["only"] > 0
    assert "differentiated" in remarks[0].reason and "noise" in remarks[0].reason
    samples, (remark,) = weighed(Gradients(program, Samples((rows,), (), "rows"), 0))
    assert samples.importance is None and "alike" in remark.reason
    found, remarks = estimated(program, Wanted(Method.SELF), 0)
    assert found.method is Method.RANDOM and "no text" in remarks[0].reason


def test_a_place_that_cannot_be_written_is_a_remark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("QPC_CACHE", str(tmp_path / "file" / "cache"))
    found, (remark,) = estimated(grouped(FAMILIES["llama"]()), RANDOM, 0)
    assert found.values and "QPC_CACHE" in remark.reason


def test_options_are_parsed(tmp_path: Path) -> None:
    for name in ("random", "self", "gradient"):
        assert parse(name) == Wanted(Method(name)) == parse(parse(name))
    assert parse(TOKENS) == Wanted(Method.GIVEN, Given((TOKENS,)))
    for bad in ("given", "hessian", "none", None, tmp_path / "missing.txt", 3):
        with pytest.raises(SettingsError, match="random, self, gradient"):
            parse(bad)


@pytest.mark.parametrize("method", ["random", "self", "gradient"])
def test_a_compile_takes_the_method(method: str) -> None:
    model = FAMILIES["llama"]()
    made = qpc.report_of(qpc.compile(model, 3, effort="fast", calibration=TOKENS, sensitivity=method))
    planned = qpc.plan(model, [3], effort="fast", calibration=TOKENS, sensitivity=method)
    assert planned.report is not None and planned.sensitivity == method
    assert [(row.name, row.quantizer, row.sensitivity) for row in planned.report.rows] == [
        (row.name, row.quantizer, row.sensitivity) for row in made.rows
    ]
