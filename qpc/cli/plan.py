"""The command `qpc plan`."""

from typing import Annotated

import typer

import qpc
from qpc.cli.arguments import (
    AsJson,
    Batch,
    BitsOrRange,
    CalibrationSource,
    CalibrationStart,
    CalibrationTokens,
    Device,
    EffortName,
    EmbeddingBits,
    Exclude,
    Folding,
    GpuName,
    Kl,
    Latency,
    ModelPath,
    Picture,
    RotationBlock,
    RowFeedback,
    SameInGroup,
    Seed,
    SensitivityFile,
    SensitivityMethod,
    Total,
)
from qpc.cli.inputs import load_original, pick_device, read_sensitivities
from qpc.cli.limits import Limited
from qpc.cli.output import described, print_json, show_plan
from qpc.errors import UsageError
from qpc.terminal import ProgressBars, silent_stdout

EXAMPLES = (
    "qpc plan MODEL --bits 3.25",
    "qpc plan MODEL --bits 2.5..4.5 --plot pareto.png",
    "qpc plan MODEL --latency 2ms..4ms --gpu h100 --json",
)


def plan_model(
    model: ModelPath,
    bits: BitsOrRange = None,
    total: Total = None,
    kl: Kl = None,
    latency: Latency = None,
    batch: Batch = None,
    gpu: GpuName = None,
    step: Annotated[str | None, typer.Option(help="Of a range.", show_default="0.25 bits, or an eighth of a range of times")] = None,
    plot: Picture = None,
    effort: EffortName = "default",
    exclude: Exclude = None,
    same_in_group: SameInGroup = False,
    rotation_block: RotationBlock = None,
    fold: Folding = False,
    embeddings: EmbeddingBits = None,
    calibration: CalibrationSource = "self",
    tokens: CalibrationTokens = None,
    start: CalibrationStart = None,
    row_feedback: RowFeedback = "auto",
    sensitivity: SensitivityMethod = "gradient",
    sensitivities: SensitivityFile = None,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Predict size and loss of MODEL, and its time on a GPU, at a budget or at each of a range, without compiling it.

    What each layer feels is estimated once for a model and kept (QPC_CACHE); the same budget compiles to the same allocation.
    """
    from qpc.calibration import parse as parse_calibration
    from qpc.integrations.matplotlib import check_picture, draw_plan
    from qpc.options import latency_for

    budgets = Limited(bits, total, kl, latency, batch).budgets(step)
    times = latency_for(gpu, *budgets)
    if plot is not None and len(budgets) == 1:
        raise UsageError("--plot draws a range of budgets: give one such as --bits 2.5..4.5 or --latency 2ms..4ms")
    if plot is not None:
        check_picture(plot)
    original, tokenizer = load_original(model, effort)
    data = parse_calibration(calibration, tokenizer=tokenizer, tokens=tokens, start=start)
    given = None if sensitivities is None else read_sensitivities(sensitivities)
    with ProgressBars() as progress, silent_stdout():
        plan = qpc.plan(
            original.to(pick_device(device)),
            budgets,
            effort=effort,
            exclude=tuple(exclude or ()),
            seed=seed,
            same_quantizer_in_group=same_in_group,
            rotation_block=rotation_block,
            fold=fold,
            embeddings=embeddings,
            calibration=data,
            tokenizer=tokenizer,
            row_feedback=row_feedback,
            sensitivity=sensitivity,
            sensitivities=given,
            gpu=times,
            batch=batch or 1,
            progress=progress,
        )
    if plot is not None:
        draw_plan(plan, plot, model.resolve().name)
    if as_json:
        print_json(plan.to_json() | {"report": None if plan.report is None else described(plan.report)})
        return
    show_plan(plan)
    if plot is not None:
        print(f"{plot}: drawn")
