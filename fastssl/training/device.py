"""On what and in which arithmetic networks run: the words of a configuration become a torch device and dtype."""

from __future__ import annotations

import torch

from fastssl.batch import Batch
from fastssl.config import ConfigError
from fastssl.training import distributed


def choose_device(name: str, key: str = "run.device") -> torch.device:
    """The device that `name` (auto, cpu, cuda, cuda:N) means here; a plain `cuda` is this process's own GPU.

    Raises:
        ConfigError: not such a name, or a GPU that is not there; the message names `key`.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ConfigError(f"{key} is {name!r}; it must be auto, cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = distributed.local_rank() if device.index is None else device.index
    if index >= count:
        raise ConfigError(f"{key} is {name!r} (GPU {index}), but PyTorch sees {count} CUDA devices here; use {key}=cpu")
    return torch.device("cuda", index)


def choose_dtype(precision: str, device: torch.device, key: str = "run.precision") -> torch.dtype:
    """The dtype of autocast for `precision` (auto, bf16, fp16, fp32); float32 means no autocast.

    Raises:
        ConfigError: fp16 on the CPU; the message names `key`.
    """
    if precision == "auto":
        if device.type == "cpu":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
    if precision == "fp16" and device.type == "cpu":
        raise ConfigError(f"{key} is 'fp16', which needs a GPU; on the CPU use bf16 or fp32")
    return {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[precision]


class Transfer:
    """Copies batches to the device on a stream of their own, beside the step that is still computing there.

    Args:
        device: where to. On the CPU a batch stays as it is.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, batch: Batch) -> Batch:
        """The batch on the device; what is queued there next waits for the copy, the host does not."""
        if self.stream is None:
            return batch.to(self.device)
        with torch.cuda.stream(self.stream):
            moved = batch.to(self.device)
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self.stream)

        def keep(value: torch.Tensor) -> torch.Tensor:
            value.record_stream(compute)  # its memory is not given away before the step has read it
            return value

        return moved.map(keep)
