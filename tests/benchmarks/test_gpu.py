"""The search for the largest batch, with a card that is made up."""

import pytest
from benchmarks.gpu import largest


@pytest.mark.parametrize("capacity", [0, 1, 2, 3, 4, 7, 100, 127, 128, 1000])
def test_the_largest_batch_that_fits(capacity):
    tried = []

    def fits(batch):
        tried.append(batch)
        return batch <= capacity

    assert largest(fits) == capacity
    assert len(tried) == len(set(tried)) <= 2 * max(capacity, 1).bit_length() + 1  # each try is a training step


def test_a_limit():
    assert largest(lambda batch: True, limit=100) == 100
    assert largest(lambda batch: batch <= 80, limit=100) == 80
