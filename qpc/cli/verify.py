"""The command `qpc verify`."""

from pathlib import Path
from typing import Annotated

import typer

from qpc.cli.arguments import AsJson
from qpc.cli.output import print_json
from qpc.terminal import ProgressBars

EXAMPLES = ("qpc verify OUT", "qpc verify OUT --json")


def verify_model(
    compiled: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled model.", show_default=False)],
    as_json: AsJson = False,
) -> None:
    """Check every tensor of OUT by the checksums that it was saved with. The exit code is 1 if something has changed."""
    from qpc.verification import verify

    with ProgressBars() as progress:
        found = verify(compiled, progress)
    if as_json:
        print_json(found.to_json())
    else:
        for problem in found.problems:
            print(problem)
        state = "all as it was saved" if found.intact else "damaged: copy or compile it again"
        print(f"{compiled}: {found.tensors} tensors, {found.tensor_bytes / 1e6:.1f} MB compared; {state}")
    if not found.intact:
        raise typer.Exit(1)
