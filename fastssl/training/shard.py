"""One network over the memory of several cards (`run.shard: fsdp`), on PyTorch's FSDP2.

Every process keeps some rows of each matrix, in float32, with their moments and the same rows of the teacher's. A part
of the network (a block, a head) is put together just before it computes, in the type that it computes in, and taken
apart after; its gradients are added up in float32.

Biases, norms, gains, tokens, position tables and matrices outside such parts stay whole everywhere: about one hundredth
of a large ViT. Blocks use one another's (`fastssl.models.blocks`), which so goes on as without shards. Their gradients
are added up in one exchange after the backward pass.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from fastssl.config import ConfigError
from fastssl.training import checkpoint, distributed, shard_files
from fastssl.training.checkpoint import Checkpoint
from fastssl.training.masters import Masters


class Shards(Masters):
    """A network whose matrices lie in rows on all processes; `of` gives this one's. To be made by all of them.

    Args:
        network: with equal weights on every process, on the CPU or on `device`; it is moved there part by part, so
            the whole need not fit.
        device: where it computes.
        dtype: of autocast; the matrices of linear layers are put together in it.

    Raises:
        ConfigError: most of the network is in no part that can be spread, or the processes begin with other weights.
    """

    def __init__(self, network: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
        super().__init__(network, torch.float32)
        processes = distributed.world()
        parts: dict[nn.Module, list[nn.Parameter]] = {}  # inner before outer
        spread: set[Tensor] = set()
        for part in reversed([m for m in network.modules() if hasattr(m, "also") or type(m) is nn.Sequential]):
            mine = [p for p in part.parameters() if p not in spread and _has_rows_for(p, processes)]
            if mine:
                parts[part] = mine
                spread.update(mine)
        if sum(p.numel() for p in spread) < 0.5 * sum(p.numel() for p in network.parameters()):
            raise ConfigError(
                f"run.shard fsdp spreads the blocks of a ViT over the processes; most of this network cannot be spread "
                f"over {processes}: set run.shard none"
            )
        sizes = [p.detach().abs().mean().item() for p in network.parameters()]
        known = json.loads(distributed.from_main(lambda: json.dumps(sizes)))
        if distributed.any_process(not all(map(_close, sizes, known)), device):
            raise ConfigError("the processes begin with different weights; is model.init the same file on all of them?")
        self.whole = [p for p in network.parameters() if p not in spread]
        for parameter in self.whole:
            parameter.data = parameter.data.to(device)
        for module in network.modules():
            for name, buffer in module.named_buffers(recurse=False):
                module._buffers[name] = buffer.to(device)
        for tensor in (*self.whole, *network.buffers()):  # equal to the last digit, whatever CPU has drawn them
            dist.broadcast(tensor.data, src=0)
        self.mesh = init_device_mesh(device.type, (processes,))
        linear = {m.weight for m in network.modules() if type(m) is nn.Linear}
        for part, mine in parts.items():
            working = dtype if dtype != torch.float32 and linear.issuperset(mine) else None
            policy = MixedPrecisionPolicy(working, torch.float32 if working else None, cast_forward_inputs=False)
            fully_shard(part, mesh=self.mesh, mp_policy=policy, ignored_params=set(self.whole))
            for name in getattr(part, "also", ()):
                register_fsdp_forward_method(part, name)
        policy = MixedPrecisionPolicy(cast_forward_inputs=False)
        fully_shard(network, mesh=self.mesh, mp_policy=policy, ignored_params=set(self.whole))
        self.spread = {name: p for name, p in network.named_parameters() if isinstance(p, DTensor)}
        with torch.no_grad():
            self.values = {p: p.to_local() for p in self.spread.values()}
        self._owner = {value: cast(DTensor, p) for p, value in self.values.items()}
        self._spread_among: dict[tuple[int, ...], Tensor] = {}  # of lists of values, by their ids

    def line(self) -> str:
        """How the network lies, for people."""
        shared, whole = sum(p.numel() for p in self.values), sum(p.numel() for p in self.whole)
        return (
            f"sharded: of {(shared + whole) / 1e6:.1f} million weights {shared / (shared + whole):.1%} lie in rows on "
            f"{distributed.world()} processes, the rest on each"
        )

    def copy_of(self, parameter: Tensor) -> None:
        """None: what layers compute with is put together anew each time."""
        return None

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """This process's rows."""
        gradient = parameter.grad
        return gradient.to_local() if isinstance(gradient, DTensor) else gradient

    def joined(self, norms: Tensor, values: Sequence[Tensor]) -> Tensor:
        """Norms of the whole tensors."""
        key = tuple(map(id, values))
        if key not in self._spread_among:
            ours = torch.tensor([value in self._owner for value in values], device=norms.device)
            self._spread_among[key] = ours
        ours = self._spread_among[key]
        squares = distributed.all_reduce_sum(torch.where(ours, norms.square(), 0.0))
        return torch.where(ours, squares.sqrt(), norms)

    def last_pass(self, last: bool) -> None:
        """Whether the next backward pass is the step's last: gradients are exchanged there alone."""
        cast(FSDPModule, self.network).set_requires_gradient_sync(last)

    @torch.no_grad()
    def exchange(self) -> None:
        """Makes the gradients of the tensors that are whole everywhere the mean over the processes."""
        gradients = [p.grad for p in self.whole if p.grad is not None]
        if gradients:
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            means = distributed.all_reduce_mean(flat).split([gradient.numel() for gradient in gradients])
            torch._foreach_copy_(gradients, [m.view_as(g) for m, g in zip(means, gradients, strict=True)])

    def state_dict(self) -> dict[str, Tensor]:
        """The network's, with DTensors."""
        return self.network.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Sets the network from a state with DTensors where it has them."""
        self.network.load_state_dict(state)

    # -- checkpoints ---------------------------------------------------------------------------------------------------

    def write(self, path: Path, saved: Checkpoint, optimizer: torch.optim.Optimizer) -> None:
        """Writes a checkpoint whose large tensors lie in a folder beside it; to be called by all processes.

        Args:
            saved: its network's state is `state_dict`, its optimizer's that of `optimizer`.

        Raises:
            CheckpointError: some process could not write; the previous checkpoint is untouched.
        """
        large: dict[str, Tensor] = {f"network/{n}": v for n, v in saved.network.items() if isinstance(v, DTensor)}
        network = {name: _hollow(value) for name, value in saved.network.items()}
        state: dict[int, dict[str, Any]] = {}
        for i, value in enumerate(_values(optimizer)):
            state[i] = dict(saved.optimizer["state"].get(i, {}))
            if value in self._owner:
                for name, rows in state[i].items():
                    large[f"optimizer/state/{i}/{name}"] = item = self._as_owner(value, rows)
                    state[i][name] = _hollow(item)
        name = distributed.from_main(lambda: shard_files.new_folder(path, saved.step))
        try:
            shards = shard_files.save(large, path.with_name(name))
        except shard_files.ShardError as error:
            raise checkpoint.CheckpointError(f"{path}: {error}") from None
        if distributed.is_main():
            hollow = replace(saved, network=network, optimizer={**saved.optimizer, "state": state})
            checkpoint.write(path, hollow, shards)

    def localise(self, saved: Checkpoint, optimizer: torch.optim.Optimizer, shards: Mapping[str, Any]) -> None:
        """Replaces what a checkpoint's network and optimizer hold by this process's part of it; all call it together.

        Args:
            saved: as `checkpoint.read_hollow` gives it.
            optimizer: which will take it.
            shards: where its tensors without data lie; empty: there are none.

        Raises:
            CheckpointError: these cannot be read.
            RuntimeError: a tensor has another size than the network's.
        """
        absent: dict[str, Tensor] = {}

        def mine(key: str, value: Any, like: Tensor | None) -> Any:
            if not isinstance(value, Tensor):
                return value
            if isinstance(like, DTensor):
                if value.shape != like.shape:
                    raise RuntimeError(f"{key} is {list(value.shape)}, not {list(like.shape)}")
                if not value.is_meta:
                    return distribute_tensor(value.to(self.mesh.device_type), self.mesh, [Shard(0)], src_data_rank=None)
                absent[key] = torch.empty_like(like, dtype=value.dtype, requires_grad=False)
            elif value.is_meta:
                absent[key] = torch.empty(value.shape, dtype=value.dtype)
            return absent.get(key, value)

        network = {name: mine(f"network/{name}", value, self.spread.get(name)) for name, value in saved.network.items()}
        state = {}
        for i, value in enumerate(_values(optimizer)):
            rows = saved.optimizer.get("state", {}).get(i, {})
            like = self._owner.get(value)
            state[i] = {name: mine(f"optimizer/state/{i}/{name}", item, like) for name, item in rows.items()}
        if absent:
            try:
                shard_files.fill(absent, Path(saved.path), shards, together=True)
            except shard_files.ShardError as error:
                raise checkpoint.CheckpointError(f"{saved.path} {error}") from None
        saved.network = network
        state = {i: {name: _local(item) for name, item in rows.items()} for i, rows in state.items() if rows}
        saved.optimizer = {**saved.optimizer, "state": state}

    def _as_owner(self, value: Tensor, rows: Tensor) -> DTensor:
        """This process's rows as part of a whole like that of its value."""
        owner = self._owner[value]
        return DTensor.from_local(
            rows, owner.device_mesh, owner.placements, run_check=False, shape=owner.shape, stride=owner.stride()
        )


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-3, abs_tol=1e-6)


def _has_rows_for(parameter: Tensor, processes: int) -> bool:
    """Whether it is a matrix of which every process gets some rows; the last one gets what the others leave."""
    return parameter.ndim == 2 and (processes - 1) * -(-len(parameter) // processes) < len(parameter)


def _values(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The parameters in the order of the state dict's numbers."""
    return [value for group in optimizer.param_groups for value in group["params"]]


def _hollow(value: Any) -> Any:
    """A DTensor's size and type without its data; anything else as it is."""
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, DTensor) else value


def _local(value: Any) -> Any:
    return value.to_local() if isinstance(value, DTensor) else value
