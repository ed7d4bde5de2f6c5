"""The arguments of the command line: their types and help, and the values that they stand for."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qpc.budget import Budget, rates, times
from qpc.errors import BudgetError, ModelError, UsageError

if TYPE_CHECKING:
    from torch import nn

    from qpc.sensitivity import Sensitivities

Compiled = Annotated[Path, typer.Argument(metavar="OUT", help="A compiled model, or a plain Hugging Face directory.", show_default=False)]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="Directory with config.json and safetensors, or a GGUF file.")]
Total = Annotated[str | None, typer.Option("--size", help="Size of the whole checkpoint: 80MB, 4.2GiB.", show_default=False)]
Kl = Annotated[str | None, typer.Option(metavar="NATS", help="Predicted KL: the smallest model that stays within it.", show_default=False)]
Latency = Annotated[
    str | None,
    typer.Option(help="Time of these linears in a step: 3ms, 3ms@8 for a batch of 8, or 2000tok/s@8.", show_default=False),
]
GpuName = Annotated[
    str | None,
    typer.Option(
        metavar="GPU", help="Where times are predicted: h100, or a file of its times.", show_default="this one, if --latency asks"
    ),
]
Batch = Annotated[int | None, typer.Option(min=1, help="Sequences in a step, where --latency names none.", show_default="1")]
EffortName = Annotated[str, typer.Option(help="fast, default, high or max: better codes for more time.")]
Exclude = Annotated[list[str] | None, typer.Option(help="Shell pattern of linears that stay as they are; may be repeated.")]
SameInGroup = Annotated[
    bool, typer.Option("--same-in-group", help="Linears of one input get the same quantizer, as vLLM runs them.", show_default=False)
]
RotationBlock = Annotated[
    int | None, typer.Option(min=1, help="Most inputs that a rotation mixes: the width of a tensor-parallel shard.", show_default=False)
]
BitsOrRange = Annotated[
    str | None, typer.Option(help="Average bits per weight of the linears: 3.25, or a range: 2.5..4.5.", show_default=False)
]
Picture = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Draw predicted KL against size, and time with --gpu: .png, .svg, .pdf.", show_default=False),
]
Folding = Annotated[
    bool, typer.Option("--fold/--no-fold", help="Multiply gains and rotations into the weights around them, where no output changes.")
]
EmbeddingBits = Annotated[
    str | None, typer.Option(metavar="BITS", help="Bits per weight of embeddings and output head.", show_default="as they are")
]
SensitivityFile = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="How much each linear matters, as JSON.", show_default="estimated, and kept in QPC_CACHE"),
]
SensitivityMethod = Annotated[
    str,
    typer.Option(
        "--sensitivity",
        metavar="gradient|self|random|FILE",
        help="How to estimate how much linears matter: by gradients, or by noise on the model's own text, random tokens or a file.",
    ),
]
CalibrationSource = Annotated[
    str, typer.Option("--calibration", metavar="self|none|FILE", help="Text for error feedback: the model's own, none, or a file.")
]
CalibrationTokens = Annotated[int | None, typer.Option("--calibration-tokens", help="Tokens of that text.", show_default=False)]
CalibrationStart = Annotated[
    str | None, typer.Option("--calibration-start", help="How the model's own text begins: bos, random or chat.", show_default=False)
]
TuneSteps = Annotated[
    str,
    typer.Option("--tune", metavar="auto|off|STEPS", help="Steps in which scales and norms are tuned on that text; auto: if on a GPU."),
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
    "--latency": LimitOption("seconds_per_token", "", "a time or a speed", "a time such as 3ms or 3ms@8, or a speed such as 300tok/s"),
}


@dataclass(frozen=True)
class Limited:
    """The options that make a budget, as they were given. batch: of --latency where that names none."""

    bits: str | None
    size: str | None
    kl: str | None
    latency: str | None
    batch: int | None

    @property
    def given(self) -> dict[str, str]:
        """The limits that are there, by option. Raises `BudgetError` if there are two batches."""
        latency = self.latency
        if latency is not None and self.batch is not None:
            if "@" in latency:
                raise BudgetError(f"--latency {latency} names the batch; leave out --batch {self.batch}")
            latency = f"{latency}@{self.batch}"
        texts = {"--bits": self.bits, "--size": self.size, "--kl": self.kl, "--latency": latency}
        return {option: text for option, text in texts.items() if text is not None}

    def budget(self) -> Budget:
        """All limits together. Raises `BudgetError` unless at least one is given, each in its unit."""
        if not self.given:
            raise BudgetError(
                "no budget: give --bits 3.25 (average bits per weight), --size 80MB (whole checkpoint), --kl 0.1 (nats), "
                "--latency 3ms (time of the linears), or several"
            )
        return together(limit(option, text) for option, text in self.given.items())

    def budgets(self, step: str | None) -> list[Budget]:
        """Budgets in the order of a range of --bits or --latency, each with the other limits; one if there is no range.

        step: between two; a quarter of a bit, or an eighth of the range of times, if None. Raises `BudgetError` as `budget` does, or for a
        range that is none.
        """
        ranges = [option for option, text in self.given.items() if ".." in text]
        if not ranges:
            return [self.budget()]
        option = ranges[0]
        if option not in ("--bits", "--latency") or len(ranges) > 1:
            raise BudgetError(f"one of --bits and --latency may be a range, not {' and '.join(ranges)}")
        if self.kl is not None:
            raise BudgetError(f"--kl asks for the smallest model, {option} A..B for the least KL at each budget; give one of them")
        rest = [limit(name, text) for name, text in self.given.items() if name != option]
        found = rates(self.given[option], step or "0.25") if option == "--bits" else times(self.given[option], step)
        return [together((*rest, each)) for each in found]


def together(budgets: Iterable[Budget]) -> Budget:
    """The limits of all, of which each sets others."""
    found: dict[str, Any] = {}
    for budget in budgets:
        found |= budget.limits | ({} if budget.seconds_per_token is None else {"batch": budget.batch})
    return Budget(**found)


def limit(option: str, text: str) -> Budget:
    """The budget of one limit. Raises `BudgetError` if the text is one of another kind."""
    kind = LIMITS[option]
    parsed = Budget.parse(text if any(letter.isalpha() for letter in text) else text + kind.unit)
    if list(parsed.limits) != [kind.field]:
        others = ", ".join(f"{name} takes {other.takes}" for name, other in LIMITS.items() if name != option)
        raise BudgetError(f"{option} {text} must be {kind.form}; {others}")
    return parsed


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


def read_text(path: Path) -> str:
    """A text file as it is. Raises `UsageError` if it is missing or not UTF-8."""
    try:
        return path.read_bytes().decode("utf-8")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}; give a text file") from error
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text (byte {error.start}); convert it first") from error


def read_sensitivities(path: Path) -> "Sensitivities":
    """Sensitivities from a JSON file. Raises `QpcError` if it holds none."""
    from qpc.sensitivity import Sensitivities

    return Sensitivities.from_json(read_text(path))


def load_original(path: Path, effort: str) -> tuple["nn.Module", Any | None]:
    """A model that is not compiled yet, with its tokenizer. Raises `QpcError` before it takes time if that or the effort is wrong."""
    from qpc.checkpoint import is_checkpoint
    from qpc.integrations.transformers import load_pretrained
    from qpc.quant.palette import Effort

    Effort.parse(effort)
    if is_checkpoint(path):
        raise UsageError(f"{path} is a compiled model already; give the original")
    return load_pretrained(path)


def load_any(path: Path, device: str | None) -> tuple["nn.Module", Any | None]:
    """A compiled or a plain model with its tokenizer, on the device."""
    from qpc.checkpoint import is_checkpoint
    from qpc.integrations.storage import load
    from qpc.integrations.transformers import load_pretrained, load_tokenizer

    where = pick_device(device)
    if is_checkpoint(path):
        return load(path, device=where), load_tokenizer(path)
    model, tokenizer = load_pretrained(path)
    return model.to(where), tokenizer


def required(tokenizer: Any | None, model: Path) -> Any:
    """The tokenizer. Raises `ModelError` if there is none."""
    if tokenizer is None:
        raise ModelError(f"{model} has no tokenizer; put its tokenizer files (tokenizer.json, tokenizer_config.json) there")
    return tokenizer
