"""The arguments of the command line: their types and help."""

from pathlib import Path
from typing import Annotated

import typer

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
        metavar="GPU", help="Where times are predicted: h100, h200, or a file of its times.", show_default="this one, if --latency asks"
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
    str,
    typer.Option(
        "--calibration",
        metavar="self|none|FILE",
        help="Text for error feedback: the model's own, none, or a file (of text, or of `qpc sample`).",
    ),
]
CalibrationTokens = Annotated[int | None, typer.Option("--calibration-tokens", help="Tokens of that text.", show_default=False)]
CalibrationStart = Annotated[
    str | None, typer.Option("--calibration-start", help="How the model's own text begins: bos, random or chat.", show_default=False)
]
RowFeedback = Annotated[
    str,
    typer.Option(
        "--row-feedback", metavar="auto|on|off", help="Carry errors from row to row too, weighed by gradients; auto: if on a GPU."
    ),
]
TuneSteps = Annotated[
    str,
    typer.Option("--tune", metavar="auto|off|STEPS", help="Steps in which scales and norms are tuned on that text; auto: if on a GPU."),
]
Streaming = Annotated[
    bool | None,
    typer.Option(
        "--stream/--no-stream",
        help="Read MODEL part by part, and go on where it was interrupted; needs --calibration FILE or none.",
        show_default="if it does not fit into memory",
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Spread weights over a Ray cluster: auto for that of this machine, local for a new one, or HOST:PORT. The result is the same.",
        show_default=False,
    ),
]
Seed = Annotated[int, typer.Option(help="The same seed gives the same result on the same machine.")]
Device = Annotated[str | None, typer.Option(help="Where to run, as torch names it. By default a GPU if there is one.", show_default=False)]
