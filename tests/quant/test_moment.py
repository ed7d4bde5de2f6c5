"""The moment of rotated inputs is the rotated moment."""

import pytest
import torch

from qpc.quant.moment import Moment
from qpc.quant.rotation import Rotation


@pytest.mark.parametrize("slab", [32, 2048])
@pytest.mark.parametrize("features", [16, 60, 112])
def test_rotated(features: int, slab: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qpc.quant.moment.SLAB", slab)
    generator = torch.Generator().manual_seed(features)
    rotation = Rotation.random(features, generator)
    x, other = (
        torch.randn(50, features, generator=generator, dtype=torch.float64) @ torch.randn(features, features).double() for _ in "ab"
    )
    moment = Moment(x.t() @ x / 50, 50, held_out=Moment(other.t() @ other / 50, 50)).rotated(rotation)
    y, z = rotation.apply(x), rotation.apply(other)
    torch.testing.assert_close(moment.matrix, y.t() @ y / 50)
    assert moment.held_out is not None
    torch.testing.assert_close(moment.held_out.matrix, z.t() @ z / 50)
    assert torch.equal(moment.matrix, moment.matrix.t())
    assert moment.count == 50
