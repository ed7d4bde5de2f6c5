"""The linears and groups of every family, as text. `pytest --update-golden` writes the files anew."""

from pathlib import Path

import pytest

from qpc.ir.printer import summary, to_text
from tests.families import FAMILIES, PLAIN, grouped

DIRECTORY = Path(__file__).parent


def compare(name: str, text: str, update: bool) -> None:
    path = DIRECTORY / f"{name}.txt"
    if update:
        path.write_text(text, encoding="utf-8")
    assert path.is_file(), f"{path.name} is missing; run pytest --update-golden and look at what it writes"
    assert text == path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", [*FAMILIES, *PLAIN])
def test_linears_and_groups(name: str, request: pytest.FixtureRequest) -> None:
    program = grouped(name)
    lines = [summary(program), *map(str, program.remarks)]
    compare(name, "\n".join(lines) + "\n", request.config.getoption("--update-golden"))


def test_full_dump(request: pytest.FixtureRequest) -> None:
    compare("mlp_full", to_text(grouped("mlp")), request.config.getoption("--update-golden"))


def test_no_stale_files() -> None:
    assert {path.stem for path in DIRECTORY.glob("*.txt")} == {*FAMILIES, *PLAIN, "mlp_full"}
