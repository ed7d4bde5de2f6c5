"""Access to the modules that numba compiles: they are imported at the first use, so that nothing else waits for numba."""

from importlib import import_module
from typing import Any

from qpc.errors import QuantizerError


def compiled(name: str) -> Any:
    """The module `qpc.quant.<name>`. Raises `QuantizerError` if numba is not installed."""
    try:
        return import_module(f"qpc.quant.{name}")
    except ImportError as error:
        raise QuantizerError("the CPU encoder needs numba: install it, or pass another encoder") from error
