"""Optimizers: which parameters decay, AdamW, SGD and LARS, gradient clipping. Nothing here waits for the device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastssl.config import Optim
from fastssl.kernels.ema_update import adamw_ema, adamw_numbers, ema_update, sgd_ema, sgd_numbers
from fastssl.training.masters import Masters

Pairs = Sequence[tuple[nn.Module, nn.Module]]  # (teacher, student), modules with the same parameters in the same order


def param_groups(module: nn.Module) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: those that decay, and those that do not (biases, and all of one dimension).

    Class tokens, mask tokens and learned position tables decay, as in the authors' code of DINO and MAE, unless the
    module names them in `undecayed` (`Method`).
    """
    still = (".bias", *getattr(module, "undecayed", ()))
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim > 1 and not name.endswith(still)].append(parameter)
    return [{"params": params, "decay": decay} for decay, params in groups.items() if params]


def build_optimizer(module: nn.Module, optim: Optim, masters: Masters | None = None, averages: Pairs = ()) -> Optimizer:
    """The optimizer of the module's trainable parameters, which must be on their device already.

    The learning rate and weight decay are set by `set_hyperparameters` before each step.

    Args:
        module: what is trained.
        optim: its numbers.
        masters: float32 values of parameters that the module keeps in bfloat16. None: it keeps none so.
        averages: teachers that follow a student, `Optimizer.teacher_momentum` in each step.
    """
    kind = {"adamw": AdamW, "sgd": SGD, "lars": LARS}[optim.name]
    built = kind(param_groups(module), optim, masters or Masters(module, torch.float32), averages)
    set_hyperparameters(built, optim.lr, optim.weight_decay)
    return built


