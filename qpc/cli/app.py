"""The commands of `qpc`, and how a run of one ends.

Results go to stdout, progress to stderr. An error that the user can mend is one line and exit code 2.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, NoReturn

import typer

import qpc
from qpc.cli import compile, evaluate, export, generate, inspect, plan, sample, sensitivities, verify
from qpc.errors import QpcError

app = typer.Typer(
    help="Compile language models: smaller and faster, with the least possible loss.",
    epilog="`qpc COMMAND --help` shows the options of a command, with examples.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def add(name: str, command: Callable[..., None], examples: tuple[str, ...]) -> None:
    """Make a function a command; the help shows examples of it as they would be typed."""
    app.command(name, epilog="\n\n".join(("[bold]Examples[/bold]", *(f"  {line}" for line in examples))))(command)


add("compile", compile.compile_model, compile.EXAMPLES)
add("plan", plan.plan_model, plan.EXAMPLES)
add("inspect", inspect.inspect, inspect.EXAMPLES)
add("generate", generate.generate, generate.EXAMPLES)
add("eval", evaluate.evaluate_model, evaluate.EXAMPLES)
add("export", export.export_model, export.EXAMPLES)
add("sample", sample.sample_text, sample.EXAMPLES)
add("sensitivities", sensitivities.estimate_sensitivities, sensitivities.EXAMPLES)
add("verify", verify.verify_model, verify.EXAMPLES)


def show_version(wanted: bool) -> None:
    """Print the version and end, if wanted."""
    if wanted:
        print(f"qpc {qpc.__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[bool, typer.Option("--version", callback=show_version, is_eager=True, help="Print the version and end.")] = False,
) -> None:
    """Compile language models: smaller and faster, with the least possible loss."""


def terminate(signum: int, frame: object) -> NoReturn:
    """End as an exception does, so that half-written files are cleared away."""
    raise SystemExit(128 + signum)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of the script `qpc`; always ends in `SystemExit`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries leave progress to qpc
    signal.signal(signal.SIGTERM, terminate)
    try:
        app(arguments, prog_name="qpc")
    except QpcError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(0)
