import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest

from qpc.errors import SettingsError, VerifierError
from qpc.ir.annotation import annotate, annotation
from qpc.ir.program import Program
from qpc.ir.stage import Stage
from qpc.passes.base import Pass, PassResult
from qpc.passes.canonicalize import Canonicalize
from qpc.passes.fusion import Fusion
from qpc.passes.pipeline import Pipeline
from tests.families import captured, grouped


@dataclass(frozen=True)
class Careless(Pass):
    """Forgets the group of a linear."""

    name: ClassVar[str] = "careless"
    requires: ClassVar[Stage] = Stage.GROUPED
    ensures: ClassVar[Stage] = Stage.GROUPED

    def run(self, program: Program) -> PassResult:
        node = next(program.linears())
        annotate(node, annotation(node).but(group=None))
        return PassResult()


@dataclass(frozen=True)
class Failing(Careless):
    name: ClassVar[str] = "failing"

    def run(self, program: Program) -> PassResult:
        raise ArithmeticError("no")


def test_stage_results_and_remarks() -> None:
    program = captured("siblings")
    results = Pipeline((Canonicalize(), Fusion())).run(program)
    assert program.stage is Stage.GROUPED
    assert list(results) == ["canonicalize", "fusion"]
    assert results["canonicalize"].changed == ("left", "last", "right") and results["fusion"].changed == ("left", "right")
    assert [str(remark) for remark in program.remarks] == ["fusion: last: it depends on left"]


def test_a_pass_that_breaks_the_contract_is_named_with_those_before_it() -> None:
    expected = r"after pass 'careless' \(passes already run: canonicalize, fusion\): stage GROUPED, node 'linear': left has no group"
    with pytest.raises(VerifierError, match=expected):
        Pipeline((Canonicalize(), Fusion(), Careless())).run(captured("siblings"))


def test_a_broken_program_is_found_before_the_first_pass() -> None:
    program = captured("siblings")
    program.tensors.pop("p_left_weight")
    with pytest.raises(VerifierError, match="before the first pass"):
        Pipeline((Canonicalize(),)).run(program)


def test_passes_must_fit() -> None:
    with pytest.raises(VerifierError, match="'fusion' requires stage CANONICAL, but the program leaves CAPTURED"):
        Pipeline((Fusion(),)).run(captured("mlp"))
    program = captured("mlp")
    with pytest.raises(VerifierError, match="'careless' requires stage GROUPED, but pass 'canonicalize' leaves CANONICAL"):
        Pipeline((Canonicalize(), Careless())).run(program)
    assert program.stage is Stage.CAPTURED and not any(program.linears()), "found out before anything ran"


def test_other_errors_of_a_pass_keep_their_type_and_say_where() -> None:
    with pytest.raises(ArithmeticError) as caught:
        Pipeline((Failing(),)).run(grouped("mlp"))
    assert caught.value.__notes__ == ["in pass 'failing'; passes already run: canonicalize, fusion"]


FILES = [f"{stem}.{suffix}" for stem in ("00_captured", "01_after_canonicalize", "02_after_fusion") for suffix in ("dot", "json", "txt")]


def test_dumps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = tmp_path / "deep" / "dump"
    Pipeline((Canonicalize(), Fusion())).run(captured("siblings"), dump=directory)
    assert sorted(path.name for path in directory.iterdir()) == FILES
    assert json.loads((directory / "02_after_fusion.json").read_text())["stage"] == "GROUPED"
    other = tmp_path / "other"
    monkeypatch.setenv("QPC_DUMP", str(other))
    Pipeline((Canonicalize(), Fusion())).run(captured("siblings"))
    assert all((other / name).read_text() == (directory / name).read_text() for name in FILES)


def test_an_unwritable_dump_directory(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    program = captured("mlp")
    with pytest.raises(SettingsError, match=r"cannot write the dump to .*file.*QPC_DUMP must name a writable directory"):
        Pipeline((Canonicalize(),)).run(program, dump=blocked / "dump")
    assert program.stage is Stage.CAPTURED
