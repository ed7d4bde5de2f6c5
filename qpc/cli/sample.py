"""The command `qpc sample`."""

from pathlib import Path
from typing import Annotated

import typer

from qpc.cli.arguments import AsJson, CalibrationStart, Device, ModelPath, Seed
from qpc.cli.inputs import check_place, load_original, pick_device
from qpc.cli.output import note, print_json
from qpc.terminal import ProgressBars, silent_stdout

EXAMPLES = (
    "qpc sample MODEL -o tokens.safetensors",
    "qpc sample MODEL -o tokens.safetensors --tokens 65536 --seed 1",
)


def sample_text(
    model: ModelPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="FILE", help="File to write, *.safetensors.", show_default=False)],
    tokens: Annotated[int | None, typer.Option(min=1, help="How many.", show_default="as many as a compile samples")] = None,
    start: CalibrationStart = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Write the text that MODEL samples from itself, for `--calibration FILE` of a compile on a machine that cannot sample it."""
    from qpc.beforehand import sampled_text
    from qpc.calibration import SelfSampled
    from qpc.calibration import parse as parse_calibration
    from qpc.errors import UsageError

    if output.suffix != ".safetensors":
        raise UsageError(f"--output {output} must end in .safetensors, by which a compile knows tokens from text")
    check_place(output)
    network, tokenizer = load_original(model)
    wanted = parse_calibration("self", tokenizer=tokenizer, tokens=tokens, start=start)
    assert isinstance(wanted, SelfSampled)
    with ProgressBars() as progress, silent_stdout():
        found, remarks = sampled_text(network.to(pick_device(device)), wanted, seed=seed, progress=progress)
    found.write(output)
    sequences, length = found.tokens.shape
    if as_json:
        told = {"output": str(output), "sequences": sequences, "length": length, "source": found.origin.source}
        print_json(told | {"remarks": [str(remark) for remark in remarks]})
        return
    for remark in remarks:
        note(str(remark))
    print(f"{output}: {sequences} sequences of {length} tokens, {found.origin.source}")
