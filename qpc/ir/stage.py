"""The stages that a program passes through, in order."""

from enum import IntEnum


class Stage(IntEnum):
    """How far a program has come. Each pass requires one stage and ensures another, never an earlier one."""

    CAPTURED = 0
    """One fx graph; parameters are placeholders; linears in whatever form the model wrote them."""
    CANONICAL = 1
    """Every linear is one `aten.linear` call with a `LinearSite`."""
    GROUPED = 2
    """Linears that read the same value know the `FusionGroup` that they may join."""
    ALLOCATED = 3
    """Every linear has a quantizer (or `None`: it stays as it is)."""
    QUANTIZED = 4
    """Every linear with a quantizer has its packed weight."""
    LOWERED = 5
    """Quantized linears are qpc operators."""
