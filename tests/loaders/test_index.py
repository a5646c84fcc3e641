import numpy as np
import pytest

from fastssl.loaders.index import batch_ids, batches_per_epoch, order, replacement


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 1000, 4097])
def test_order_is_a_permutation(count):
    ids = order(count, seed=3, epoch=1)
    assert ids.dtype == np.int64
    assert np.array_equal(np.sort(ids), np.arange(count))


def test_order_is_a_pure_function_of_seed_and_epoch():
    assert np.array_equal(order(500, 1, 2), order(500, 1, 2))
    assert not np.array_equal(order(500, 1, 2), order(500, 1, 3))
    assert not np.array_equal(order(500, 1, 2), order(500, 2, 2))


def test_order_never_changes():
    """Runs that resume after an update of the package or of numpy rely on these numbers."""
    assert order(10, seed=0, epoch=0).tolist() == [2, 1, 5, 7, 6, 9, 4, 0, 3, 8]


def test_order_is_uniform():
    """Every sample is about equally often in each quarter of the epoch."""
    quarter = np.zeros((40, 4))
    for epoch in range(1000):
        position = np.argsort(order(40, seed=9, epoch=epoch))
        quarter[np.arange(40), position // 10] += 1
    assert abs(quarter - 250).max() < 5 * np.sqrt(1000 * 0.25 * 0.75)


@pytest.mark.parametrize(("batch_size", "world"), [(16, 1), (8, 2), (2, 8)])
def test_global_batch_does_not_depend_on_the_number_of_ranks(batch_size, world):
    ids = order(100, 0, 0)
    assert batches_per_epoch(100, batch_size, world) == 6
    for position in range(6):
        mine = [batch_ids(ids, position, batch_size, rank, world) for rank in range(world)]
        assert np.array_equal(np.concatenate(mine), ids[16 * position : 16 * (position + 1)])


def test_accumulated_batches_make_up_the_same_step():
    ids = order(100, 0, 0)
    small = [batch_ids(ids, position, 4) for position in (6, 7)]
    assert np.array_equal(np.concatenate(small), batch_ids(ids, 3, 8))


def test_errors_are_clear():
    with pytest.raises(ValueError, match=r"has 15 images, fewer than one batch of 16 \(8 on each of 2 ranks\)"):
        batches_per_epoch(15, 8, 2)
    with pytest.raises(ValueError, match="batch 3 of the epoch does not exist; there are 3"):
        batch_ids(np.arange(15), 3, 5)
    with pytest.raises(ValueError, match="rank 2 does not exist; there are 2"):
        batch_ids(np.arange(16), 0, 4, 2, 2)
    with pytest.raises(ValueError, match="has 0 samples"):
        order(0, 0, 0)


def test_replacement_is_pure_and_in_range():
    drawn = [replacement(sample, attempt, 7, 1, 2) for sample in range(7) for attempt in range(20)]
    assert drawn == [replacement(sample, attempt, 7, 1, 2) for sample in range(7) for attempt in range(20)]
    assert set(drawn) == set(range(7))


def test_page_order_reads_window_after_window():
    pages = np.repeat(np.arange(7) * 3, 10)  # page numbers with gaps
    ids = order(70, seed=1, epoch=2, pages=pages, window=2)
    assert np.array_equal(np.sort(ids), np.arange(70))
    windows = [set(pages[ids[begin : begin + 20]]) for begin in range(0, 70, 20)]
    assert [len(window) for window in windows] == [2, 2, 2, 1]
    assert len(set().union(*windows)) == 7
    assert len(set(pages[ids[:5]])) == 2  # the pages of a window are mixed
    assert not np.array_equal(ids[:20], np.sort(ids[:20]))
    other = order(70, seed=1, epoch=3, pages=pages, window=2)
    assert not np.array_equal(pages[ids], pages[other])
    assert np.array_equal(ids, order(70, seed=1, epoch=2, pages=pages, window=2))


def test_one_window_over_everything_is_the_plain_order():
    pages = np.arange(50) // 5
    assert np.array_equal(order(50, 1, 2, pages, window=10), order(50, 1, 2))
    assert np.array_equal(order(50, 1, 2, pages, window=99), order(50, 1, 2))
