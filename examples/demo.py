"""The main job from end to end: compile a model, look at the result, and let both models speak.

The text on which they are compared is sampled from the original itself, so that nothing needs to be downloaded for it.
"""

import argparse
import os
import resource
import time
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from rich.console import Console
from rich.panel import Panel
from rich.table import Table
from torch import nn

import qpc
from qpc.evaluate import evaluate
from qpc.integrations.transformers import load_pretrained
from qpc.report import allocation_table, remarks, summary
from qpc.sampling import sample
from qpc.terminal import ProgressBars

SEQUENCES, LENGTH = 16, 128
PROMPT = "The most surprising thing about the deep sea is"


def main() -> None:
    """Load, compile, save, load again, measure, generate."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--bits", default="4")
    parser.add_argument("--effort", default="default")
    options = parser.parse_args()
    start_s = time.monotonic()
    console = Console(highlight=False)

    original, tokenizer = load_pretrained(options.model)
    console.print(f"[bold]Compiling {options.model} to {options.bits} bits per weight[/bold]\n")
    with ProgressBars() as progress:
        compiled = qpc.compile(original, options.bits, effort=options.effort, progress=progress)
        qpc.save(compiled, options.out, tokenizer_from=options.model, overwrite=True)
        report = qpc.report_of(compiled)
        del compiled
        loaded = qpc.load(options.out)
        text = sample(original, SEQUENCES, LENGTH, seed=1, progress=progress)
        result = evaluate(loaded, original, text.flatten(), LENGTH, progress)

    console.print(allocation_table(report))
    console.print()
    console.print(summary(report))
    if report.remarks:
        console.print("\n[bold]remarks[/bold]")
        console.print(remarks(report))
    assert result.kl is not None and result.reference_perplexity is not None and result.top1_agreement is not None
    console.print(f"\n[bold]On {result.tokens} tokens that the original made up[/bold]")
    console.print(f"mean KL(original || compiled)  {result.kl:.4f} nats per token")
    console.print(
        f"perplexity                     {result.perplexity:.3f} against {result.reference_perplexity:.3f}, "
        f"ratio {result.perplexity / result.reference_perplexity:.4f}"
    )
    console.print(f"same likeliest token           {result.top1_agreement:.1%}\n")
    side_by_side = Table.grid(padding=(0, 1), expand=True)
    side_by_side.add_column(ratio=1)
    side_by_side.add_column(ratio=1)
    side_by_side.add_row(
        Panel(continuation(original, tokenizer), title="original"),
        Panel(continuation(loaded, tokenizer), title=f"compiled, {report.bits_per_weight:.2f} bits"),
    )
    console.print(side_by_side)
    peak_gb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    console.print(f"\nelapsed {time.monotonic() - start_s:.0f} s, peak memory {peak_gb:.2f} GB; the compiled model is in {options.out}")


def continuation(model: nn.Module, tokenizer: Any) -> str:
    """The prompt and what the model makes of it, the likeliest token each time."""
    inputs = tokenizer(PROMPT, return_tensors="pt")
    generator: Any = model
    with torch.inference_mode():
        output = generator.generate(**inputs, max_new_tokens=48, do_sample=False)
    text: str = tokenizer.decode(output[0], skip_special_tokens=True)
    return text


if __name__ == "__main__":
    main()
