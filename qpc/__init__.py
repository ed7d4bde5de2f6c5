"""qpc: a compiler that makes language models smaller and faster with the least possible loss.

model = qpc.compile(model, budget=3.25)
qpc.save(model, "out")
model = qpc.load("out")
"""

from typing import TYPE_CHECKING, Any

from qpc.errors import QpcError
from qpc.integrations.registration import register

if TYPE_CHECKING:
    from qpc.budget import Budget
    from qpc.calibration import SelfSampled
    from qpc.checkpoint import is_checkpoint
    from qpc.compiler import report_of
    from qpc.integrations.compilation import compile
    from qpc.integrations.generation import Generated, generate
    from qpc.integrations.hf_config import QPaletteConfig
    from qpc.integrations.storage import load, save
    from qpc.integrations.streamed import stream
    from qpc.passes.tune import Tuning
    from qpc.planner import Plan, plan
    from qpc.report import Report
    from qpc.verification import Verification, verify

__version__ = "0.1.0"
__all__ = [
    "Budget",
    "Generated",
    "Plan",
    "QPaletteConfig",
    "QpcError",
    "Report",
    "SelfSampled",
    "Tuning",
    "Verification",
    "compile",
    "generate",
    "is_checkpoint",
    "load",
    "plan",
    "report_of",
    "save",
    "stream",
    "verify",
]

_HOMES = {
    "Budget": "qpc.budget",
    "Generated": "qpc.integrations.generation",
    "Plan": "qpc.planner",
    "QPaletteConfig": "qpc.integrations.hf_config",
    "Report": "qpc.report",
    "SelfSampled": "qpc.calibration",
    "Tuning": "qpc.passes.tune",
    "Verification": "qpc.verification",
    "compile": "qpc.integrations.compilation",
    "generate": "qpc.integrations.generation",
    "is_checkpoint": "qpc.checkpoint",
    "load": "qpc.integrations.storage",
    "plan": "qpc.planner",
    "report_of": "qpc.compiler",
    "save": "qpc.integrations.storage",
    "stream": "qpc.integrations.streamed",
    "verify": "qpc.verification",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import qpc` stays light."""
    if name not in _HOMES:
        raise AttributeError(f"module 'qpc' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


register()
