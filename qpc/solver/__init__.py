"""Which quantizer for which linear, and which linears run as one: exact allocation, with the gap to the proven optimum always stated.

Linears that legal groups tie form a cluster. Prices of bytes and time split the problem into clusters (`dual`), which gives a lower bound
and the few choices that an optimum can hold; an integer program decides among those (`search`).
"""

from qpc.solver.optimise import solve
from qpc.solver.statement import Allocation, InfeasibleError, Item, Limits, Resource, Rules, Status
from qpc.solver.theory import WaterFilling, decibels, palette_bound, water_filling

__all__ = [
    "Allocation",
    "InfeasibleError",
    "Item",
    "Limits",
    "Resource",
    "Rules",
    "Status",
    "WaterFilling",
    "decibels",
    "palette_bound",
    "solve",
    "water_filling",
]
