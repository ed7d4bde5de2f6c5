"""How long linears take on a GPU: a measured `Profile`, or a `Roofline` where there is none.

Both give whole picoseconds, so that the time of a model is a sum that depends on no order, and both say which times are estimates.
"""

from qpc.latency.gpus import GPUS, Gpu, latency_of
from qpc.latency.model import Latency, LatencyModel
from qpc.latency.profile import Profile
from qpc.latency.roofline import H100, Roofline

__all__ = ["GPUS", "H100", "Gpu", "Latency", "LatencyModel", "Profile", "Roofline", "latency_of"]
