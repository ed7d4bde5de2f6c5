"""Help, completion and mistakes in the form of a command: quick, and the same for every command."""

import os
import re
import shlex
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from qpc.cli.app import app

COMMANDS = [command.name for command in app.registered_commands]


def test_help_needs_no_torch() -> None:
    check = (
        "import sys; from qpc.__main__ import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as end: print(end.code, sorted({'torch', 'transformers', 'numpy', 'scipy', 'jinja2'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.splitlines()[-1] == "0 []"
    for name in COMMANDS:
        assert f" {name} " in done.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_has_examples_of_options_that_exist(name: str) -> None:
    done = CliRunner(env={"COLUMNS": "80"}).invoke(app, [name, "--help"])
    assert (done.exit_code, done.stderr) == (0, "")
    body, _, examples = done.stdout.rpartition("Examples")
    lines = [shlex.split(line.partition("|")[0]) for line in examples.splitlines() if line.strip()]
    assert lines and all(line[:2] == ["qpc", name] for line in lines)
    for option in (word for line in lines for word in line if re.match("--?[a-z]", word)):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", body), option
    assert "--json" in body


def test_a_mistake_in_the_form_has_code_2_and_no_traceback() -> None:
    for arguments in (["frobnicate"], ["plan"], ["plan", "MODEL", "--bist", "3"], ["generate", "OUT", "a", "--max-new-tokens", "0"]):
        done = CliRunner().invoke(app, arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert "Error" in done.stderr and "Traceback" not in done.stderr


def test_a_shell_completes_commands() -> None:
    asked = os.environ | {"_QPC_COMPLETE": "complete_bash", "COMP_WORDS": "qpc in", "COMP_CWORD": "1"}
    done = subprocess.run([sys.executable, "-m", "qpc"], capture_output=True, text=True, check=False, timeout=120, env=asked)
    assert (done.returncode, done.stdout.split(), done.stderr) == (0, ["inspect"], "")


def test_a_closed_pipe_is_no_error() -> None:
    done = subprocess.run(f"{sys.executable} -m qpc --help | true", shell=True, capture_output=True, text=True, check=False, timeout=120)
    assert "Traceback" not in done.stderr
