"""The processes of a run, as torchrun starts them. Every function is a no-op on a single process."""

from __future__ import annotations

import ctypes
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

PR_SET_PDEATHSIG = 1  # of linux/prctl.h
GATHER_BYTES = 64 << 20  # of each process per exchange in gather_rows
PATIENCE = 7200.0  # seconds of an exchange: `heartbeat` speaks first, and says more; one process may measure meanwhile
GONE = re.compile(  # what gloo and NCCL say then; other errors of theirs are this process's own
    r"connect|closed|reset by peer|broken pipe|(read|write|network) error|timed? ?out|remote ?(error|process)|aborted",
    re.I,
)


def start(device: torch.device) -> None:
    """Joins the process group described by torchrun's environment (nccl on CUDA, gloo on the CPU), if there is one."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # what asks for "the" GPU means this one (events, memory counters, DALI)
    if elastic() and sys.platform == "linux":
        # When torchrun dies, however it dies, this process is asked to end: it saves and goes.
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not dist.is_initialized():
        store, rank, world = next(dist.rendezvous("env://"))
        if elastic():
            store = dist.PrefixStore(_this_start(store, rank, world), store)
        place = {"store": store, "rank": rank, "world_size": world}
        if device.type == "cuda":
            dist.init_process_group("nccl", device_id=device, **place)
        else:
            dist.init_process_group("gloo", **place)


def _this_start(store: dist.Store, rank: int, world: int) -> str:
    """A name that all processes of this start share and none of an earlier one had.

    torchrun keeps one store over its restarts: what an earlier start has written there (addresses of processes that are
    gone) must not be read by this one, and torchrun's own count of restarts differs from node to node. So rank 0 lists
    what each process calls itself until all have found themselves in the list.
    """
    mine = secrets.token_hex(4)
    store.set(f"called/{rank}", mine)
    keys = [f"called/{other}" for other in range(world)]
    while True:
        if rank == 0:
            names = [store.get(key).decode() for key in keys]
            store.set("start", ",".join(names))
            if store.check([f"{mine}/{other}" for other in range(1, world)]):
                return mine
        else:
            names = store.get("start").decode().split(",")
            if names[rank : rank + 1] == [mine]:
                store.set(f"{names[0]}/{rank}", "")
                return names[0]
        time.sleep(0.1)


def patience(hang_s: float) -> timedelta:
    """How long an exchange waits for a process where a run may stand still for so many seconds."""
    return timedelta(seconds=max(PATIENCE, 3 * hang_s))


def be_patient(hang_s: float) -> None:
    """Exchanges wait so long for a process from now on, rather than PyTorch's minutes."""
    if world() > 1:
        groups = dist.distributed_c10d
        change = groups.set_timeout if hasattr(groups, "set_timeout") else groups._set_pg_timeout  # PyTorch < 2.14
        change(patience(hang_s))


def elastic() -> bool:
    """Whether torchrun started this process, which starts all anew when one fails."""
    return "TORCHELASTIC_RUN_ID" in os.environ


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


def all_reduce_max(value: Tensor) -> Tensor:
    """The largest of `value` over all processes, in place; no gradient flows through it."""
    if world() > 1:
        dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean of `value` over all processes, in place; no gradient flows through it."""
    return value if world() == 1 else all_reduce_sum(value).div_(world())


def gather(value: Tensor) -> Tensor:
    """The rows of all processes, in the order of their ranks; gradients flow through it.

    What comes back to a process's rows is the sum of what every process's loss sends to them. With DDP's average over
    processes that is the exact gradient of the mean of the processes' losses.

    Args:
        value: [n, ...], the same shape on every process.

    Returns:
        [world x n, ...].
    """
    return value if world() == 1 else _Gather.apply(value)


def total(value: Tensor) -> Tensor:
    """The sum of `value` over all processes; the gradient is the sum of all processes' gradients."""
    return value if world() == 1 else _Total.apply(value)


# torch.distributed.nn.functional has both, but torch 2.14 calls it deprecated and points to private functions.
class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        rows = [torch.empty_like(value) for _ in range(world())]
        dist.all_gather(rows, value.contiguous())
        return torch.cat(rows)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad.clone()).chunk(world())[rank()]


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return all_reduce_sum(value.clone())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return all_reduce_sum(grad.clone())


