"""The windows that a search tries are the nearest, by either way of finding them."""

import pytest
import torch

from qpc.quant import neighbours as module
from qpc.quant.codebook import code_deviation
from qpc.quant.neighbours import SLOTS, nearest, neighbours

CASES = [(2, 7), (3, 9), (4, 10), (5, 10), (7, 12), (9, 11)]


def code(step_bits: int, window_bits: int) -> torch.Tensor:
    return torch.randn(1 << window_bits, 2, generator=torch.Generator().manual_seed(step_bits))


@pytest.mark.parametrize(("step_bits", "window_bits"), CASES)
def test_both_searches_list_the_nearest(step_bits: int, window_bits: int) -> None:
    points = code(step_bits, window_bits)
    listed = nearest(points, step_bits)
    grid = len(listed.edges) + 1
    centres = torch.tensor(module.GRID_SPREAD * float(points.double().std()) * module.ndtri(module._places(grid)[1]), dtype=torch.float32)
    other = module._nearest_on_gpu(points, step_bits, listed.slots, centres)  # the same operations run on a CPU
    assert torch.equal(listed.symbols.int(), other.int())
    branches = 1 << step_bits
    assert listed.slots == min(SLOTS, branches) and listed.symbols.shape == (grid * grid, listed.slots, len(points) // branches)
    for cell in (0, grid * grid // 2, grid * grid - 1):
        target = centres[[cell // grid, cell % grid]]
        distance = (points - target).square().sum(dim=1).reshape(-1, branches)
        best = distance.topk(listed.slots, largest=False).values
        assert torch.allclose(distance.gather(1, listed.symbols[cell].long().T), best)


def test_every_target_has_a_cell() -> None:
    listed = neighbours(6, 12, torch.device("cpu"))
    values = torch.tensor([[-1e3, 1e3], [0.0, 0.0], [1e3, -1e3]]) * code_deviation(6, 12)
    grid = len(listed.edges) + 1
    cells = listed.cells(values)
    assert cells.dtype == torch.int32 and cells.tolist()[0] == grid - 1 and cells.tolist()[2] == (grid - 1) * grid
    assert bool((listed.edges.diff() > 0).all())
