"""One model, watched while it trains: what every parameter's updates do to its output, and what modules put out.

Shapes: S seeds, T + 1 points in time t = 0 ... T; W_t is the parameter after t updates.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from speedrun_mup.coord_check.results import NORMS, TIED, WIDTH, CheckedAxis, Place, SlopeThresholds
from speedrun_mup.core.mup import ParamSpec, Role, named_specs
from speedrun_mup.core.mup.compat.scores import AttentionScores
from speedrun_mup.core.mup.spec import starred

Loss = Callable[[nn.Module, Any], Tensor]
Record = Callable[..., None]  # (name, tensor), and the quantity if it is no activation

_aten = torch.ops.aten


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
    return _aten.convolution(x, weight, None, *rest)


# What is linear in a parameter: the same without bias, where that one's arguments begin, where the parameter can stand.
_PRODUCTS: dict[Any, tuple[Callable[..., Tensor], int, tuple[int, ...]]] = {
    _aten.mm.default: (_aten.mm, 0, (0, 1)),
    _aten.addmm.default: (_aten.mm, 1, (0, 1)),
    _aten.bmm.default: (_aten.bmm, 0, (0, 1)),
    _aten.baddbmm.default: (_aten.bmm, 1, (0, 1)),
    _aten.mv.default: (_aten.mv, 0, (0,)),
    _aten.embedding.default: (_aten.embedding, 0, (0,)),
    _aten.convolution.default: (_convolution, 0, (1,)),
}
_COPIES = (_aten.clone.default, _aten._to_copy.default)


class _Products(TorchDispatchMode):
    """Inside it, every product of a parameter is taken once more with the parameter's stand-in, on the same input.

    A parameter is known by its memory: views, copies, casts and functional use are seen too. standins: name of a
    parameter -> the parameter and a tensor of its shape. see(name, product of the stand-in, product, what the
    parameter is multiplied with: None if it is looked up).
    """

    def __init__(
        self, standins: Mapping[str, tuple[Tensor, Tensor]], see: Callable[[str, Tensor, Tensor, Tensor | None], None]
    ):
        super().__init__()
        self.see = see
        self.known = {p.untyped_storage().data_ptr(): (name, p, standin) for name, (p, standin) in standins.items()}

    def standin(self, x: Any) -> tuple[str, Tensor] | None:
        """If `x` is a view of a parameter: its name, and the same view of its stand-in."""
        found = self.known.get(x.untyped_storage().data_ptr()) if isinstance(x, Tensor) else None
        if found is None:
            return None
        name, p, standin = found
        return name, standin.as_strided(x.size(), x.stride(), x.storage_offset() - p.storage_offset())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func in _COPIES and (found := self.standin(args[0])):
            name, standin = found
            self.known[out.untyped_storage().data_ptr()] = name, out, func(standin, **(kwargs or {}))
        if func in _PRODUCTS:
            product, begin, places = _PRODUCTS[func]
            operands = list(args[begin:])
            for place in places:
                if found := self.standin(operands[place]):
                    name, operands[place] = found
                    x = None if func is _aten.embedding.default else operands[1 if place == 0 else 0]
                    self.see(name, product(*operands), out, x)
                    break
        return out


@dataclass(frozen=True)
class ArmRecipe:
    """One way to build and train a model of any width.

    build_model(width): a module whose parameters have roles, initialised from torch's seed (torch.initial_seed()).
    optimizer(model): one optimizer or several. lr_power: learning rates are multiplied by (width / narrowest)**lr_power.
    """

    name: str
    build_model: Callable[[int], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer | Sequence[Optimizer]]
    lr_power: float = 0.0


@dataclass(frozen=True)
class CheckSetup:
    """What all arms share; the arguments of coord_check. batches: (S, T + 1)."""

    loss: Loss
    batches: Sequence[Sequence[Any]]
    taps: Callable[[nn.Module, Record], None]
    output_scale: Callable[[nn.Module], Mapping[str, float]]
    thresholds: SlopeThresholds
    axis: CheckedAxis = WIDTH

    @property
    def steps(self) -> int:
        """T: the number of updates."""
        return len(self.batches[0]) - 1


@dataclass
class Findings:
    """What was found in one model. values: by quantity and name, a number per t. still, unseen: kinds of parameters."""

    values: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    roles: dict[str, Place | None] = field(default_factory=dict)
    still: set[str] = field(default_factory=set)  # did not move
    unseen: set[str] = field(default_factory=set)  # matrices that multiplied nothing observable
    sides: dict[str, int] = field(default_factory=dict)  # the smaller side of a matrix, by kind


class Observer:
    """Watches one model in forward passes of its own and after backward passes."""

    def __init__(self, model: nn.Module, setup: CheckSetup):
        self.found = Findings()  # the model itself is not kept: it refers to its observer
        self.parameters = {name: (p, spec) for name, p, spec in named_specs(model) if p.requires_grad}
        self.scales, self.axis = setup.output_scale(model), setup.axis
        self.start = {name: p.detach().clone() for name, (p, _) in self.parameters.items()}
        self.moved: dict[str, Tensor] = {}  # W_t - W_0
        self.moved_before: dict[str, Tensor] = {}  # the same one step earlier
        self._multiplied: set[str] = set()
        self._looked_up: set[str] = set()
        self._looking = False
        self._sizes = setup.thresholds.bounds
        self._seen: dict[tuple[str, str], list[float]] = {}  # mean squares of the present look
        for name, module in model.named_modules():
            if name:
                module.register_forward_hook(partial(self._see_module, name))
        self.scores = AttentionScores(model, self.record, setup.thresholds.bounds)
        setup.taps(model, self.record)

    def put(self, t: int, quantity: str, name: str, value: float) -> None:
        """Note a value; as inf if it is not finite."""
        self.found.values.setdefault((quantity, name), {})[t] = value if math.isfinite(value) else math.inf

    def record(self, name: str, x: Tensor, quantity: str = "activation") -> None:
        """Note an activation, or another quantity, if this forward pass is a look."""
        if self._looking:
            self._seen.setdefault((quantity, name), []).append(_mean_square(x))

    def _see_module(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """A forward hook: note the first tensor that comes out, unless _see_product has noted it."""
        while isinstance(output, tuple | list | Mapping):
            output = next(iter(output.values() if isinstance(output, Mapping) else output), None)
        if isinstance(output, Tensor) and output.is_floating_point() and ("activation", name) not in self._seen:
            self.record(name, output)

    def _see_product(self, name: str, effect: Tensor, output: Tensor, x: Tensor | None) -> None:
        """Called by _Products. Matrices stacked along the output are kept apart: q, k and v of a (3, D, D)."""
        spec, scale = self.parameters[name][1], self.scales.get(name, 1.0)
        self._multiplied.add(name)
        role = self.axis.place(spec)
        if x is None:
            self._looked_up.add(name)
        elif name in self._looked_up:  # the embedding is the readout too
            name, role = name + TIED, self.axis.place(spec, tied=True)
        elif self._sizes:
            self._seen.setdefault(("input", name), []).append(scale**2 * _mean_square(x))
        leading = itertools.takewhile(lambda dim: dim[0] not in ("in", "out"), zip(spec.layout, spec.shape))
        stack = math.prod(size for _, size in leading)
        parts = stack if output.size(-1) == stack * spec.fan_out else 1
        for i in range(parts):
            part = f"{name}[{i}]" if parts > 1 else name
            for quantity, key, x in ("effect", part, effect), ("activation", part.removesuffix(".weight"), output):
                self.found.roles[key] = role
                mean_square = scale**2 * _mean_square(x.chunk(parts, dim=-1)[i])
                self._seen.setdefault((quantity, key), []).append(mean_square)

    @torch.no_grad()
    def look(self, t: int, forward: Callable[[], Any]) -> None:
        """Take effects and activations in a forward pass of its own. Torch's random state is the same after it."""
        self.moved_before = self.moved
        self.moved = {name: p.detach() - self.start[name] for name, (p, _) in self.parameters.items()}
        standins = self.moved if t else self.start
        pairs = {name: (p, standins[name]) for name, (p, _) in self.parameters.items()}
        self._looking = True
        with torch.random.fork_rng(devices=[]), _unfused(), _Products(pairs, self._see_product), self.scores:
            forward()
        self._looking = False
        for name, standin in standins.items():
            if name not in self._multiplied:  # gains, biases, scalars: element by element
                self._seen["effect", name] = [_mean_square(standin)]
        for name in [name for quantity, name in self._seen if quantity == "input"]:
            squares, spec = self._seen.pop(("input", name)), self.parameters[name][1]
            if t and {"in", "out"} <= set(spec.layout):
                size = update_norm(spec, self.moved[name])
                self._seen["size", name] = [size**2 * square for square in squares]
        for (quantity, name), squares in self._seen.items():
            self.put(t, quantity, name, math.sqrt(sum(squares) / len(squares)))
        self._seen.clear()

    def look_back(self, t: int, loss: Tensor) -> None:
        """Take the loss and, after its backward pass, the gradients."""
        self.put(t, "loss", "loss", loss.item())
        for name, (p, _) in self.parameters.items():
            if p.grad is not None:
                self.put(t, "gradient", name, math.sqrt(_mean_square(p.grad)))

    def finish(self, t: int) -> None:
        """After the last look: take norms, and note what cannot be judged."""
        for name, (p, spec) in self.parameters.items():
            self.found.roles[name] = self.axis.place(spec)
            if not self.moved[name].any():
                self.found.still.add(starred(name))
            if spec.role in (Role.HIDDEN, Role.OUTPUT) and name not in self._multiplied:
                self.found.unseen.add(starred(name))
            if {"in", "out"} <= set(spec.layout):
                self.found.sides[starred(name)] = min(spec.fan_in, spec.fan_out)
            if spec.role is Role.HIDDEN and self.moved_before:
                moved = self.moved[name]
                for norm, value in norms(spec, p.detach(), moved, moved - self.moved_before[name]).items():
                    self.put(t, norm, name, value)


