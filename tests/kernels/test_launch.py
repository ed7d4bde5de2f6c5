"""How a batch is cut into launches."""

import pytest

from qpc.kernels.launch import MAX_BATCH, VECTOR_BATCHES, cut_batch


@pytest.mark.parametrize("batch", range(MAX_BATCH + 1))
def test_every_row_is_in_one_launch(batch: int) -> None:
    cuts = list(cut_batch(batch))
    assert [row for cut in cuts for row in range(batch)[cut]] == list(range(batch))
    assert {cut.stop - cut.start for cut in cuts} <= set(VECTOR_BATCHES)


@pytest.mark.parametrize("batch", range(1, MAX_BATCH + 1))
def test_as_few_launches_as_can_be(batch: int) -> None:
    fewest = [0]
    for rows in range(1, batch + 1):
        fewest.append(1 + min(fewest[rows - size] for size in VECTOR_BATCHES if size <= rows))
    assert len(list(cut_batch(batch))) == fewest[batch] <= 5
