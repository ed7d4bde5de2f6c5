"""The command line: `qpc compile | plan | inspect | generate | eval | export`.

Results go to stdout, progress to stderr. An error that the user can mend is one line and exit code 2.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.console import Console

import qpc
from qpc.arguments import (
    AsJson,
    Batch,
    BitsOrRange,
    CalibrationSource,
    CalibrationStart,
    CalibrationTokens,
    Compiled,
    Device,
    EffortName,
    EmbeddingBits,
    Exclude,
    Folding,
    GpuName,
    Kl,
    Latency,
    Limited,
    ModelPath,
    Picture,
    RotationBlock,
    SameInGroup,
    Seed,
    SensitivityFile,
    SensitivityMethod,
    Total,
    TuneSteps,
    load_any,
    load_original,
    pick_device,
    read_sensitivities,
    read_text,
    required,
)
from qpc.errors import QpcError, UsageError
from qpc.export_command import export_model
from qpc.report import Report, allocation_table, remarks, summary
from qpc.terminal import ProgressBars, silent_stdout

if TYPE_CHECKING:
    from qpc.planner import Plan

app = typer.Typer(
    help="Compile language models: smaller and faster, with the least possible loss.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.command("export")(export_model)


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


@app.command("compile")
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
    sensitivity: SensitivityMethod = "gradient",
    sensitivities: SensitivityFile = None,
    tune: TuneSteps = "auto",
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compress MODEL to a budget and write it to OUT."""
    from qpc.calibration import parse as parse_calibration
    from qpc.options import latency_for
    from qpc.output_directory import check_target

    budget = Limited(bits, total, kl, latency, batch).budget()
    times = latency_for(gpu, budget)
    check_target(output, overwrite)
    start_s = time.monotonic()
    given = None if sensitivities is None else read_sensitivities(sensitivities)
    original, tokenizer = load_original(model, effort)
    data = parse_calibration(calibration, tokenizer=tokenizer, tokens=tokens, start=start)
    with ProgressBars() as progress, silent_stdout():
        compiled = qpc.compile(
            original.to(pick_device(device)),
            budget,
            effort=effort,
            exclude=tuple(exclude or ()),
            seed=seed,
            same_quantizer_in_group=same_in_group,
            rotation_block=rotation_block,
            fold=fold,
            embeddings=embeddings,
            calibration=data,
            tokenizer=tokenizer,
            sensitivity=sensitivity,
            sensitivities=given,
            tune=tune,
            gpu=times,
            batch=batch or 1,
            progress=progress,
        )
    qpc.save(compiled, output, tokenizer_from=model, overwrite=overwrite)
    report, elapsed_s = qpc.report_of(compiled), time.monotonic() - start_s
    if as_json:
        print_json({"output": str(output), "elapsed_s": round(elapsed_s, 3)} | described(report))
    else:
        show(report)
        print(f"\n{output}: written after {elapsed_s:.0f} s")


@app.command("plan")
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


@app.command()
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


@app.command()
def generate(
    model: Compiled,
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="Texts to continue, together.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Seed = 0,
    compiled_step: Annotated[bool, typer.Option("--compile", help="Compile the step of one token first, which takes a while.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue prompts. The text of a single one is printed as it comes."""
    from qpc.integrations.decoder import Stepping
    from qpc.integrations.prompts import continue_prompts

    network, tokenizer = load_any(model, device)
    live = len(prompts) == 1 and not as_json
    found = continue_prompts(
        network,
        required(tokenizer, model),
        prompts,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        stepping=Stepping.COMPILED if compiled_step else None,
        on_text=lambda _, piece: show_text(piece if live else ""),
    )
    if as_json:
        print_json(found.to_json())
        return
    print("" if live else "\n\n".join(prompt + text for prompt, text in zip(prompts, found.texts, strict=True)))
    Console(stderr=True, highlight=False).print(found.speed, style="dim")


@app.command("eval")
def evaluate_model(
    model: Compiled,
    text: Annotated[Path, typer.Option(help="UTF-8 file; its first tokens are read as they are.", show_default=False)],
    reference: Annotated[
        Path | None, typer.Option(help="The original model, to measure the KL divergence from.", show_default=False)
    ] = None,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens to read.")] = 20480,
    window: Annotated[int, typer.Option(min=2, help="Tokens per window; windows do not overlap.")] = 1024,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Measure perplexity on a text, and the divergence from a reference."""
    from qpc.evaluate import evaluate, first_tokens

    content = read_text(text)
    network, tokenizer = load_any(model, device)
    ids = first_tokens(required(tokenizer, model), content, tokens)
    original = None if reference is None else load_any(reference, device)[0]
    with ProgressBars() as progress:
        result = evaluate(network, original, ids, window, progress)
    if as_json:
        print_json(asdict(result))
        return
    print(f"perplexity       {result.perplexity:.3f}")
    if result.kl is not None and result.top1_agreement is not None:
        print(f"of the reference {result.reference_perplexity:.3f}")
        print(f"mean KL          {result.kl:.4f} nats per token")
        print(f"same first token {result.top1_agreement:.1%}")
    print(f"tokens           {result.tokens} in windows of {result.window}")


def described(report: Report) -> dict[str, Any]:
    """A report with its totals, for machines."""
    totals = {"linear_weights": report.linear_weights, "linear_bytes": report.linear_bytes, "bits_per_weight": report.bits_per_weight}
    return totals | report.to_json()


def show(report: Report) -> None:
    """Print a report for people."""
    console = Console(highlight=False)
    for part in (allocation_table(report), summary(report)):
        console.print(part)
        console.print()
    if report.remarks:
        console.print("remarks", style="bold")
        console.print(remarks(report))


def show_plan(plan: "Plan") -> None:
    """Print a plan for people."""
    from qpc.plan_report import notes, point_summary, points_table

    console = Console(highlight=False)
    if plan.report is None:
        console.print(points_table(plan))
    else:
        for part in (allocation_table(plan.report), point_summary(plan, plan.points[0])):
            console.print(part)
            console.print()
    for line in notes(plan):
        console.print(line, style="dim")


def show_text(piece: str) -> None:
    """Print a piece of a text at once."""
    print(piece, end="", flush=True)


def print_json(value: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(value, indent=2, allow_nan=False))


def terminate(signum: int, frame: object) -> NoReturn:
    """End as an exception does, so that half-written files are cleared away."""
    raise SystemExit(128 + signum)


def main(arguments: list[str] | None = None) -> NoReturn:
    """Entry point of the script `qpc`; always ends in `SystemExit`."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    signal.signal(signal.SIGTERM, terminate)
    try:
        app(arguments, prog_name="qpc")
    except QpcError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    raise SystemExit(0)


if __name__ == "__main__":
    main()
