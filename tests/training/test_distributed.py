"""Several processes compute what one computes: gathering, sums, merged statistics, batch norm, with their gradients."""

import pytest
import timm
import torch
from torch import distributed as dist
from torch import nn

from fastssl.training import distributed
from fastssl.training.batch_norm import SyncBatchNorm, synchronise_batch_norm, update_running

X = torch.randn(8, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def pair_loss(mine, everyone):
    """Each of my rows against all rows, unsymmetric, so that a lost gradient shows."""
    return (mine @ everyone.T).exp().log1p().mean()


def gathered(rank):
    x = X[4 * rank : 4 * rank + 4].clone().requires_grad_()
    everyone = distributed.gather(x)
    pair_loss(x, everyone).backward()
    return everyone.detach(), x.grad / 2  # as DDP averages


def test_gather_has_the_gradient_of_one_process(on_processes):
    whole = X.clone().requires_grad_()
    pair_loss(whole, whole).backward()
    results = on_processes(2, gathered)
    assert all(torch.equal(everyone, X) for everyone, _ in results)
    torch.testing.assert_close(torch.cat([grad for _, grad in results]), whole.grad)


def merged(rank):
    x = X[4 * rank : 4 * rank + 4]
    mean = x.mean(0)
    return distributed.merge_moments(4, mean, (x - mean).square().sum(0))


def test_merged_moments_are_those_of_all_values(on_processes):
    for count, mean, m2 in on_processes(2, merged):
        assert count == 8
        torch.testing.assert_close(mean, X.mean(0))
        torch.testing.assert_close(m2, (X - X.mean(0)).square().sum(0))


def network():
    torch.manual_seed(1)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5)]
    return nn.Sequential(*layers, nn.BatchNorm1d(5, affine=False)).double()


IMAGES = torch.randn(8, 3, 4, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
WEIGHT = torch.randn(5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def trained(rank, shares):
    """Two steps on the process's share of the images, the loss a mean over all of them."""
    net, begin = synchronise_batch_norm(network(), torch.device("cpu")), sum(shares[:rank])
    images = IMAGES[begin : begin + shares[rank]]
    for _ in range(2):
        out = (net(images) + 0.3 * images.mean((1, 2, 3))[:, None]).exp() * WEIGHT
        (out.sum() / (5 * sum(shares))).backward()
    grads = [distributed.all_reduce_sum(p.grad) for p in net.parameters()]
    return net.state_dict(), grads


SHARES = [(4, 4), (3, 5), (0, 4), (4, 0)]


def trained_on_all_shares(rank):
    return [trained(rank, shares) for shares in SHARES]


def test_batch_norm_of_two_processes_is_that_of_one_on_all_images(on_processes):
    for results in on_processes(2, trained_on_all_shares):
        for shares, (other_state, other_grads) in zip(SHARES, results, strict=True):
            state, grads = trained(0, (sum(shares),))
            assert state.keys() == other_state.keys()
            for key, value in state.items():
                message = f"images {shares}, {key}: {{}}".format
                torch.testing.assert_close(other_state[key], value, msg=message)
            for a, b in zip(other_grads, grads, strict=True):
                torch.testing.assert_close(a, b)


def test_on_one_process_it_is_pytorchs_own():
    net, own = network(), network()
    own = synchronise_batch_norm(own, torch.device("cpu"))
    assert type(own[1]) is SyncBatchNorm
    assert torch.equal(own(IMAGES), net(IMAGES))
    assert torch.equal(own.eval()(IMAGES), net.eval()(IMAGES))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_norms_that_hold_an_activation_keep_it(device):
    net = timm.create_model("regnetx_002", pretrained=False).eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = net(images)
        torch.testing.assert_close(synchronise_batch_norm(net, torch.device(device)).eval()(images), before)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_running_statistics_move_as_pytorchs(momentum):
    norm = nn.BatchNorm1d(3, momentum=momentum).double()
    ours = nn.BatchNorm1d(3, momentum=momentum).double()
    for x in (X, X[:5] * 2):
        norm(x)
        update_running(ours, x.mean(0), x.var(0, unbiased=False), len(x))
    for key, value in norm.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[key], value)


PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:545]"
NCCL = "NCCL error in: ProcessGroupNCCL.cpp:94,"


@pytest.mark.parametrize(
    ("error", "gone"),
    [
        (RuntimeError(f"{PAIR} Read error [127.0.0.1]:25494:"), True),
        (RuntimeError(f"{PAIR} Connection closed by peer [10.0.0.1]:4"), True),
        (RuntimeError(PAIR.replace("pair", "unbound_buffer") + " Timed out waiting 100ms for recv to complete"), True),
        (RuntimeError(f"{PAIR} op.preamble.length <= op.nbytes. 8 vs 4"), False),  # other shapes than its peer
        (RuntimeError("cannot read /data/gloo/connection.jpg"), False),
        (dist.DistBackendError(f"{NCCL} remote process exited or there was a network error\nncclRemoteError:"), True),
        (dist.DistBackendError(f"{NCCL} invalid usage\nncclInvalidUsage: This usually reflects ..."), False),
        (dist.DistNetworkError("failed to recv, got 0 bytes"), True),
        (ValueError("timeout"), False),
    ],
)
def test_a_peer_is_blamed_for_broken_connections_alone(error, gone):
    assert distributed.peer_is_gone(error) is gone