@contextlib.contextmanager
def _unfused() -> Iterator[None]:
    """Inside it a recurrent layer is matrix products, not one operation of oneDNN's."""
    enabled = torch._C._get_mkldnn_enabled()  # torch.backends.mkldnn.flags would warn of other flags
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(enabled)


def _mean_square(x: Tensor) -> float:
    return x.detach().float().square().mean().item()


def norms(spec: ParamSpec, weight: Tensor, moved: Tensor, last: Tensor) -> dict[str, float]:
    """sqrt(n_in / n_out) times the spectral norm of a matrix and of the sum of its updates; and how level the singular
    values of the last update are: Frobenius norm / (spectral norm * sqrt(rank)), 1 if orthogonal. Means over a stack.
    """
    order = [i for i, word in enumerate(spec.layout) if word not in ("in", "out")]
    order += [spec.layout.index("out"), spec.layout.index("in")]
    weight, moved, last = (
        x.float().permute(order).reshape(-1, spec.fan_out, spec.fan_in) for x in (weight, moved, last)
    )
    scale = math.sqrt(spec.fan_in / spec.fan_out)
    level = last.norm(dim=(1, 2)) / (_spectral_norm(last) * math.sqrt(min(spec.fan_out, spec.fan_in)))
    values = scale * _spectral_norm(weight), scale * _spectral_norm(moved), level
    return {name: value.mean().item() for name, value in zip(NORMS, values)}


