"""k-means finds what is there."""

from __future__ import annotations

import torch

from fastssl.models.dvae import nearest
from fastssl.prepare.kmeans import kmeans


def test_kmeans_finds_separate_clusters():
    torch.manual_seed(0)
    truth = torch.randn(9, 4) * 10
    points = truth.repeat_interleave(40, 0) + torch.randn(360, 4) / 10
    centres = kmeans(points, 9, 5, torch.Generator().manual_seed(0))
    codes = nearest(points, centres).view(9, 40)
    assert (codes == codes[:, :1]).all()
    means = points.view(9, 40, 4).mean(1)
    torch.testing.assert_close(centres[codes[:, 0]], means, rtol=1e-4, atol=1e-4)


def test_kmeans_leaves_no_centre_empty_where_points_suffice():
    points = torch.cat([torch.zeros(500, 2), torch.arange(12.0).view(6, 2)])
    centres = kmeans(points, 6, 8, torch.Generator().manual_seed(0))
    assert len(nearest(points, centres).unique()) == 6


def test_more_codes_than_different_patches_still_gives_finite_centres():
    centres = kmeans(torch.ones(50, 3), 4, 3, torch.Generator().manual_seed(0))
    assert centres.isfinite().all()


def test_the_best_of_several_tries_is_taken():
    points = torch.randn(6, 3, generator=torch.Generator().manual_seed(1)).repeat_interleave(20, 0) * 10
    points = points + torch.randn(points.shape, generator=torch.Generator().manual_seed(2)) / 10

    def error(centres):
        return (points - centres[nearest(points, centres)]).square().sum().item()

    generator = torch.Generator().manual_seed(0)
    single = [error(kmeans(points, 5, 3, generator)) for _ in range(4)]
    assert max(single) > min(single)
    assert error(kmeans(points, 5, 3, torch.Generator().manual_seed(0), tries=4)) == min(single)
