"""The command `qpc compile`."""

import os
import time
from pathlib import Path
from typing import Annotated, Any

import typer

import qpc
from qpc.cli.arguments import (
    AsJson,
    Batch,
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
    RayAddress,
    RotationBlock,
    RowFeedback,
    SameInGroup,
    Seed,
    SensitivityFile,
    SensitivityMethod,
    Streaming,
    Total,
    TuneSteps,
)
from qpc.cli.inputs import load_original, pick_device, read_sensitivities
from qpc.cli.limits import Limited
from qpc.cli.output import described, print_json, show
from qpc.cli.stream import streamed
from qpc.terminal import ProgressBars, silent_stdout

EXAMPLES = (
    "qpc compile MODEL -o OUT --bits 3.25",
    "qpc compile MODEL -o OUT --size 80MB --effort max",
    "qpc compile MODEL -o OUT --bits 4 --latency 3ms@8 --gpu h100",
    "qpc compile MODEL -o OUT --bits 3.25 --ray auto",
)


def compile_model(
    model: ModelPath,
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Directory to write.", show_default=False)],
    bits: Annotated[str | None, typer.Option(help="Average bits per weight of the linears: 3.25.", show_default=False)] = None,
    total: Total = None,
    kl: Kl = None,
    latency: Latency = None,
    batch: Batch = None,
    gpu: GpuName = None,
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
    tune: TuneSteps = "auto",
    seed: Seed = 0,
    stream: Streaming = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")] = False,
    device: Device = None,
    ray: RayAddress = None,
    as_json: AsJson = False,
) -> None:
    """Compress MODEL to a budget and write it to OUT."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read as torch is loaded: threads that wait leave the cores to the encoder's
    from qpc.calibration import parse as parse_calibration
    from qpc.cluster import on_ray
    from qpc.options import latency_for
    from qpc.output_directory import check_target

    on_ray.parse(ray)  # connected from here on, or said so at once
    budget = Limited(bits, total, kl, latency, batch).budget()
    options: dict[str, Any] = {
        "effort": effort,
        "exclude": tuple(exclude or ()),
        "seed": seed,
        "same_quantizer_in_group": same_in_group,
        "rotation_block": rotation_block,
        "fold": fold,
        "embeddings": embeddings,
        "row_feedback": row_feedback,
        "sensitivity": sensitivity,
        "tune": tune,
        "gpu": latency_for(gpu, budget),
        "batch": batch or 1,
        "ray": ray,
    }
    start_s = time.monotonic()
    given = None if sensitivities is None else read_sensitivities(sensitivities)
    report = streamed(
        model,
        output,
        budget,
        wanted=stream,
        calibration=calibration,
        tokens=tokens,
        start=start,
        sensitivities=given,
        overwrite=overwrite,
        device=device,
        options=options,
    )
    if report is None:
        check_target(output, overwrite)
        original, tokenizer = load_original(model, effort)
        data = parse_calibration(calibration, tokenizer=tokenizer, tokens=tokens, start=start)
        with ProgressBars() as progress, silent_stdout():
            compiled = qpc.compile(
                original.to(pick_device(device)),
                budget,
                calibration=data,
                tokenizer=tokenizer,
                sensitivities=given,
                progress=progress,
                **options,
            )
        qpc.save(compiled, output, tokenizer_from=model, overwrite=overwrite)
        report = qpc.report_of(compiled)
    elapsed_s = time.monotonic() - start_s
    if as_json:
        print_json({"output": str(output), "elapsed_s": round(elapsed_s, 3)} | described(report))
    else:
        show(report)
        print(f"\n{output}: written after {elapsed_s:.0f} s")
