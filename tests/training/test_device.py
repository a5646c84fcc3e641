import pytest
import torch

from fastssl.batch import Batch
from fastssl.config import ConfigError
from fastssl.training.device import Transfer, choose_device, choose_dtype


def test_cpu():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type in ("cpu", "cuda")


def test_cuda_is_this_process_own_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert choose_device("cuda") == choose_device("auto") == torch.device("cuda", 2)
    assert choose_device("cuda:1") == torch.device("cuda", 1)
    with pytest.raises(ConfigError, match=r"run.device is 'cuda:4' \(GPU 4\), but PyTorch sees 4 CUDA devices"):
        choose_device("cuda:4")


def test_no_gpu_here(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto") == torch.device("cpu")
    with pytest.raises(ConfigError, match=r"device is 'cuda' \(GPU 0\), but PyTorch sees 0 .* use device=cpu"):
        choose_device("cuda", "device")


@pytest.mark.parametrize("name", ["gpu", "tpu:0", "meta", ""])
def test_unknown_device(name):
    with pytest.raises(ConfigError, match="it must be auto, cpu, cuda or cuda:N"):
        choose_device(name)


def test_precision():
    cpu = torch.device("cpu")
    assert [choose_dtype(name, cpu) for name in ("auto", "fp32", "bf16")] == [
        torch.float32,
        torch.float32,
        torch.bfloat16,
    ]
    assert choose_dtype("fp16", torch.device("cuda", 0)) == torch.float16
    with pytest.raises(ConfigError, match="precision is 'fp16', which needs a GPU"):
        choose_dtype("fp16", cpu, "precision")


@pytest.mark.parametrize(("supported", "dtype"), [(True, torch.bfloat16), (False, torch.float16)])
def test_automatic_precision_of_a_gpu(monkeypatch, supported, dtype):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: supported)
    assert choose_dtype("auto", torch.device("cuda", 0)) == dtype


@pytest.mark.parametrize("name", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_transfer_copies_every_tensor(name):
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    batch = Batch(torch.arange(3), torch.zeros(3), views={"a": torch.arange(12, dtype=torch.uint8).view(3, 4)})
    moved = Transfer(torch.device(name))(batch)
    assert moved.views["a"].device.type == name
    assert torch.equal(moved.views["a"].cpu(), batch.views["a"])
    assert torch.equal(moved.id.cpu(), batch.id)
