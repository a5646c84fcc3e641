"""Working copies: in bfloat16 training the weights of linear and convolution layers are bfloat16 in the network itself.

Autocast would cast each of them in every pass, and each gradient back: a third of a step's launches. Here the optimizer
writes the bfloat16 copy beside the float32 value, in the same pass, and reads bfloat16 gradients. What the layers
compute is the same: they get the float32 value rounded once, as autocast rounds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn


class Masters:
    """The float32 values of a network's bfloat16 weights.

    Norms, tokens, position tables and everything else that autocast computes in float32 stay as they are.

    Args:
        network: its linear and 2-d convolution layers become `dtype`, in place.
        dtype: bfloat16. float32: nothing is changed, and there are no masters.
    """

    def __init__(self, network: nn.Module, dtype: torch.dtype) -> None:
        self.network = network
        self.values: dict[Tensor, Tensor] = {}  # parameter of the network -> its float32 value
        if dtype == torch.float32:
            return
        for module in network.modules():
            if type(module) in (nn.Linear, nn.Conv2d):
                for parameter in module.parameters(recurse=False):
                    if parameter.dtype == torch.float32 and parameter not in self.values:
                        self.values[parameter] = nn.Parameter(parameter.data, parameter.requires_grad)
                        parameter.data = parameter.data.to(dtype)

    def __len__(self) -> int:
        return len(self.values)

    def of(self, parameter: Tensor) -> Tensor:
        """The float32 value of a parameter: its master, or itself where it has none."""
        return self.values.get(parameter, parameter)

    def copy_of(self, parameter: Tensor) -> Tensor | None:
        """The parameter itself where it is a working copy, else None."""
        return parameter if parameter in self.values else None

    def gradient(self, parameter: Tensor) -> Tensor | None:
        """The gradient of a parameter of the network, as its value is updated by it."""
        return parameter.grad

    def joined(self, norms: Tensor, values: Sequence[Tensor]) -> Tensor:
        """What norms of values, as this process has them, are for the whole tensors."""
        return norms

    def state_dict(self) -> dict[str, Tensor]:
        """The network's state dict with float32 values."""
        state = self.network.state_dict()
        for name, parameter in self.network.named_parameters(remove_duplicate=False):
            if parameter in self.values:
                state[name] = self.values[parameter].detach()
        return state

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Sets the network and the masters.

        Raises:
            RuntimeError: the state does not fit.
        """
        self.network.load_state_dict(state)
        for name, parameter in self.network.named_parameters(remove_duplicate=False):
            if parameter in self.values:
                self.values[parameter].copy_(state[name])
