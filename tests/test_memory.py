"""Memory of batches: reused once nothing refers to it, never before."""

import gc
import threading

import pytest
import torch

from fastssl.batch import Batch
from fastssl.memory import Memory, together


def address(tensor):
    return tensor.untyped_storage().data_ptr()


def test_memory_comes_back_when_the_last_tensor_on_it_is_gone():
    memory = Memory()
    first = memory.take((4, 3))
    assert first.shape == (4, 3)
    assert first.dtype == torch.uint8
    place, view = address(first), first[1:].view(-1)
    del first
    gc.collect()
    second = memory.take((4, 3))  # `view` still uses the memory of `first`
    assert address(second) != place
    view.fill_(7)
    del view
    again = memory.take((3,), torch.float32)  # as many bytes
    assert again.dtype == torch.float32
    assert address(again) == place


def test_sizes_are_kept_apart_and_arrays_count_as_users():
    memory = Memory()
    small = memory.take((2,))
    place, array = address(small), small.numpy()
    del small
    assert address(memory.take((2,))) != place
    assert memory.take((3,)).numel() == 3
    del array
    assert address(memory.take((2,))) == place


def test_many_threads_never_share_memory():
    memory, faults = Memory(), []

    def work(number):
        for _ in range(300):
            tensor = memory.take((64,)).fill_(number)
            if not (tensor == number).all():
                faults.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not faults


def test_unpinned_batches_pass_as_they_are():
    batch = Batch(torch.zeros(1), torch.zeros(1))
    assert Memory().pinned(batch) is batch


def test_small_tensors_lie_together_and_move_in_one_copy():
    box, flip = torch.rand(3, 2, 4), torch.tensor([[True, False]] * 3)
    views = {"a": torch.arange(12, dtype=torch.uint8).view(3, 4)}
    batch = Batch(torch.arange(3), torch.tensor([5, -1, 7]), 2, views=views, box={"a": box}, flip={"a": flip})
    packed = together(batch, lambda size: torch.full((size,), 99, dtype=torch.uint8), lambda v: v is not views["a"])
    assert packed.views["a"] is views["a"]
    places = [address(value) for value in (packed.id, packed.label, packed.box["a"], packed.flip["a"])]
    assert len(set(places)) == 1
    copies = []
    moved = packed.moved(lambda value: copies.append(value.nbytes) or value.clone())
    assert sorted(copies) == [12, 32 + 32 + 96 + 16]
    assert moved.epoch == 2
    for found, given in (
        (moved.id, batch.id),
        (moved.label, batch.label),
        (moved.box["a"], box),
        (moved.flip["a"], flip),
    ):
        assert torch.equal(found, given)
        assert found.dtype == given.dtype
    assert torch.equal(moved.views["a"], views["a"])
    assert address(moved.id) == address(moved.flip["a"]) != places[0]


def test_nothing_chosen_is_nothing_copied():
    batch = Batch(torch.zeros(1), torch.zeros(1))
    assert together(batch, lambda size: 1 / 0, lambda value: False).id is batch.id


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_memory():
    memory = Memory(pin=True)
    batch = memory.pinned(Batch(torch.zeros(1), torch.zeros(1), views={"a": memory.take((2, 2))}))
    assert batch.id.is_pinned()
    assert batch.views["a"].is_pinned()
