"""The model card of a checkpoint: what was done to the model, how large it is, and how it is loaded."""

from qpc import __version__
from qpc.report import Report, size

CARD = "README.md"


def model_card(report: Report, base_model: str | None = None, measured_kl: float | None = None) -> str:
    """Markdown with the front matter that model hubs read.

    base_model: the original's name on a hub, "owner/name". measured_kl: mean KL(original || this) in nats per token, if it was measured.
    """
    front = ["library_name: transformers", "tags:", "- qpc", "- qpalette"]
    if base_model is not None:
        front.insert(0, f"base_model: {base_model}")
    linears = [row for row in report.quantized if row.budgeted]
    table = [("size", f"{size(report.model_bytes)}, of {size(report.model_bytes_before)}")]
    table.append(("linears", f"{len(linears)} at {report.bits_per_weight:.3f} bits per weight, with scales, signs and padding"))
    for row in report.quantized:
        if not row.budgeted:
            table.append(("embedding", f"`{row.name}` at {row.bits:.3f} bits per weight"))
    table.append(("budget", f"{report.budget}, effort {report.effort}, seed {report.seed}"))
    table.append(("calibration", report.calibration or "none"))
    if report.predicted_loss is not None:
        table.append(("predicted KL from the original", f"{report.predicted_loss:.4f} nats per token"))
    if measured_kl is not None:
        table.append(("measured KL from the original", f"{measured_kl:.4f} nats per token"))
    rows = "\n".join(f"| {name} | {value} |" for name, value in table)
    front_matter = "\n".join(front)
    return f"""---
{front_matter}
---

# {base_model or "A model"}, compiled by qpc {__version__}

| | |
|---|---|
{rows}

```python
import qpc  # makes the format known to transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(PATH, dtype="auto")
```

`qpc.json` says what was decided for every layer.
"""
