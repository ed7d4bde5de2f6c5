"""The command `qpc eval`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from qpc.cli.arguments import AsJson, Compiled, Device
from qpc.cli.inputs import load_any, read_text, required
from qpc.cli.output import print_json
from qpc.terminal import ProgressBars

EXAMPLES = ("qpc eval OUT --baseline MODEL --text FILE",)


def evaluate_model(
    model: Compiled,
    text: Annotated[Path, typer.Option(help="UTF-8 file; its first tokens are read as they are.", show_default=False)],
    reference: Annotated[
        Path | None,
        typer.Option("--baseline", "--reference", metavar="MODEL", help="The original model, to compare with.", show_default=False),
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
