"""Checkpoints beside training: what is written is the moment of the save, and nothing that goes wrong is lost."""

import signal
import threading

import pytest
import torch

from fastssl.training import checkpoint, snapshot
from fastssl.training.checkpoint import Checkpoint, CheckpointError
from fastssl.training.snapshot import Saver

CPU = torch.device("cpu")


def record(step, network, **more):
    return Checkpoint("pretrain", {"a": [1]}, network, None, step=step, **more)


def values(step):
    """Tensors of all kinds, two of them the same."""
    tied = torch.full((3, 5), float(step))
    return {
        "tied.a": tied,
        "tied.b": tied,
        "turned": torch.arange(6.0).view(2, 3).t() + step,
        "half": torch.full((7,), step, dtype=torch.bfloat16),
        "channels_last": torch.arange(96.0).view(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "gaps": torch.arange(12.0).view(3, 4)[:, ::2] + 0 * step,
        "flag": torch.tensor([True, False]),
        "count": torch.tensor(step),
        "none": torch.empty(0, 4),
        "large": torch.full((1000,), float(step)),
        "after": torch.full((2,), float(step)),
    }


class Held:
    """`checkpoint.write` that waits to be let go."""

    def __init__(self):
        self.begun, self.go = threading.Event(), threading.Event()

    def __call__(self, path, saved, **more):
        self.begun.set()
        assert self.go.wait(20)
        checkpoint.write(path, saved, **more)


def test_what_is_written_is_the_moment_of_the_save(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "PIECE", 256)  # less than some of the tensors
    held, places = Held(), []
    saver = Saver(held, CPU)
    for step in (1, 2):
        held.begun.clear(), held.go.clear()
        network, more = values(step), {"unlogged": [{"loss": 1.0}]}
        saver.save(tmp_path / "last.pt", record(step, network, extra=more))
        assert held.begun.wait(20)
        for value in network.values():
            value.zero_()
        more["unlogged"].append({"loss": 2.0})
        held.go.set()
        saver.wait()
        read = checkpoint.read(tmp_path / "last.pt")
        assert (read.step, read.extra) == (step, {"unlogged": [{"loss": 1.0}]})
        assert read.network.keys() == values(step).keys()
        for key, value in values(step).items():
            assert read.network[key].dtype == value.dtype
            assert torch.equal(read.network[key], value), key
            assert read.network[key].stride() == torch.empty_like(value).stride(), key
        assert read.network["tied.a"].data_ptr() == read.network["tied.b"].data_ptr()
        assert read.network["after"].untyped_storage().nbytes() == 8  # no tensor drags the whole memory along
        places.append([piece.data_ptr() for piece in saver.memory.pieces])
        assert len(places[0]) > 2
    assert places[0] == places[1]  # the memory is used again


def test_one_at_a_time_and_a_failure_is_raised_once_at_the_next_call(tmp_path):
    held = Held()
    saver = Saver(held, CPU)
    saver.save(tmp_path / "a.pt", record(1, values(1)))
    later = threading.Timer(0.2, held.go.set)
    later.start()
    saver.save(tmp_path / "b.pt", record(2, values(2)))
    assert checkpoint.read(tmp_path / "a.pt").step == 1
    saver.wait()
    saver.save(tmp_path / "no/folder.pt", record(3, values(3)))
    saver.settle()
    for call in (saver.check, saver.wait, lambda: saver.save(tmp_path / "c.pt", record(4, values(4)))):
        saver._error = saver._error or CheckpointError("full")
        with pytest.raises(CheckpointError):
            call()
    assert not (tmp_path / "c.pt").exists()
    saver.check()


@pytest.mark.parametrize("error", [None, ValueError, KeyboardInterrupt])
def test_at_its_end_it_waits_and_a_second_ctrl_c_gives_up_what_is_half_written(tmp_path, error):
    path, half, go = tmp_path / "a.pt", threading.Event(), threading.Event()
    large = {"w": torch.ones(1 << 20)}  # goes past the file's buffer, from within PyTorch's writer

    def progress():
        half.set()
        assert go.wait(20)
        saver.progress()

    later = threading.Timer(0.2, go.set)
    try:
        with Saver(lambda *what: checkpoint.write(*what, progress=progress), CPU) as saver:
            saver.save(path, record(1, large))
            assert half.wait(20)
            later.start()
            if error is KeyboardInterrupt:  # as by hand: while it is being waited for
                threading.Timer(0.1, signal.pthread_kill, (threading.get_ident(), signal.SIGINT)).start()
                saver.wait()
            if error is not None:
                raise error
    except (ValueError, KeyboardInterrupt):
        pass
    assert saver.idle()
    assert list(tmp_path.iterdir()) == ([path] if error is not KeyboardInterrupt else [])


def test_a_failure_is_raised_at_the_end_where_nothing_else_is(tmp_path):
    with pytest.raises(CheckpointError, match="could not be written"), Saver(checkpoint.write, CPU) as saver:
        saver.save(tmp_path / "no/folder.pt", record(1, values(1)))
