"""How much each linear matters: the loss per unit of relative squared error of its weight.

For small errors the loss grows by the sum of a_l t_l over the linears, t_l being the relative squared error of weight l (the linearity
theorem of HIGGS, arXiv 2411.17525, theorem 1). The coefficients a_l are estimated by injecting noise, or from gradients.
"""

from qpc.sensitivity.family import fitted
from qpc.sensitivity.gradient import Importance, by_gradient, parts
from qpc.sensitivity.linearity import checked
from qpc.sensitivity.noise import estimate, perturbed
from qpc.sensitivity.output_moments import OutputMoments
from qpc.sensitivity.values import Linearity, Loss, Method, Sensitivities, check_finite

__all__ = [
    "Importance",
    "Linearity",
    "Loss",
    "Method",
    "OutputMoments",
    "Sensitivities",
    "by_gradient",
    "check_finite",
    "checked",
    "estimate",
    "fitted",
    "parts",
    "perturbed",
]