def update_norm(spec: ParamSpec, moved: Tensor) -> float:
    """sqrt(n_in / n_out) times the spectral norm of a sum of updates; the mean over a stack."""
    order = [i for i, word in enumerate(spec.layout) if word not in ("in", "out")]
    order += [i for side in ("out", "in") for i, word in enumerate(spec.layout) if word == side]
    matrices = moved.float().permute(order).reshape(-1, spec.fan_out, spec.fan_in)
    return math.sqrt(spec.fan_in / spec.fan_out) * _spectral_norm(matrices).mean().item()


def _spectral_norm(matrices: Tensor, iterations: int = 15) -> Tensor:
    """Largest singular values (N,) of (N, out, in) by power iteration from a fixed start: within a few per cent."""
    v = torch.randn(matrices.size(-1), 1, generator=torch.Generator().manual_seed(0)).expand(len(matrices), -1, 1)
    for _ in range(iterations):
        v = matrices.mT @ (matrices @ v)
        v = v / v.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return (matrices @ v).norm(dim=(1, 2))


def observe(arm: ArmRecipe, width: int, narrowest: int, seed: int, setup: CheckSetup) -> Findings:
    """Build the model of `arm` and train it for T steps on the batches of `seed`, under observation."""
    torch.manual_seed(seed)
    model = arm.build_model(width).train()
    built = arm.optimizer(model)
    optimizers = [built] if isinstance(built, Optimizer) else list(built)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["lr"] * (width / narrowest) ** arm.lr_power
    observer = Observer(model, setup)
    for t, batch in enumerate(setup.batches[seed]):
        observer.look(t, partial(setup.loss, model, batch))
        if t == setup.steps:
            break
        loss = setup.loss(model, batch)
        loss.backward()
        observer.look_back(t, loss)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    observer.finish(setup.steps)
    return observer.found
