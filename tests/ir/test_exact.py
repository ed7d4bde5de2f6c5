"""Running in float64: nothing is rounded to a narrower dtype that the graph names, and parameters can be others."""

import torch
from torch import Tensor, nn

from qpc.capture import capture
from qpc.ir.exact import run_exactly


class Small(nn.Module):
    """Adds what float32 cannot see, in between casts to half types."""

    def __init__(self) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(8, 8)), nn.Parameter(torch.tensor(1e-12))

    def forward(self, x: Tensor) -> Tensor:
        y = x.to(torch.bfloat16).float() + 1
        return (y + self.bias - y) * torch.ones(8, dtype=torch.float16) + nn.functional.linear(x - x, self.weight)


def test_nothing_is_rounded() -> None:
    module, x = Small().eval(), torch.randn(3, 8)
    program = capture(module, example_inputs=(x,))
    assert not module(x).any()
    (found,) = run_exactly(program, program.graph, (x,), {})
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, torch.full((3, 8), float(module.bias.detach()), dtype=torch.float64), rtol=1e-3, atol=0)


def test_parameters_can_be_others() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 3)).eval(), torch.randn(3, 8)
    program = capture(model, example_inputs=(x,))
    (found,) = run_exactly(program, program.graph, (x,), {"2.weight": lambda weight: 2 * weight, "2.bias": torch.zeros_like})
    expected = 2 * torch.tanh(model[0].double()(x.double())) @ model[2].double().weight.T
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
