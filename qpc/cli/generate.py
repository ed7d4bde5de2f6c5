"""The command `qpc generate`."""

from typing import Annotated

import typer
from rich.console import Console

from qpc.cli.arguments import AsJson, Compiled, Device, Seed
from qpc.cli.inputs import load_any, required
from qpc.cli.output import print_json

EXAMPLES = (
    "qpc generate OUT 'Once upon a time'",
    "qpc generate OUT 'One' 'Two' --temperature 0.8 --seed 1 --json",
)


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


def show_text(piece: str) -> None:
    """Print a piece of a text at once."""
    print(piece, end="", flush=True)
