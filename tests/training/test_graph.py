"""What a captured step does: buffers, gradients at their places, giving up. Without a GPU an eager stand-in takes the
graph's place."""

import pytest
import torch
from torch import nn

from fastssl.batch import Batch
from fastssl.training import graph as module
from fastssl.training.graph import StepGraph, as_buffers, difference, into_buffers, shapes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_batch(seed, rows=4):
    generator = torch.Generator().manual_seed(seed)
    views = {"main": torch.randn(rows, 1, 3, 8, 8, generator=generator)}
    masks = {"main": (torch.arange(2).expand(rows, 2), torch.arange(2, 4).expand(rows, 2))}
    return Batch(torch.arange(rows) + seed, torch.zeros(rows).long(), epoch=seed, views=views, masks=masks).to(DEVICE)


def make_pass(seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Flatten(1), nn.Linear(192, 8), nn.BatchNorm1d(8), nn.Linear(8, 1)).to(DEVICE)

    def run(batch):
        out = network(batch.views["main"][:, 0])
        loss = (out - batch.id[:, None] * torch.as_tensor(batch.epoch, device=DEVICE) / 1e4).square().mean()
        loss.backward()
        return loss.detach(), {"size": out.detach().abs().mean()}

    return network, run


class Stand:
    """Plays a graph on the CPU: a replay is the pass on the same buffers, its gradients written to the same places."""

    def __init__(self, owner):
        self.owner = owner

    def pool(self):
        return None


@pytest.fixture
def played(monkeypatch):
    if DEVICE == "cuda":
        return
    monkeypatch.setattr(torch.cuda, "get_rng_state", torch.get_rng_state)
    monkeypatch.setattr(torch.cuda, "set_rng_state", torch.set_rng_state)

    def capture(self, key, batch, first):
        static = as_buffers(batch)
        buffers = [b.clone() for b in self.network.buffers()]
        loss, terms = self.run(static)
        for buffer, value in zip(self.network.buffers(), buffers, strict=True):
            buffer.copy_(value)
        scalars = torch.stack([loss, *terms.values()])
        gradients = [p.grad for p in self.parameters]

        class Played:
            def replay(_):
                for parameter, gradient in zip(self.parameters, gradients, strict=True):
                    parameter.grad = gradient if not first else None
                loss, terms = self.run(static)
                scalars.copy_(torch.stack([loss, *terms.values()]))
                for parameter, gradient in zip(self.parameters, gradients, strict=True):
                    if first:
                        gradient.copy_(parameter.grad)
                        parameter.grad = gradient

        if not first:  # as a real capture, this one has not added anything
            for gradient, before in zip(gradients, self.before, strict=True):
                gradient.copy_(before)
        self.captured[key] = module.Captured(Played(), static, list(terms), scalars, gradients, [])
        return True

    def remembering(self, batch, first, call=StepGraph.__call__):
        self.before = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        return call(self, batch, first)

    monkeypatch.setattr(StepGraph, "_capture", capture)
    monkeypatch.setattr(StepGraph, "__call__", remembering)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("check", [False, True])
def test_steps_by_graph_are_eager_steps(played, accumulate, check):
    network, run = make_pass()
    twin, eager = make_pass()
    said = []
    graph = StepGraph(network, run, check=check, say=said.append)
    for step in range(8):
        for p in twin.parameters():
            p.grad = None
        for micro in range(accumulate):
            batch = make_batch(10 * step + micro)
            loss, terms = graph(batch, micro == 0)
            expected, others = eager(batch)
            torch.testing.assert_close(loss, expected)
            torch.testing.assert_close(terms["size"], others["size"])
        for p, q in zip(network.parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad)
            with torch.no_grad():
                p -= 0.01 * p.grad
                q -= 0.01 * q.grad
        for p, q in zip(network.buffers(), twin.buffers(), strict=True):
            torch.testing.assert_close(p, q)
    assert len(graph.captured) == accumulate
    assert len(said) == check * accumulate
    assert all("equals the eager one" in line for line in said)


def test_another_shape_is_another_graph(played):
    network, run = make_pass()
    graph = StepGraph(network, run, check=False, say=print)
    for step in range(10):
        graph(make_batch(step, rows=4 if step % 2 else 6), True)
    assert len(graph.captured) == 2


def test_a_graph_that_differs_is_given_up(played):
    network, run = make_pass()
    said = []
    graph = StepGraph(network, run, check=True, say=said.append)
    replay = graph._replay

    def wrong(captured, batch):
        loss, terms = replay(captured, batch)
        for p in network.parameters():
            p.grad = p.grad * 1.1
        return loss, terms

    graph._replay = wrong
    for step in range(6):
        graph(make_batch(step), True)
    assert graph.given_up
    (line,) = said
    assert "differs from the eager one by 1.0e-01; training goes on without it" in line


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_what_cannot_be_captured_is_said_and_goes_on():
    network, run = make_pass()
    said = []

    def asking(batch):
        loss, terms = run(batch)
        loss.item()
        return loss, terms

    graph = StepGraph(network, asking, check=False, say=said.append)
    for step in range(6):
        loss, _ = graph(make_batch(step), True)
        assert torch.isfinite(loss)
    assert graph.given_up
    assert len(said) == 1
    assert said[0].startswith("run.graph: the step cannot be captured (")


def test_buffers_take_the_batch_and_its_epoch():
    first, second = make_batch(1), make_batch(2)
    buffers = as_buffers(first)
    places = [buffers.views["main"].data_ptr(), buffers.id.data_ptr(), buffers.masks["main"][0].data_ptr()]
    into_buffers(buffers, second)
    assert [buffers.views["main"].data_ptr(), buffers.id.data_ptr(), buffers.masks["main"][0].data_ptr()] == places
    assert torch.equal(buffers.views["main"], second.views["main"])
    assert torch.equal(buffers.id, second.id)
    assert buffers.epoch.item() == 2
    assert shapes(first) == shapes(second) != shapes(make_batch(1, rows=5))


def test_difference():
    one = torch.ones(4)
    assert difference([one], [one]) == 0
    assert difference([None], [None]) == 0
    assert difference([one], [None]) == float("inf")
    assert difference([one * float("nan")], [one]) == float("inf")
    assert difference([one * 1.5], [one]) == pytest.approx(0.5)
    assert difference([one * 1.5, one * 1e-9], [one, one * 2e-9]) == pytest.approx(0.5)  # of all as one
