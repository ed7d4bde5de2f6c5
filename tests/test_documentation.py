"""What the documentation says is so: its site builds without a warning, its reader reads, its commands are those that were run."""

import re
import shlex
import subprocess
import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.main import get_command

import qpc
from qpc.cli.app import app
from qpc.integrations.transformers import load_pretrained
from qpc.kernels.linear import QuantizedLinear
from qpc.quant.hadamard import factors, hadamard_matrix
from qpc.quant.palette import Effort, trellis_at
from tests.families import grouped

ROOT = Path(__file__).parent.parent
PAGES = sorted((ROOT / "docs").rglob("*.md"))


@pytest.fixture(scope="module")
def reader() -> dict[str, Any]:
    """The functions of the reader in the page on the file format."""
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "format.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    return names


def test_a_stranger_reads_a_checkpoint(reader: dict[str, Any], tiny_directory: Path, tmp_path: Path) -> None:
    model = qpc.compile(load_pretrained(tiny_directory)[0], 2.75, effort="fast", calibration=None, sensitivity="random")
    qpc.save(model, tmp_path / "out")
    linears = {name: module for name, module in model.named_modules() if isinstance(module, QuantizedLinear)}
    assert {len(module.codes) for module in linears.values()} == {1, 2}, "uniform and mixed"
    for name, module in linears.items():
        expected = module.packed.restored().numpy()
        np.testing.assert_allclose(reader["read_linear"](tmp_path / "out", name), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("effort", [Effort.FAST, Effort.MAX])
def test_its_reader_decodes_every_rate(reader: dict[str, Any], effort: Effort) -> None:
    for step_bits in range(2, 13):
        (part, _), *_ = trellis_at(Fraction(step_bits, 2), effort).parts(16)
        words = torch.randint(
            -(2**31), 2**31, (1, 2, part.block_words), dtype=torch.int32, generator=torch.Generator().manual_seed(step_bits)
        )
        mine = reader["decode_part"](words.numpy(), step_bits, effort.window_bits(step_bits))
        np.testing.assert_array_equal(mine, part.decode(words).numpy())


@pytest.mark.parametrize("order", [1, 2, 64, 12, 20, 36, 48, 576, 640, 1536])
def test_its_reader_knows_the_hadamard_matrices(reader: dict[str, Any], order: int) -> None:
    base, power = (hadamard_matrix(each).numpy() for each in factors(order))
    np.testing.assert_array_equal(reader["hadamard"](order), np.kron(base, power))


def test_every_step_of_the_newcomer_is_in_the_guide() -> None:
    """The script that was timed runs the commands that people copy."""
    script = (ROOT / "examples" / "newcomer.sh").read_text()
    guide = (ROOT / "docs" / "getting-started.md").read_text()
    told = "\n".join(re.findall(r"```\n(.*?)```", guide, re.DOTALL)).replace("\\\n", " ")
    found = re.findall(r"""^step \w+ (?:'(.*?)'|"(.*?)")$""", script, re.DOTALL | re.MULTILINE)
    steps = [(single or double.replace('\\"', '"')).replace("\\\n", "") for single, double in found]
    assert len(steps) == 10
    commands = [re.sub(r" & .*", " &", line) for step in steps for line in step.splitlines()]
    for command in (part for line in commands for part in line.split(" && ")):
        assert shlex.split(command) in [shlex.split(line) for line in told.splitlines()], command


def test_every_command_that_is_told_takes_its_options() -> None:
    commands = get_command(app).commands  # type: ignore[attr-defined]
    told = [line for page in (*PAGES, ROOT / "README.md") for line in re.findall(r"^qpc .*", page.read_text(), re.MULTILINE)]
    assert {shlex.split(line, comments=True)[1] for line in told} >= {"compile", "plan", "inspect", "generate", "eval", "export"}
    for line in told:
        _, name, *words = shlex.split(line, comments=True)
        known = {option for parameter in commands[name].params for option in (*parameter.opts, *parameter.secondary_opts)}
        assert {word for word in words if word.startswith("-")} <= known, line


def test_the_pass_of_the_guide_runs() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "extend" / "pass.md").read_text(), re.DOTALL)
    names: dict[str, Any] = {"__name__": "guide"}
    exec(code, names)
    program = grouped("mlp")
    assert [remark.reason for remark in names["Count"]().run(program).remarks] == ["nothing to change at 2 linears"]


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", re.sub(r"```.*?```", "", page.read_text(), flags=re.DOTALL)):
        assert target.startswith("https://") or (page.parent / target).exists(), target


def test_the_site_builds_without_a_warning(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Compress the linears of" in (tmp_path / "site" / "api" / "index.html").read_text()
