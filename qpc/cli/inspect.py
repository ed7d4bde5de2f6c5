"""The command `qpc inspect`."""

from pathlib import Path
from typing import Annotated

import typer

from qpc.cli.arguments import AsJson
from qpc.cli.output import described, print_json, show

EXAMPLES = (
    "qpc inspect OUT",
    "qpc inspect OUT --html report.html",
    "qpc inspect OUT --json | jq .bits_per_weight",
)


def inspect(
    compiled: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled model.", show_default=False)],
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page for a browser instead.", show_default=False)] = None,
    as_json: AsJson = False,
) -> None:
    """Show what was decided for every linear of OUT, or make a page of it."""
    from qpc import page
    from qpc.checkpoint import read_report

    report = read_report(compiled)
    if html is not None:
        page.write(compiled, html)
    if as_json:
        print_json(described(report))
    elif html is not None:
        print(f"{html}: written")
    else:
        show(report)
