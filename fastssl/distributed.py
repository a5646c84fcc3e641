"""The processes of a run, as torchrun starts them. Every function is a no-op on a single process."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor


def start(device: torch.device) -> None:
    """Joins the process group described by torchrun's environment (nccl on CUDA, gloo on the CPU), if there is one."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        if device.type == "cuda":
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")


def stop() -> None:
    """Leaves the process group."""
    if dist.is_initialized():
        dist.destroy_process_group()


def rank() -> int:
    """This process's number, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes take part."""
    return dist.get_world_size() if dist.is_initialized() else 1


def local_rank() -> int:
    """This process's number on its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_world() -> int:
    """How many processes of the run are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this process writes logs and checkpoints."""
    return rank() == 0


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum of `value` over all processes, in place; no gradient flows through it."""
    if world() > 1:
        dist.all_reduce(value)
    return value


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of `value` over all processes, in place; no gradient flows through it."""
    return all_reduce_sum(value).div_(world())


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on at least one process. Waits for the device when there are several processes."""
    if world() == 1:
        return flag
    value = torch.tensor(float(flag), device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return bool(value.item())


def barrier() -> None:
    """Waits until every process has come here."""
    if world() > 1:
        dist.barrier()
