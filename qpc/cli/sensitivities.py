"""The command `qpc sensitivities`."""

from pathlib import Path
from typing import Annotated

import typer

from qpc.cli.arguments import (
    AsJson,
    CalibrationSource,
    CalibrationStart,
    CalibrationTokens,
    Device,
    Exclude,
    ModelPath,
    Seed,
    SensitivityMethod,
)
from qpc.cli.inputs import check_place, load_original, pick_device, write_text
from qpc.cli.output import note, print_json
from qpc.terminal import ProgressBars, silent_stdout

EXAMPLES = (
    "qpc sensitivities MODEL -o sensitivities.json",
    "qpc sensitivities MODEL -o sensitivities.json --sensitivity random",
)


def estimate_sensitivities(
    model: ModelPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="JSON file to write.", show_default=False)],
    sensitivity: SensitivityMethod = "gradient",
    exclude: Exclude = None,
    calibration: CalibrationSource = "self",
    tokens: CalibrationTokens = None,
    start: CalibrationStart = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Estimate how much each linear of MODEL matters, and write it for `--sensitivities FILE` of a compile or a plan."""
    from qpc import beforehand
    from qpc.calibration import parse as parse_calibration
    from qpc.sensitivity_cache import parse as parse_sensitivity

    check_place(output)
    network, tokenizer = load_original(model)
    data = parse_calibration(calibration, tokenizer=tokenizer, tokens=tokens, start=start)
    wanted = parse_sensitivity(sensitivity, tokenizer=tokenizer)
    with ProgressBars() as progress, silent_stdout():
        found, remarks = beforehand.sensitivities(
            network.to(pick_device(device)), wanted, data, exclude=tuple(exclude or ()), seed=seed, progress=progress
        )
    write_text(output, found.to_json() + "\n")
    if as_json:
        told = {"output": str(output), "linears": len(found.values), "method": str(found.method), "tokens": found.tokens}
        print_json(told | {"remarks": [str(remark) for remark in remarks]})
        return
    for remark in remarks:
        note(str(remark))
    print(f"{output}: {len(found.values)} linears, by {found.method} on {found.tokens} tokens")