def set_hyperparameters(optimizer: torch.optim.Optimizer, lr: float, weight_decay: float) -> None:
    """Sets the learning rate of all groups, and the weight decay of those that decay."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = weight_decay if group["decay"] else 0.0


class Optimizer(torch.optim.Optimizer):
    """What the three optimizers share: one step on all tensors together, with the teacher's average in the same pass.

    Its parameters are the float32 values (`masters`), its gradients those of the network's own parameters.

    Args:
        groups: of the network's parameters, as `param_groups` makes them.
        optim: numbers.
        masters: see `Masters`.
        averages: (teacher, student) modules.

    Attributes:
        teacher_momentum: of the teachers in the next step, in [0, 1].
    """

    _step_supports_amp_scaling = True  # a step of float16 gradients that are not finite is left out on the device

    def __init__(self, groups: list[dict[str, Any]], optim: Optim, masters: Masters, averages: Pairs) -> None:
        trained = [parameter for group in groups for parameter in group["params"]]
        trained.sort(key=lambda parameter: parameter.dtype == torch.float32)  # one kind of gradient behind the other
        decays = {masters.of(p): float(group["decay"]) for group in groups for p in group["params"]}
        groups = [{**group, "params": [masters.of(p) for p in group["params"]]} for group in groups]
        super().__init__(groups, {"lr": optim.lr, "weight_decay": 0.0, "step": 0})
        self.masters, self.teacher_momentum = masters, 1.0
        self.trained = trained
        self.scale: Tensor | None = None
        self.rests = False  # whether some factor may be 0
        self.numbers: Tensor | None = None  # on the device, written by the loop; None: `step` writes its own

        # Lists as the ops take them: the trained parameters, then the teachers' of frozen ones.
        teacher_of: dict[Tensor, Tensor] = {}
        for teacher, student in averages:
            teacher_of.update(zip(student.parameters(), teacher.parameters(), strict=True))
        known = set(trained)
        students = [*trained, *(s for s in teacher_of if s not in known)]
        self.values = [masters.of(p) for p in students]
        self.copies = [masters.copy_of(p) if p in known else None for p in students]
        teachers = [teacher_of.get(p) for p in students]
        self.teachers = [t if t is None else masters.of(t) for t in teachers]
        self.teacher_copies = [t if t is None else masters.copy_of(t) for t in teachers]
        device = self.values[0].device
        factors = [[1.0, decays.get(value, 0.0)] for value in self.values]
        self.scales = torch.tensor(factors, dtype=torch.float32, device=device)
        self._none = torch.zeros((), device=device, dtype=self.values[0].dtype)
        self._places: dict[tuple[int, ...], Tensor] = {}
        self._kept: dict[str, list[Tensor | None]] = {}  # lists of the state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes a state that `state_dict` gave.

        Raises:
            ValueError: it is of other parameters, or another optimizer's.
        """
        if any("step" not in group for group in state_dict["param_groups"]):
            raise ValueError("its optimizer's state was written by an earlier version")
        super().load_state_dict(state_dict)
        self._kept.clear()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drops the network's gradients."""
        for parameter in self.trained:
            if set_to_none:
                parameter.grad = None
            elif parameter.grad is not None:
                parameter.grad.zero_()

    def host_numbers(self) -> list[float]:
        """Four numbers of the next step, as `numbers` holds them on the device."""
        raise NotImplementedError

    def clip(
        self, max_norm: float, each: bool = False, factors: Iterable[tuple[Sequence[Tensor], Tensor]] = ()
    ) -> Tensor:
        """What the next step multiplies gradients by, so that none is longer than `max_norm`; they stay as they are.

        Args:
            max_norm: largest L2 norm. 0: no bound.
            each: of every parameter's gradient by itself, rather than of all gradients as one vector.
            factors: (parameters of the network, scalar on the device) pairs: multiplied into their gradients first; 0
                is as if they had no gradient.

        Returns:
            Scalar on the device: the norm of all gradients as one vector, before clipping.
        """
        norms = self._norms()
        scale: Tensor | None = None
        self.rests = False
        for parameters, factor in factors:
            self.rests = True
            scale = torch.ones_like(norms) if scale is None else scale
            scale[self._place(parameters)] = factor.to(norms.dtype)
        if scale is not None:
            norms = norms * scale
        total = torch.linalg.vector_norm(norms)
        if max_norm > 0:
            bound = (max_norm / ((norms if each else total) + 1e-6)).clamp(max=1.0)
            scale = bound if scale is None else scale * bound
        self.scale = scale
        return total

    def _norms(self) -> Tensor:
        """Norm of every value's gradient, 0 where there is none; float32 (float64 for float64)."""
        wide = self._none.dtype
        norms: list[Tensor] = []
        for dtype in dict.fromkeys(p.dtype for p in self.trained):
            members = [p for p in self.trained if p.dtype == dtype]
            grads = [self.masters.gradient(p) for p in members]
            there = [g for g in grads if g is not None]
            found = iter(torch._foreach_norm(there, 2, dtype=wide) if there else ())
            norms += [self._none if g is None else next(found) for g in grads]
        norms += [self._none] * (len(self.values) - len(norms))
        return self.masters.joined(torch.stack(norms), self.values)

    def _place(self, parameters: Sequence[Tensor]) -> Tensor:
        """Where parameters of the network stand in `trained`."""
        key = tuple(map(id, parameters))
        if key not in self._places:
            places = [i for i, p in enumerate(self.trained) if id(p) in key]
            self._places[key] = torch.tensor(places, device=self._none.device)
        return self._places[key]

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """One step; `closure`, if given, recomputes and returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        numbers = self.numbers
        if numbers is None:
            numbers = torch.tensor(self.host_numbers(), dtype=torch.float64, device=self._none.device)
        scale, found = self.scale, getattr(self, "found_inf", None)
        if found is not None:  # of GradScaler
            scale = self._none + 1 if scale is None else scale
            scale = torch.where(found > 0, torch.zeros_like(scale), scale)
        grads = [self.masters.gradient(p) for p in self.trained] + [None] * (len(self.values) - len(self.trained))
        self._update(grads, numbers, scale)
        for group in self.param_groups:
            group["step"] += 1
        self.scale = None
        return loss

    def _update(self, grads: list[Tensor | None], numbers: Tensor, scale: Tensor | None) -> None:
        raise NotImplementedError

    def _moments(self, name: str) -> list[Tensor | None]:
        """The state of this name of every value, zeros at first; None of what is not trained."""
        if name not in self._kept:
            count = len(self.trained)
            for value in self.values[:count]:
                if name not in self.state[value]:
                    self.state[value][name] = torch.zeros_like(value, memory_format=torch.preserve_format)
            kept: list[Tensor | None] = [self.state[value][name] for value in self.values[:count]]
            self._kept[name] = kept + [None] * (len(self.values) - count)
        return self._kept[name]

    @property
    def _lists(self) -> dict[str, Any]:
        """Teachers and copies, where there are any."""
        lists = {"teacher": self.teachers, "copies": self.copies, "teacher_copies": self.teacher_copies}
        return {name: items if any(x is not None for x in items) else None for name, items in lists.items()}


class AdamW(Optimizer):
    """AdamW (Loshchilov and Hutter 2019, algorithm 2)."""

    def __init__(self, groups: list[dict[str, Any]], optim: Optim, masters: Masters, averages: Pairs) -> None:
        super().__init__(groups, optim, masters, averages)
        self.betas, self.eps = optim.betas, optim.eps
        self.counts: Tensor | None = None  # steps that each value has taken, where these differ

    def state_dict(self) -> dict[str, Any]:
        """PyTorch's, and `taken`: how many steps each parameter has taken, in their order, where these differ."""
        taken = None if self.counts is None else self.counts[self._order()].tolist()
        return super().state_dict() | {"taken": taken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.counts = None
        if state_dict.get("counts") is not None:  # of versions that kept them in the order of `values`
            self.counts = self._none.new_tensor(state_dict["counts"], dtype=torch.float64)
        elif state_dict.get("taken") is not None:
            self.counts = self._none.new_zeros(len(self.values), dtype=torch.float64)
            self.counts[self._order()] = self._none.new_tensor(state_dict["taken"], dtype=torch.float64)

    def _order(self) -> Tensor:
        """Where the parameters stand in `values`, which differs with the arithmetic."""
        places = {value: i for i, value in enumerate(self.values)}
        order = [places[value] for group in self.param_groups for value in group["params"]]
        return torch.tensor(order, device=self._none.device)

    def host_numbers(self) -> list[float]:
        lr, weight_decay, step = _numbers(self.param_groups)
        return adamw_numbers(step + 1, lr, weight_decay, self.betas, self.teacher_momentum)

    def _update(self, grads: list[Tensor | None], numbers: Tensor, scale: Tensor | None) -> None:
        moments = self._moments("exp_avg"), self._moments("exp_avg_sq")
        adamw_ema(
            self.values, grads, *moments, numbers, betas=self.betas, eps=self.eps, scales=self._corrected(grads, scale),
            grad_scale=scale, **self._lists,
        )  # fmt: skip

    def _corrected(self, grads: list[Tensor | None], scale: Tensor | None) -> Tensor:
        """`scales` for moments that have seen fewer steps than there were: a parameter that rests for a while begins
        its corrections when it begins to move, as in torch.optim.AdamW (exactly so but for eps)."""
        trained = len(self.trained)
        missing = [i for i in range(trained) if grads[i] is None]
        resting = scale is not None and (self.rests or hasattr(self, "found_inf"))
        steps = self.param_groups[0]["step"]  # before this one
        if self.counts is None:
            if not missing and not resting:
                return self.scales
            self.counts = torch.full((len(self.values),), float(steps), dtype=torch.float64, device=self._none.device)
        taken = torch.ones_like(self.counts) if scale is None else (scale != 0).to(torch.float64).expand_as(self.counts)
        if missing:
            taken = taken.clone().index_fill_(0, torch.tensor(missing, device=taken.device), 0.0)
        self.counts += taken
        beta1, beta2 = self.betas
        done = self.counts.clamp(min=1.0)
        first = (1 - beta1 ** (steps + 1)) / (1 - beta1**done)
        second = ((1 - beta2**done) / (1 - beta2 ** (steps + 1))).sqrt()
        return torch.stack([self.scales[:, 0] * first * second, self.scales[:, 1]], dim=1).to(self.scales.dtype)


class SGD(Optimizer):
    """Stochastic gradient descent with momentum."""

    def __init__(self, groups: list[dict[str, Any]], optim: Optim, masters: Masters, averages: Pairs) -> None:
        super().__init__(groups, optim, masters, averages)
        self.decay = optim.momentum

    def host_numbers(self) -> list[float]:
        lr, weight_decay, _ = _numbers(self.param_groups)
        return sgd_numbers(lr, weight_decay, self.decay, self.teacher_momentum)

    def _update(self, grads: list[Tensor | None], numbers: Tensor, scale: Tensor | None) -> None:
        sums = self._moments("momentum")
        sgd_ema(self.values, grads, sums, numbers, scales=self.scales, grad_scale=scale, **self._lists)


def _numbers(groups: list[dict[str, Any]]) -> tuple[float, float, int]:
    """(learning rate, weight decay of what decays, steps done)."""
    decays = [group["weight_decay"] for group in groups if group["decay"]]
    return groups[0]["lr"], decays[0] if decays else 0.0, groups[0]["step"]


def trust_ratio(size: Tensor, change: Tensor, trust: float) -> Tensor:
    """LARS's factor of an update: trust x |p| / |d|, and 1 where a norm is zero."""
    return torch.where((size > 0) & (change > 0), trust * size / change, 1.0)


class LARS(SGD):
    """Layer-wise adaptive SGD (You et al. 2017, arXiv 1708.03888), as self-supervised methods use it.

        d = grad + weight_decay x p;   d = d x trust x |p| / |d|  (where both norms are positive)
        m = momentum x m + d;          p = p - lr x m

    The trust ratio is for parameters that decay; biases and norms get d = grad. It takes several launches, and with
    float16 gradients it asks the device at every step whether they are finite.
    """

    _step_supports_amp_scaling = False
    trust = 0.001

    def _update(self, grads: list[Tensor | None], numbers: Tensor, scale: Tensor | None) -> None:
        lr, weight_decay, _ = _numbers(self.param_groups)
        sums = self._moments("momentum")
        factors: Any = [1.0] * len(grads) if scale is None else list(scale.expand(len(grads)).unbind())
        for decays in (True, False):
            decaying = {id(p) for group in self.param_groups if group["decay"] == decays for p in group["params"]}
            rows = [
                (p, g.to(p.dtype), m, factor)
                for p, g, m, factor in zip(self.values, grads, sums, factors, strict=True)
                if g is not None and m is not None and id(p) in decaying
            ]
            if not rows:
                continue
            params, updates, moments, factor = ([row[i] for row in rows] for i in range(4))
            updates = list(torch._foreach_mul(updates, factor))
            if decays:
                torch._foreach_add_(updates, params, alpha=weight_decay)
                sizes = (torch.stack(torch._foreach_norm(tensors)) for tensors in (params, updates))
                size, change = (self.masters.joined(each, params) for each in sizes)
                updates = list(torch._foreach_mul(updates, list(trust_ratio(size, change, self.trust).unbind())))
            moving = [f != 0 if isinstance(f, Tensor) else True for f in factor]
            old = [None if still is True else m.clone() for m, still in zip(moments, moving, strict=True)]
            torch._foreach_mul_(moments, self.decay)
            torch._foreach_add_(moments, updates)
            moved = [m if still is True else m * still for m, still in zip(moments, moving, strict=True)]
            torch._foreach_add_(params, moved, alpha=-lr)
            for moment, before, still in zip(moments, old, moving, strict=True):
                if before is not None and isinstance(still, Tensor):
                    moment.copy_(torch.where(still, moment, before))
        for value, copy in zip(self.values, self.copies, strict=True):
            if copy is not None:
                copy.copy_(value)
        average(self.teachers, self.values, self.teacher_copies, 1 - numbers[3])


@torch.no_grad()
def average(
    teachers: Sequence[Tensor | None], students: Sequence[Tensor], copies: Sequence[Tensor | None], momentum: Tensor
) -> None:
    """`ema_update` of the teachers that there are, with their copies where they have one."""
    rows = [row for row in zip(teachers, students, copies, strict=True) if row[0] is not None]
    for copied in (True, False):
        some: Any = [row for row in rows if (row[2] is not None) == copied]
        if some:
            lists = [[row[i] for row in some] for i in range(3)]
            ema_update(lists[0], lists[1], momentum, lists[2] if copied else None)


@torch.no_grad()
def clip_gradients(module: nn.Module, max_norm: float, each: bool = False) -> Tensor:
    """Scales gradients down to a largest norm.

    Args:
        module: its parameters' gradients are changed in place; parameters without a gradient are left out.
        max_norm: largest L2 norm. 0: nothing is changed.
        each: apply it to every parameter tensor by itself, rather than to all gradients as one vector.

    Returns:
        Scalar on the device: the norm of all gradients as one vector, before clipping.
    """
    grads = [p.grad for p in module.parameters() if p.grad is not None]
    if not grads:
        return torch.zeros((), device=next(module.parameters()).device)
    norms = torch.stack(torch._foreach_norm(grads))
    total = torch.linalg.vector_norm(norms)
    if max_norm > 0:
        if each:
            torch._foreach_mul_(grads, list((max_norm / (norms + 1e-6)).clamp(max=1.0).unbind()))
        else:
            torch._foreach_mul_(grads, (max_norm / (total + 1e-6)).clamp(max=1.0))
    return total
