"""The command line: `qpc compile | inspect | generate | eval`.

Results go to stdout, progress to stderr. An error that the user can mend is one line and exit code 2.
"""

import json
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from torch import Tensor, nn

import qpc
from qpc.budget import Budget
from qpc.errors import BudgetError, EvaluationError, ModelError, QpcError, UsageError
from qpc.report import Report, allocation_table, remarks, summary
from qpc.terminal import ProgressBars

app = typer.Typer(
    help="Compile language models: smaller and faster, with the least possible loss.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Compiled = Annotated[Path, typer.Argument(metavar="OUT", help="A compiled model, or a plain Hugging Face directory.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Total = Annotated[str | None, typer.Option("--size", help="Size of the whole checkpoint: 80MB, 4.2GiB.", show_default=False)]
Kl = Annotated[str | None, typer.Option(metavar="NATS", help="Predicted KL: the smallest model that stays within it.", show_default=False)]
EffortName = Annotated[str, typer.Option(help="fast, default, high or max: better codes for more time.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Shell pattern of linears that stay as they are; may be repeated.")]
RotationBlock = Annotated[
    int | None, typer.Option(min=1, help="Most inputs that a rotation mixes: the width of a tensor-parallel shard.", show_default=False)
]
EmbeddingBits = Annotated[
    str | None, typer.Option(metavar="BITS", help="Bits per weight of embeddings and output head.", show_default="as they are")
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result on the same machine.")]
Device = Annotated[str | None, typer.Option(help="Where to run, as torch names it. By default a GPU if there is one.", show_default=False)]


@dataclass(frozen=True)
class LimitOption:
    """How an option sets a limit: the field of `Budget`, the unit of a bare number, and both in words."""

    field: str
    unit: str
    takes: str
    form: str


LIMITS = {
    "--bits": LimitOption("bits_per_weight", "", "bits per weight", "a number of bits per weight, such as 3.25"),
    "--size": LimitOption("total_bytes", "", "bytes", "a number with a unit of bytes, such as 80MB or 4.2GiB"),
    "--kl": LimitOption("kl_nats", "nats", "nats", "a KL in nats per token, such as 0.1"),
}


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
    model: Annotated[Path, typer.Argument(metavar="MODEL", help="Directory with config.json and safetensors, or a GGUF file.")],
    output: Annotated[Path, typer.Option("--output", "-o", metavar="OUT", help="Directory to write.", show_default=False)],
    bits: Annotated[str | None, typer.Option(help="Average bits per weight of the linears: 3.25.", show_default=False)] = None,
    total: Total = None,
    kl: Kl = None,
    effort: EffortName = "default",
    exclude: Exclude = None,
    rotation_block: RotationBlock = None,
    embeddings: EmbeddingBits = None,
    calibration: Annotated[
        str, typer.Option(metavar="self|none|FILE", help="Text for error feedback: the model's own, none, or a file.")
    ] = "self",
    tokens: Annotated[int | None, typer.Option("--calibration-tokens", help="Tokens of that text.", show_default=False)] = None,
    start: Annotated[
        str | None, typer.Option("--calibration-start", help="How the model's own text begins: bos, random or chat.", show_default=False)
    ] = None,
    seed: Seed = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it is not empty.")] = False,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Compress MODEL to a budget and write it to OUT."""
    from qpc.calibration import parse as parse_calibration
    from qpc.checkpoint import check_target, is_checkpoint
    from qpc.integrations.transformers import load_pretrained
    from qpc.quant.palette import Effort

    budget = parse_budget(bits, total, kl)
    Effort.parse(effort)
    if is_checkpoint(model):
        raise UsageError(f"{model} is a compiled model already; compile the original")
    check_target(output, overwrite)
    start_s = time.monotonic()
    original, tokenizer = load_pretrained(model)
    data = parse_calibration(calibration, tokenizer=tokenizer, tokens=tokens, start=start)
    with ProgressBars() as progress:
        compiled = qpc.compile(
            original.to(pick_device(device)),
            budget,
            effort=effort,
            exclude=tuple(exclude or ()),
            seed=seed,
            rotation_block=rotation_block,
            embeddings=embeddings,
            calibration=data,
            progress=progress,
        )
    qpc.save(compiled, output, tokenizer_from=model, overwrite=overwrite)
    report, elapsed_s = qpc.report_of(compiled), time.monotonic() - start_s
    if as_json:
        print_json({"output": str(output), "elapsed_s": round(elapsed_s, 3)} | described(report))
    else:
        show(report)
        print(f"\n{output}: written after {elapsed_s:.0f} s")


@app.command()
def inspect(
    compiled: Annotated[Path, typer.Argument(metavar="OUT", help="A compiled model.", show_default=False)], as_json: AsJson = False
) -> None:
    """Show what was decided for every linear of OUT."""
    from qpc.checkpoint import read_report

    report = read_report(compiled)
    if as_json:
        print_json(described(report))
    else:
        show(report)


@app.command()
def generate(
    model: Compiled,
    prompt: Annotated[str, typer.Option(help="Text to continue.", show_default=False)],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest continuation.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token each time.")] = 0.0,
    seed: Seed = 0,
    device: Device = None,
    as_json: AsJson = False,
) -> None:
    """Continue a prompt."""
    import torch

    network, tokenizer = load_any(model, device)
    tokenizer = required(tokenizer, model)
    inputs = tokenizer(prompt, return_tensors="pt").to(next(network.parameters()).device)
    if inputs["input_ids"].shape[1] == 0:
        raise UsageError("the prompt has no tokens; give at least one character")
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    torch.manual_seed(seed)
    start_s = time.monotonic()
    generator: Any = network
    output = generator.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
        **sampling,
    )[0]
    elapsed_s = time.monotonic() - start_s
    fresh = output[inputs["input_ids"].shape[1] :]
    text = tokenizer.decode(fresh, skip_special_tokens=True)
    if as_json:
        print_json({"prompt": prompt, "text": text, "tokens": fresh.numel(), "elapsed_s": round(elapsed_s, 3)})
    else:
        print(prompt + text)
        print(f"{fresh.numel()} tokens, {fresh.numel() / elapsed_s:.1f} tokens/s", file=sys.stderr)


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
    from qpc.evaluate import evaluate

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


def parse_budget(bits: str | None, total: str | None, kl: str | None) -> Budget:
    """A `Budget` from the three options. Raises `BudgetError` unless at least one is given, each in its unit."""
    given = {"--bits": bits, "--size": total, "--kl": kl}
    limits = {LIMITS[option].field: limit(option, text) for option, text in given.items() if text is not None}
    if not limits:
        raise BudgetError(
            "no budget: give --bits 3.25 (average bits per weight), --size 80MB (whole checkpoint), --kl 0.1 (nats), or several"
        )
    return Budget(**limits)


def limit(option: str, text: str) -> Any:
    """The value of one limit. Raises `BudgetError` if the text is one of another kind."""
    kind = LIMITS[option]
    parsed = Budget.parse(text if any(letter.isalpha() for letter in text) else text + kind.unit)
    if [field.name for field in fields(parsed) if getattr(parsed, field.name) is not None] != [kind.field]:
        others = ", ".join(f"{name} takes {other.takes}" for name, other in LIMITS.items() if name != option)
        raise BudgetError(f"{option} {text} must be {kind.form}; {others}")
    return getattr(parsed, kind.field)


def load_any(path: Path, device: str | None) -> tuple[nn.Module, Any | None]:
    """A compiled or a plain model with its tokenizer, on the device."""
    from qpc.integrations.transformers import load_pretrained, load_tokenizer

    where = pick_device(device)
    if qpc.is_checkpoint(path):
        return qpc.load(path, device=where), load_tokenizer(path)
    model, tokenizer = load_pretrained(path)
    return model.to(where), tokenizer


def pick_device(name: str | None) -> str:
    """The device to run on. Raises `UsageError` if torch has no such device here."""
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UsageError(f"--device {name} cannot be used: {str(error).splitlines()[0]}") from error
    return name


def required(tokenizer: Any | None, model: Path) -> Any:
    """The tokenizer. Raises `ModelError` if there is none."""
    if tokenizer is None:
        raise ModelError(f"{model} has no tokenizer; put its tokenizer files (tokenizer.json, tokenizer_config.json) there")
    return tokenizer


def read_text(path: Path) -> str:
    """A text file as it is. Raises `UsageError` if it is missing or not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error


def first_tokens(tokenizer: Any, text: str, count: int) -> Tensor:
    """The first tokens of a text, int64 [count], with whatever the tokenizer itself puts in front.

    Raises `EvaluationError` if the text has fewer.
    """
    ids: Tensor = tokenizer(text, return_tensors="pt")["input_ids"][0]
    if ids.numel() < count:
        raise EvaluationError(f"the text has {ids.numel()} tokens, --tokens asks for {count}; give a longer text or --tokens {ids.numel()}")
    return ids[:count]


def described(report: Report) -> dict[str, Any]:
    """A report with its totals, for machines."""
    totals = {
        "linear_weights": report.linear_weights,
        "linear_bytes": report.linear_bytes,
        "bits_per_weight": report.bits_per_weight,
    }
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
