"""All that the page is made of, read from the directory of a checkpoint without its tensors."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qpc.checkpoint import read_quantizers, read_report, tensor_bytes
from qpc.quant.quantizer import Quantizer
from qpc.report import Report, ReportRow


@dataclass(frozen=True)
class Source:
    """A checkpoint as its page sees it.

    title: name of the directory. architecture: class of the model, empty if its configuration names none. quantizers: by name of the
    linear or embedding. tensors: bytes of each stored tensor by name.
    """

    title: str
    architecture: str
    report: Report
    quantizers: Mapping[str, Quantizer]
    tensors: Mapping[str, int]

    @staticmethod
    def read(directory: str | os.PathLike[str]) -> "Source":
        """Raises `CheckpointError` if the directory holds no checkpoint, or a damaged one."""
        return Source(
            title=Path(directory).resolve().name,
            architecture=_architecture(Path(directory) / "config.json"),
            report=read_report(directory),
            quantizers=read_quantizers(directory),
            tensors=tensor_bytes(directory),
        )

    def loss(self, row: ReportRow) -> float | None:
        """What a linear adds to the predicted loss [nats], as the compiler counts it: None without a sensitivity or a quantizer."""
        quantizer = self.quantizers.get(row.name)
        if row.sensitivity is None or row.distortion is None or quantizer is None:
            return None
        return row.sensitivity * (row.distortion if row.remaining is None else quantizer.distortion * row.remaining)


def _architecture(path: Path) -> str:
    """The first architecture that a configuration of transformers names. Plain modules have no configuration."""
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["architectures"][0])
    except (OSError, ValueError, LookupError, TypeError):
        return ""