def gather_rows(rows: Tensor, count: int, device: torch.device) -> Tensor:
    """A table of which every process holds each world-th row, put together in the host memory of each.

    Args:
        rows: [n, ...] on the CPU: rows rank, rank + world, rank + 2 world, ... of the table.
        count: rows of the whole table.
        device: where the process group communicates.

    Returns:
        [count, ...], on the CPU.
    """
    if world() == 1:
        return rows
    each = -(-count // world())
    table = rows.new_empty(each, world(), *rows.shape[1:])
    piece = max(1, GATHER_BYTES // max(1, rows[0].nbytes if len(rows) else 1))
    piece = int(all_reduce_max(torch.tensor(-piece, device=device)).neg())  # the smallest: a process may have no rows
    for begin in range(0, each, piece):
        mine = rows[begin : begin + piece].to(device)
        short = min(piece, each - begin) - len(mine)
        mine = torch.cat([mine, mine.new_zeros(short, *mine.shape[1:])])
        table[begin : begin + piece] = gather(mine[None]).transpose(0, 1).cpu()
    return table.flatten(0, 1)[:count]


@torch.no_grad()
def merge_moments(count: int, mean: Tensor, m2: Tensor) -> tuple[int, Tensor, Tensor]:
    """Statistics of the values of all processes from those of each (Chan et al. 1983); no gradient.

    Args:
        count: values per channel on this process; the same on every process.
        mean: [C].
        m2: [C], sum of the squared deviations from `mean`.

    Returns:
        The same three over all processes.
    """
    if world() == 1:
        return count, mean, m2
    means, squares = gather(torch.stack([mean, m2])[None]).unbind(1)  # [world, C] each
    merged = means.mean(dim=0)
    return count * world(), merged, squares.sum(dim=0) + count * (means - merged).square().sum(dim=0)


def from_main(make: Callable[[], str]) -> str:
    """What the main process makes of a call, on all of them."""
    if world() == 1:
        return make()
    box = [make() if is_main() else ""]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def sum_in_float32(bucket: dist.GradBucket) -> Any:
    """For DistributedDataParallel: the mean of a bucket of gradients over the processes. bfloat16 gradients are added
    up in float32, so that the sum does not lose digits with every process."""
    gradients = bucket.buffer()
    wide = gradients.float() if gradients.dtype == torch.bfloat16 else gradients
    work = dist.all_reduce(wide.div_(world()), async_op=True)
    return work.get_future().then(lambda done: gradients.copy_(done.value()[0]))


def any_process(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on at least one process. Waits for the device when there are several processes."""
    if world() == 1:
        return flag
    return bool(all_reduce_max(torch.tensor(float(flag), device=device)).item())


def all_processes(flag: bool, device: torch.device) -> bool:
    """Whether `flag` is true on every process."""
    return not any_process(not flag, device)


def peer_is_gone(error: Exception) -> bool:
    """Whether an exchange failed with this because another process has ended or cannot be reached."""
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    from_gloo = type(error) is RuntimeError and "gloo/transport" in str(error)
    return (from_gloo or isinstance(error, dist.DistError)) and bool(GONE.search(str(error)))


def barrier() -> None:
    """Waits until every process has come here."""
    if world() > 1:
        dist.barrier()


class Agreement:
    """Whether any process has raised its flag, asked once per step; the answer is one step old, so nobody waits for it.

    The flags travel between the hosts (gloo), beside what the GPUs exchange.
    """

    def __init__(self, hang_s: float = 0.0) -> None:
        self._patience = patience(hang_s)
        self._group: dist.ProcessGroup | None = None
        self._flag = torch.zeros(1)
        self._work: dist.Work | None = None

    def __call__(self, flag: bool) -> bool:
        """Tells the other processes this one's flag. True, for all at the same call, when one was raised before."""
        if world() == 1:
            return flag
        if self.close():
            return True
        if self._group is None:
            self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=self._patience))  # of all
        self._flag.fill_(float(flag))
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return False

    def close(self) -> bool:
        """Waits for what is still travelling; whether a flag was raised in it."""
        if self._work is None:
            return False
        self._work.wait()
        self._work = None
        return bool(self._flag.item())
