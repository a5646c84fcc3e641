"""Ops that are cheap to call: one body, a custom op for torch.compile and a plain autograd function in eager mode.

The dispatcher of a custom op and its generated autograd function cost the host several times what a body costs. They
are needed only where a call is traced, so that is the only place where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

is_compiling, is_grad_enabled = torch.compiler.is_compiling, torch.is_grad_enabled


class CheapOp:
    """An op of tensors (no lists of them) and options, made by `op`; call it with positional arguments.

    Compiled calls, and calls with anything but plain tensors (fake, meta, functional, subclasses), go to the custom op.
    Others run the body: directly where no gradient is wanted, else within an autograd function.

    An op without `register_autograd` (a backward pass) whose inputs want a gradient goes to the custom op too, which
    says that there is none when it is asked for.
    """

    def __init__(self, name: str, body: Callable[..., Any]) -> None:
        self.body = body
        self.custom = torch.library.custom_op(name, body, mutates_args=())
        namespace, short = name.split("::")
        self.overload = getattr(getattr(torch.ops, namespace), short).default
        self.apply: Callable[..., Any] = self.overload
        self.__name__, self.__doc__ = short, body.__doc__

    def __call__(self, *arguments: Any) -> Any:
        if is_compiling():
            return self.overload(*arguments)
        wanted = False
        for x in arguments:
            kind = type(x)
            if kind is Tensor or kind is Parameter:
                if x.is_meta:
                    return self.overload(*arguments)
                wanted = wanted or x.requires_grad
            elif isinstance(x, Tensor):
                return self.overload(*arguments)
        return self.apply(*arguments) if wanted and is_grad_enabled() else self.body(*arguments)

    def register_fake(self, fake: Callable[..., Any]) -> Callable[..., Any]:
        """Decorates the function that gives outputs without values, as `torch.library.custom_op` has it."""
        self.custom.register_fake(fake)
        return fake

    def register_autograd(
        self, differentiate: Callable[..., Any], *, setup_context: Callable[[Any, tuple[Any, ...], Any], None]
    ) -> None:
        """Gives the op a gradient.

        Args:
            differentiate: (ctx, *upstream) -> one gradient or None per input. Upstream gradients of outputs that were
                not used are None; where all are, it is not called. It must call other ops for its kernels, not launch
                them, so that it can be traced.
            setup_context: (ctx, inputs, output) stores what `differentiate` needs; `output` is a tensor or a tuple.
        """
        body = self.body

        def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            ctx.set_materialize_grads(False)  # no zeros for outputs that have no gradient
            setup_context(ctx, inputs, output)

        def backward(ctx: Any, *upstream: Tensor | None) -> Any:
            for gradient in upstream:
                if gradient is not None:
                    return differentiate(ctx, *upstream)
            return (None,) * len(ctx.needs_input_grad)

        def forward(ctx: Any, *inputs: Any) -> Any:
            output = body(*inputs)
            ctx.set_materialize_grads(False)
            setup_context(ctx, inputs, output)
            return output

        members = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.apply = type(self.__name__, (torch.autograd.Function,), members).apply  # type: ignore[attr-defined]
        self.custom.register_autograd(backward, setup_context=setup)


def op(name: str) -> Callable[[Callable[..., Any]], CheapOp]:
    """Decorates the body of an op that changes no input and returns neither an input nor a view of one.

        @op("fastssl::double")
        def forward(x: Tensor, factor: float) -> Tensor: ...

        @forward.register_fake
        def _(x, factor): ...

        @op("fastssl::double_backward")
        def backward(upstream: Tensor, factor: float) -> Tensor: ...

        forward.register_autograd(_differentiate, setup_context=_save)

    The body needs annotations (the schema is made from them), and runs without autograd.
    """
    return lambda body: CheapOp(name, body)
