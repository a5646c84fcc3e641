"""The table of stochastic depth: against the reference and a plain loop, and what it depends on."""

import pytest
import torch

from fastssl.kernels._check import KernelError
from fastssl.kernels._path import forced
from fastssl.kernels.drop_path import drop_path
from fastssl.loaders.philox import philox


def table(device, ids=(5, 9, 2**31 + 3), path="reference", **options):
    ids = torch.tensor(ids, device=device)
    how = {"rate": 0.4, "layers": 3, "rows": len(ids), "seed": 3, "step": 11, "key": 77, **options}
    with forced(path):
        return drop_path(ids, **how)


def test_equals_a_loop_over_the_loaders_words(path, device):
    found = table(device, path=path, rows=12, together=2, first=4)
    for branch in range(6):
        share = 0.2 * (branch // 2)
        for row in range(12):
            image, crop = [5, 9, 2**31 + 3][row // 2 % 3], 4 + row // 6 * 2 + row % 2
            word = philox((image, 11, crop, branch), (3, 77))[0]
            expected = 0 if word < share * 2**32 else 1 / (1 - share)
            assert found[branch, row].item() == pytest.approx(expected, rel=1e-6)


def test_a_sample_has_its_draws_in_whatever_batch(path, device):
    many = list(range(100, 140))
    whole = table(device, many, path)
    torch.testing.assert_close(table(device, many[7:19], path), whole[:, 7:19], rtol=0, atol=0)
    order = torch.randperm(40).tolist()
    torch.testing.assert_close(table(device, [many[i] for i in order], path), whole[:, order], rtol=0, atol=0)
    crops = table(device, many, path, rows=120, together=3).unflatten(1, (40, 3))
    torch.testing.assert_close(crops[:, :, 0], whole, rtol=0, atol=0)
    torch.testing.assert_close(table(device, many, path, first=2), crops[:, :, 2], rtol=0, atol=0)
    again = table(device, many, path, rows=80).unflatten(1, (2, 40))
    torch.testing.assert_close(again, crops[:, :, :2].transpose(1, 2), rtol=0, atol=0)
    for change in ({"seed": 4}, {"step": 12}, {"key": 78}, {"first": 1}):
        assert not torch.equal(table(device, many, path, **change), whole), change
    clock = torch.tensor(11, device=device)
    torch.testing.assert_close(table(device, many, path, step=clock), whole, rtol=0, atol=0)


def test_shares_and_means(path, device):
    found = table(device, range(3000), path, rate=0.4)
    assert found[:2].eq(1).all()
    for layer in (1, 2):
        kept = found[2 * layer : 2 * layer + 2].gt(0).float()
        assert kept.mean().item() == pytest.approx(1 - 0.2 * layer, abs=0.025)
        assert (kept[0] * kept[1]).mean().item() == pytest.approx((1 - 0.2 * layer) ** 2, abs=0.03)  # independent
    assert found.mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rows": 4}, "rows must be a multiple of 3 images x 1 crops, not 4"),
        ({"rows": 3, "together": 2}, "rows must be a multiple of 3 images x 2 crops, not 3"),
        ({"rate": 1.5}, "rate must be from 0 to 1, not 1.5"),
        ({"layers": 0}, "layers must be at least 1, not 0"),
        ({"step": torch.zeros(2, dtype=torch.int64)}, r"step must be \[\], not \[2\]"),
    ],
)
def test_bad_arguments_are_named(change, message):
    with pytest.raises(KernelError, match=message):
        table("cpu", **change)
