"""How long linears take on a GPU: a measured `Profile`, or a `Roofline` where there is none.

Both give whole picoseconds, so that the time of a model is a sum that depends on no order, and both say which times are estimates.
"""

from qpc.latency.model import Latency, LatencyModel
from qpc.latency.profile import Profile
from qpc.latency.roofline import H100, Roofline

__all__ = ["H100", "Latency", "LatencyModel", "Profile", "Roofline"]
