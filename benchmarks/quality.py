"""Loss of quality against bits: `python -m benchmarks.quality MODEL --text FILE --json RESULT`.

Compiles one model at several budgets with one set of sensitivities, and measures perplexity and mean KL(original || compiled) in windows
that do not overlap. `--double-newlines` prepares WikiText as its users do. README's figures and picture come from the file that it writes.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

import qpc
from qpc.evaluate import evaluate
from qpc.integrations.transformers import load_pretrained
from qpc.sensitivity import Loss, Sensitivities


def main() -> None:
    """Measure, print a line per budget, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--bits", nargs="+", default=["2", "2.5", "3", "3.25", "3.5", "4", "5"])
    parser.add_argument("--effort", default="default")
    parser.add_argument("--tokens", type=int, nargs="+", default=[5120, 20480])
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--double-newlines", action="store_true")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    original, tokenizer = load_pretrained(options.model, dtype=torch.float32)
    assert tokenizer is not None, f"{options.model} has no tokenizer"
    original = original.to(device)
    text = options.text.read_text(encoding="utf-8")
    tokens = torch.tensor(tokenizer(text.replace("\n", "\n\n") if options.double_newlines else text)["input_ids"])
    rows: list[dict[str, Any]] = []
    sensitivities: Sensitivities | None = None
    for bits in options.bits:
        start_s = time.monotonic()
        compiled = qpc.compile(original, bits, effort=options.effort, sensitivities=sensitivities)
        report = qpc.report_of(compiled)
        row: dict[str, Any] = {"budget": bits, "bits": report.bits_per_weight, "compile_s": round(time.monotonic() - start_s, 1)}
        row |= {"weight_bytes": report.linear_bytes, "model_bytes": report.model_bytes, "predicted_loss": report.predicted_loss}
        for count in options.tokens:
            found = evaluate(compiled, original, tokens[:count].to(device), options.window)
            row[f"at_{count}"] = {"kl": found.kl, "perplexity": found.perplexity, "top1_agreement": found.top1_agreement}
            row[f"at_{count}"]["reference_perplexity"] = found.reference_perplexity
        if sensitivities is None:
            values = {each.name: each.sensitivity or 0.0 for each in report.rows}
            sensitivities = Sensitivities(values, Loss.KL, noise=0.02, seed=0, tokens=0)
        print(json.dumps(row), flush=True)
        rows.append(row)
    result = {
        "model": options.model.name,
        "text": options.text.name,
        "window": options.window,
        "effort": options.effort,
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.processor() or platform.machine(),
        "versions": {"qpc": qpc.__version__, "torch": torch.__version__, "transformers": transformers.__version__},
        "rows": rows,
    }
    options.json.parent.mkdir(parents=True, exist_ok=True)
    options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
