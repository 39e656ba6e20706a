"""The coordinate check: does what the updates of a tensor do stay the same as the model gets wider?

    result = coord_check(build_model, widths=[64, 128, 256, 512], data=batches, loss=loss, optimizer=make_optimizer)
    print(result.summary())

A model is trained for a few steps at several widths, on the same batches. Judged are slopes of log2(value) against
log2(width). For every parameter W with input x:

    init        rms(W_0 x_0)
    update      rms((W_t - W_0) x_t): what all updates so far do to the present input
    gradient    rms of the gradient, which Adam's eps has to follow

and for what modules put out, and the scores of torch's attention:

    activation  its rms, which must not grow

`update` is the heart of it. Activations alone, what coordinate checks usually look at (Yang et al., Tensor Programs V,
arXiv 2203.03466), do not show a wrong learning rate of a matrix whose effect another tensor's update drowns. Beside the
model run controls, each with a rule wrong on purpose: a check that does not see them proves nothing, and says so.

Shapes: S seeds, W widths, T + 1 points in time t = 0 ... T; W_t is the parameter after t updates.
"""

from __future__ import annotations

import enum
import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from speedrun_mup.config import TrainConfig, make_config
from speedrun_mup.core.attention import Dense
from speedrun_mup.core.errors import UserError
from speedrun_mup.core.model import GPT
from speedrun_mup.core.mup import Parametrization, ParamSpec, Role, named_specs
from speedrun_mup.core.mup.scores import AttentionScores
from speedrun_mup.core.utils import World
from speedrun_mup.data.batches import train_batches
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.pictures import picture, plain
from speedrun_mup.training.build import build_optimizers, model_config

Array = NDArray[np.float64]
Loss = Callable[[nn.Module, Any], Tensor]
Record = Callable[[str, Tensor], None]


class CoordCheckError(UserError):
    """A check that cannot be run as asked."""

    exit_code = 2


class Verdict(enum.StrEnum):
    """What the check shows, from best to worst. Only PASS is success."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


def _worst(verdicts: Iterable[Verdict | None]) -> Verdict:
    """The worst verdict there is; None stands for what is not judged."""
    order = list(Verdict)
    return max((verdict for verdict in verdicts if verdict), key=order.index, default=Verdict.PASS)


@dataclass(frozen=True)
class Thresholds:
    """Every number that decides a verdict. Wrong rules are off by a multiple of 1/2, right ones measure below 0.15."""

    warn: float = 0.15  # octaves per doubling of width, between the measured and the predicted slope
    fail: float = 0.30
    first_step: int = 3  # from here on t is judged; before, layers that start at zero hide what lies behind them
    min_widths: int = 3
    min_span: float = 4.0  # widest width over narrowest

    def judge(self, deviation: float) -> Verdict:
        """The verdict on a slope that is off by `deviation`. What is not finite is a FAIL."""
        size = abs(deviation)
        return Verdict.PASS if size <= self.warn else Verdict.WARN if size <= self.fail else Verdict.FAIL


# The slopes of muP. A readout starts as a sum of d random terms over d, so it starts small; but one that is the embedding
# too, TIED, already knows the token just read: its start has no slope of its own, it only must not grow. Scalars have no
# rule that could be wrong, and few entries, which make their slopes noisy: they are shown, and have to move, but are not judged.
PREDICTED: dict[str, dict[Role, float]] = {
    "update": {Role.INPUT: 0.0, Role.HIDDEN: 0.0, Role.OUTPUT: 0.0},
    "init": {Role.INPUT: 0.0, Role.HIDDEN: 0.0, Role.OUTPUT: -0.5},
    "gradient": {Role.INPUT: -1.0, Role.HIDDEN: -1.0, Role.OUTPUT: -1.0},
}
TIED = " (readout)"  # follows the name of an embedding where that is the readout too
NORMS = ("norm", "update norm", "flatness")  # of HIDDEN matrices after the last update, not judged: see _norms


@dataclass(frozen=True)
class Arm:
    """One way to build and train a model of any width.

    build_model(width): a module whose parameters have roles, initialised from torch's seed (torch.initial_seed()).
    optimizer(model): one optimizer or several. lr_power: learning rates are multiplied by (width / narrowest)**lr_power.
    """

    name: str
    build_model: Callable[[int], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer | Sequence[Optimizer]]
    lr_power: float = 0.0


@dataclass(frozen=True)
class Control(Arm):
    """An arm with a rule wrong on purpose: the updates of `role` (None: all) must be seen to go as width**slope.

    Where an lr_power makes the difference, times whatever the checked arm's go as.
    """

    role: Role | None = None
    slope: float = 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One quantity of one tensor. values (W, T + 1): geometric mean over seeds; nan where it is zero or not taken.

    quantity: effect (init at t = 0, update from then on), gradient, activation, loss or one of NORMS. role: None for
    what is no parameter.
    """

    quantity: str
    name: str
    role: Role | None
    values: Array

    @property
    def kind(self) -> str:
        """What the same tensors of all layers share: the name with stars for numbers, without the place in a stack."""
        kind = _kind(self.name)
        return kind if self.quantity == "activation" else re.sub(r"\[\d+\]$", "", kind)

    def slope(self, widths: Sequence[int], times: slice) -> float | None:
        """Of log2(value) on log2(width), by least squares. Mean over those `times` when no width lacks it; None if never."""
        logs = np.log2(self.values[:, times])
        logs = logs[:, ~np.isnan(logs).any(axis=0)]
        if not logs.size:
            return None
        x = np.log2(widths) - np.log2(widths).mean()
        with np.errstate(invalid="ignore"):
            return float(x @ logs.mean(axis=1) / (x @ x))


@dataclass(frozen=True)
class Row:
    """The mean slope of the `tensors` of one kind. predicted and verdict: None for what is not judged."""

    quantity: str
    kind: str
    role: Role | None
    tensors: int
    slope: float
    predicted: float | None
    verdict: Verdict | None


@dataclass(frozen=True)
class ArmResult:
    """What one arm measured. problems: why its slopes prove nothing, in words."""

    name: str
    widths: tuple[int, ...]
    seeds: int
    series: tuple[Series, ...]
    rows: tuple[Row, ...]
    problems: tuple[str, ...]

    @property
    def verdict(self) -> Verdict:
        """INCONCLUSIVE if there are problems, else the worst of the rows."""
        return Verdict.INCONCLUSIVE if self.problems else _worst(row.verdict for row in self.rows)

    def update_slope(self, role: Role | None) -> float:
        """The mean update slope of all tensors of `role` (None: of all that are judged); nan if there are none."""
        rows = [row for row in self.rows if row.quantity == "update" and row.verdict and role in (None, row.role)]
        return sum(row.slope * row.tensors for row in rows) / sum(row.tensors for row in rows) if rows else math.nan


@dataclass(frozen=True)
class ControlResult:
    """What a control measured. slope: of the updates of `role`, `predicted` to be so far off. seen: it is, by a FAIL."""

    arm: ArmResult
    role: Role | None
    slope: float
    predicted: float
    seen: bool

    @property
    def whose(self) -> str:
        """Whose slope it is, in words."""
        return "all updates" if self.role is None else f"{self.role.value} updates"


@dataclass(frozen=True)
class CoordCheck:
    """The outcome of a check: its `verdict`, the `reasons` if it is INCONCLUSIVE, and all that was measured."""

    arm: ArmResult
    controls: tuple[ControlResult, ...]
    steps: int
    thresholds: Thresholds

    @property
    def reasons(self) -> tuple[str, ...]:
        """Why a PASS would prove nothing, in words; empty if it does."""
        blind = (
            f"control {c.arm.name} was not seen: its {c.whose} have slope {c.slope:+.2f}, not about {c.predicted:+.1f}"
            for c in self.controls
            if not c.seen
        )
        untested = () if self.controls else ("no control was run: nothing shows that a wrong rule would be seen",)
        return (*self.arm.problems, *untested, *blind)

    @property
    def verdict(self) -> Verdict:
        """That on the checked arm, but INCONCLUSIVE if there are reasons against it. A FAIL needs no control."""
        return self.arm.verdict if self.arm.verdict is Verdict.FAIL or not self.reasons else Verdict.INCONCLUSIVE

    def summary(self) -> str:
        """A table for the terminal."""
        return "\n".join(_summary_lines(self))

    def to_json(self) -> str:
        """All that was measured, as strict JSON; null where a value is zero, not finite or was not taken."""
        return json.dumps(_plain({"verdict": self.verdict, "reasons": self.reasons} | asdict(self)), allow_nan=False)

    def plot(self, path: str | Path) -> None:
        """Draw effects and activations against width, a panel per t and a curve per tensor, and the controls below."""
        _plot(self, Path(path))


def _summary_lines(check: CoordCheck) -> Iterator[str]:
    arm = check.arm
    by_kind: dict[tuple[str, Role | None], dict[str, Row]] = {}
    for row in arm.rows:
        by_kind.setdefault((row.kind, row.role), {})[row.quantity] = row
    pad = 2 + max(20, *(len(kind) for kind, _ in by_kind), *(len("control " + c.arm.name) for c in check.controls))

    def table(title: str, quantities: Sequence[str]) -> Iterator[str]:
        judged = quantities != NORMS
        yield ""
        yield f"{title:<{pad}}{'role':<8}{''.join(f'{q:<15}' for q in quantities)}{'verdict' if judged else ''}".rstrip()
        for (kind, role), rows in by_kind.items():
            if shown := [rows[q] for q in quantities if q in rows]:
                cells = "".join(f"{_cell(rows.get(q)):<15}" for q in quantities)
                verdict = _worst(row.verdict for row in shown) if any(row.verdict for row in shown) else ""
                yield f"{kind:<{pad}}{role.value if role else '':<8}{cells}{verdict}".rstrip()

    yield f"coordinate check of {arm.name}: widths {', '.join(map(str, arm.widths))}; {check.steps} updates; seeds: {arm.seeds}"
    yield from table("slope (predicted)", tuple(PREDICTED))
    yield from table("must not grow", ("activation",))
    yield from table("not judged", NORMS)
    yield ""
    for c in check.controls:
        outcome = "fails, as it must" if c.seen else "NOT SEEN"
        yield f"{'control ' + c.arm.name:<{pad}}{c.slope:+.2f} ({c.predicted:+.1f}) on {c.whose}: {outcome}"
    yield from (f"because {reason}" for reason in check.reasons)
    yield from _advice(arm.rows)
    yield f"verdict: {check.verdict}"


def _advice(rows: Iterable[Row]) -> Iterator[str]:
    """How to mend what is off, in words, where there is a usual reason."""
    off = [row for row in rows if row.verdict in (Verdict.WARN, Verdict.FAIL)]
    if names := ", ".join(row.kind for row in off if row.quantity == "init"):
        yield f"init of {names}: initialise with mup.init, after set_base_shapes; or a forward multiplier is wrong"
    if names := ", ".join(row.kind for row in off if re.search(r"(^|\.)scores(\[\d+\])?$", row.kind)):
        yield f"{names}: if heads widen with the model, scale scores by 1 / head_dim (docs/mup-library.md)"


def _cell(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{row.slope:+.2f}" if row.predicted is None else f"{row.slope:+.2f} ({row.predicted:+.1f})"


def _plain(value: Any) -> Any:
    """The same in what strict JSON has: arrays and tuples as lists, what is not finite as None."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [_plain(entry) for entry in value]
    if isinstance(value, enum.Enum):
        return value.value
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---------------------------------------------------------------------------------------------------------------------
# Measuring
# ---------------------------------------------------------------------------------------------------------------------

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
    parameter -> the parameter and a tensor of its shape. see(name, product of the stand-in, product, is a lookup).
    """

    def __init__(self, standins: Mapping[str, tuple[Tensor, Tensor]], see: Callable[[str, Tensor, Tensor, bool], None]):
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
                    self.see(name, product(*operands), out, func is _aten.embedding.default)
                    break
        return out


@dataclass(frozen=True)
class _Setting:
    """What all arms share; the arguments of coord_check. batches: (S, T + 1)."""

    loss: Loss
    batches: Sequence[Sequence[Any]]
    taps: Callable[[nn.Module, Record], None]
    output_scale: Callable[[nn.Module], Mapping[str, float]]
    thresholds: Thresholds

    @property
    def steps(self) -> int:
        """T: the number of updates."""
        return len(self.batches[0]) - 1


@dataclass
class _Findings:
    """What was found in one model. values: by quantity and name, a number per t. still, unseen: kinds of parameters."""

    values: dict[tuple[str, str], dict[int, float]] = field(default_factory=dict)
    roles: dict[str, Role | None] = field(default_factory=dict)
    still: set[str] = field(default_factory=set)  # did not move
    unseen: set[str] = field(default_factory=set)  # matrices that were not seen to multiply anything


class _Observer:
    """Watches one model in forward passes of its own and after backward passes."""

    def __init__(self, model: nn.Module, setting: _Setting):
        self.found = _Findings()  # the model itself is not kept: it refers to its observer
        self.parameters = {name: (p, spec) for name, p, spec in named_specs(model) if p.requires_grad}
        self.scales = setting.output_scale(model)
        self.start = {name: p.detach().clone() for name, (p, _) in self.parameters.items()}
        self.moved: dict[str, Tensor] = {}  # W_t - W_0
        self.moved_before: dict[str, Tensor] = {}  # the same one step earlier
        self._multiplied: set[str] = set()
        self._looked_up: set[str] = set()
        self._looking = False
        self._seen: dict[tuple[str, str], list[float]] = {}  # mean squares of the present look
        for name, module in model.named_modules():
            if name:
                module.register_forward_hook(partial(self._see_module, name))
        self.scores = AttentionScores(model, self.record)
        setting.taps(model, self.record)

    def put(self, t: int, quantity: str, name: str, value: float) -> None:
        """Note a value; as inf if it is not finite."""
        self.found.values.setdefault((quantity, name), {})[t] = value if math.isfinite(value) else math.inf

    def record(self, name: str, x: Tensor) -> None:
        """Note an activation, if this forward pass is a look."""
        if self._looking:
            self._seen.setdefault(("activation", name), []).append(_mean_square(x))

    def _see_module(self, name: str, module: nn.Module, inputs: Any, output: Any) -> None:
        """A forward hook: note the first tensor that comes out, unless _see_product has noted it."""
        while isinstance(output, tuple | list | Mapping):
            output = next(iter(output.values() if isinstance(output, Mapping) else output), None)
        if isinstance(output, Tensor) and output.is_floating_point() and ("activation", name) not in self._seen:
            self.record(name, output)

    def _see_product(self, name: str, effect: Tensor, output: Tensor, is_lookup: bool) -> None:
        """Called by _Products. Matrices stacked along the output are told apart: q, k and v of a (3, D, D)."""
        spec, scale = self.parameters[name][1], self.scales.get(name, 1.0)
        self._multiplied.add(name)
        role = spec.role
        if is_lookup:
            self._looked_up.add(name)
        elif name in self._looked_up:  # the embedding is the readout too
            name, role = name + TIED, Role.OUTPUT
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
        with torch.random.fork_rng(devices=[]), _Products(pairs, self._see_product), self.scores:
            forward()
        self._looking = False
        for name, standin in standins.items():
            if name not in self._multiplied:  # gains, biases, scalars: element by element
                self._seen["effect", name] = [_mean_square(standin)]
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
            self.found.roles[name] = spec.role
            if not self.moved[name].any():
                self.found.still.add(_kind(name))
            if spec.role in (Role.HIDDEN, Role.OUTPUT) and name not in self._multiplied:
                self.found.unseen.add(_kind(name))
            if spec.role is Role.HIDDEN and self.moved_before:
                moved = self.moved[name]
                for norm, value in _norms(spec, p.detach(), moved, moved - self.moved_before[name]).items():
                    self.put(t, norm, name, value)


def _mean_square(x: Tensor) -> float:
    return x.detach().float().square().mean().item()


def _norms(spec: ParamSpec, weight: Tensor, moved: Tensor, last: Tensor) -> dict[str, float]:
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


def _spectral_norm(matrices: Tensor, iterations: int = 15) -> Tensor:
    """Largest singular values (N,) of (N, out, in) by power iteration from a fixed start: within a few per cent."""
    v = torch.randn(matrices.size(-1), 1, generator=torch.Generator().manual_seed(0)).expand(len(matrices), -1, 1)
    for _ in range(iterations):
        v = matrices.mT @ (matrices @ v)
        v = v / v.norm(dim=1, keepdim=True).clamp(min=1e-30)
    return (matrices @ v).norm(dim=(1, 2))


def _kind(name: str) -> str:
    """`name` with stars for the numbers in it, but for a leading one: the layers of a bare nn.Sequential are not alike."""
    return re.sub(r"(?<=\.)\d+(?![^.])", "*", name)


def _observe(arm: Arm, width: int, narrowest: int, seed: int, setting: _Setting) -> _Findings:
    """Build the model of `arm` and train it for T steps on the batches of `seed`, under observation."""
    torch.manual_seed(seed)
    model = arm.build_model(width).train()
    built = arm.optimizer(model)
    optimizers = [built] if isinstance(built, Optimizer) else list(built)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["lr"] * (width / narrowest) ** arm.lr_power
    observer = _Observer(model, setting)
    for t, batch in enumerate(setting.batches[seed]):
        observer.look(t, partial(setting.loss, model, batch))
        if t == setting.steps:
            break
        loss = setting.loss(model, batch)
        loss.backward()
        observer.look_back(t, loss)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad(set_to_none=True)
    observer.finish(setting.steps)
    return observer.found


def _measure(arm: Arm, widths: Sequence[int], seeds: int, setting: _Setting, progress: tqdm) -> ArmResult:
    """Observe `arm` at all widths and with all seeds, and judge it."""
    found = []
    for seed, width in itertools.product(range(seeds), widths):
        progress.set_postfix_str(f"{arm.name}, width {width}")
        found.append(_observe(arm, width, min(widths), seed, setting))
        progress.update()
    series = []
    for quantity, name in dict.fromkeys(key for findings in found for key in findings.values):
        taken = [findings.values.get((quantity, name), {}) for findings in found]
        values = np.array([[at.get(t, math.nan) for t in range(setting.steps + 1)] for at in taken])
        logs = np.log2(np.where(values == 0, math.nan, values)).reshape(seeds, len(widths), -1)
        series.append(Series(quantity, name, found[0].roles.get(name), np.exp2(logs.mean(axis=0))))
    rows = tuple(_judge(series, widths, setting.thresholds))
    problems = tuple(_problems(found, rows, setting))
    return ArmResult(arm.name, tuple(widths), seeds, tuple(series), rows, problems)


def _problems(found: Sequence[_Findings], rows: Iterable[Row], setting: _Setting) -> Iterator[str]:
    """Why the slopes of an arm prove nothing, in words."""
    if setting.steps <= setting.thresholds.first_step:
        yield f"{setting.steps} updates are too few; take {setting.thresholds.first_step + 1} or more"
    still = set().union(*(findings.still for findings in found))
    unseen = set().union(*(findings.unseen for findings in found))
    if still:
        yield f"{', '.join(sorted(still))} did not move in {setting.steps} updates"
    if unseen:
        yield f"{', '.join(sorted(unseen))} cannot be followed: not seen to multiply anything"


def _judge(series: Iterable[Series], widths: Sequence[int], thresholds: Thresholds) -> Iterator[Row]:
    """The rows of an arm: the mean over tensors of one kind of every slope that is judged or shown."""
    late = slice(thresholds.first_step, None)
    kinds: dict[tuple[str, str, Role | None], list[Series]] = {}
    for one in series:
        kinds.setdefault((one.quantity, one.kind, one.role), []).append(one)
    for (quantity, kind, role), alike in kinds.items():
        parts = {"effect": {"init": slice(0, 1), "update": late}, "gradient": {"gradient": late}}.get(quantity)
        for row, times in (parts or {quantity: slice(-1, None) if quantity in NORMS else late}).items():
            slopes = [slope for one in alike if (slope := one.slope(widths, times)) is not None]
            if not slopes:
                continue
            slope, predicted, verdict = sum(slopes) / len(slopes), None, None
            starts_tied = row == "init" and kind.endswith(TIED)
            if role and not starts_tied and (predicted := PREDICTED.get(row, {}).get(role)) is not None:
                verdict = thresholds.judge(slope - predicted)
            elif row == "activation" or starts_tied:
                verdict = thresholds.judge(max(slope, 0.0))
            yield Row(row, kind, role, len(slopes), slope, predicted, verdict)


# ---------------------------------------------------------------------------------------------------------------------
# Checking
# ---------------------------------------------------------------------------------------------------------------------


def coord_check(
    build_model: Callable[[int], nn.Module],
    widths: Sequence[int],
    data: Iterable[Any],
    loss: Loss,
    optimizer: Callable[[nn.Module], Optimizer | Sequence[Optimizer]],
    *,
    controls: Sequence[Control] | None = None,
    steps: int = 6,
    seeds: int = 4,
    taps: Callable[[nn.Module, Record], None] = lambda model, record: None,
    output_scale: Callable[[nn.Module], Mapping[str, float]] = lambda model: {},
    thresholds: Thresholds = Thresholds(),
    name: str = "model",
    progress: bool = True,
) -> CoordCheck:
    """Check the scaling of any model in muP, in float32 on the CPU.

    build_model(width): a module whose parameters have roles (mup.declare or mup.set_base_shapes), initialised from
    torch's seed. data: batches; steps + 1 of them are used per seed, the same at every width, from the start again when
    they run out. loss(model, batch): a scalar. optimizer(model): one or several; only their lr is ever changed.
    controls: arms that must fail; by default the same model with all learning rates times sqrt(width / narrowest).
    steps: updates, at least 4; more if layers that start at zero hide many others. taps(model, record): called once, to
    arrange for record(name, tensor) in forward passes, for activations that no module puts out (scores of torch's
    attention are seen without). output_scale(model): what the model multiplies the product of a parameter by, by the
    parameter's name, where it is not done by a module of its own on the way in, as MuReadout does. Raises
    CoordCheckError, and UndeclaredParameterError.
    """
    widths = sorted(set(widths))
    fits = thresholds.min_widths <= len(widths) and widths[-1] >= thresholds.min_span * widths[0]
    if not fits or steps < 1 or seeds < 1:
        raise CoordCheckError(
            f"widths={widths}, steps={steps}, seeds={seeds}: give at least {thresholds.min_widths} widths, the widest "
            f"{thresholds.min_span:g} times the narrowest, and at least one step and seed"
        )
    batches = list(itertools.islice(itertools.cycle(data), seeds * (steps + 1)))
    if not batches:
        raise CoordCheckError("data has no batch; give an iterable of what loss(model, batch) takes")
    per_seed = [batches[seed * (steps + 1) : (seed + 1) * (steps + 1)] for seed in range(seeds)]
    setting = _Setting(loss, per_seed, taps, output_scale, thresholds)
    if controls is None:
        controls = [Control("lr-sqrt-m", build_model, optimizer, lr_power=0.5)]
    fewer = widths[:-1]  # enough for controls, if it is enough at all
    if len(fewer) < thresholds.min_widths or fewer[-1] < thresholds.min_span * fewer[0]:
        fewer = widths
    runs = len(widths) * seeds + len(fewer) * len(controls)
    with torch.random.fork_rng(devices=[]), tqdm(total=runs, disable=not progress, leave=False) as bar:
        checked = _measure(Arm(name, build_model, optimizer), widths, seeds, setting, bar)
        results = []
        for control in controls:
            arm = _measure(control, fewer, 1, setting, bar)
            slope = arm.update_slope(control.role) - (checked.update_slope(control.role) if control.lr_power else 0.0)
            seen = slope * math.copysign(1.0, control.slope) > thresholds.fail
            results.append(ControlResult(arm, control.role, slope, control.slope, seen))
    return CoordCheck(checked, tuple(results), steps, thresholds)


ADAM_MATRIX_LR = 0.004  # at base width; what a control gives Adam where the settings' matrix_lr is meant for Muon
# Rule table, who updates the hidden matrices (None: as in the settings), whose updates must be seen to go how.
_GPT_CONTROLS = (
    ("muon-over-m", "muon", Role.HIDDEN, -1.0),
    ("muon-sqrt-m", "muon", Role.HIDDEN, 0.5),
    ("adam-constant", "adam", Role.HIDDEN, 1.0),
    ("head-sqrt", None, Role.OUTPUT, 0.5),
)


def gpt_coord_check(
    cfg: TrainConfig | None = None,
    widths: Sequence[int] = (64, 128, 256, 512),
    *,
    table: Parametrization | None = None,
    steps: int = 6,
    seeds: int = 1,
    tokens: int = 512,
    controls: bool = True,
    progress: bool = True,
) -> CoordCheck:
    """Check the GPT as `cfg` (default: the laptop preset) trains it, at all `widths` instead of its own.

    table: a rule table of your own instead of cfg.parametrization. tokens: of a step, from cfg.data (auto: the embedded
    corpus); no fewer than the widest width, or Muon's updates cannot have full rank. Learning rates follow the square
    root of the tokens, so that the few, small steps of a check stay where the loss is not yet saturated. controls:
    whether to run them; without, nothing guards against blindness. Raises CoordCheckError, ConfigError.
    """
    cfg = cfg or make_config("laptop", {"parametrization": "mup"})
    if tokens < max(widths):
        raise CoordCheckError(f"tokens={tokens} is less than the widest width, {max(widths)}; take as many or more")
    corpus, _ = find_corpus("embedded" if cfg.data == "auto" else cfg.data, cfg.tokenizer)
    window = min(cfg.window_tokens, tokens) // cfg.block_size
    lr_scale = cfg.lr_scale * math.sqrt(tokens / cfg.batch_tokens)
    cfg = replace(cfg, base_width=cfg.tuned_width, lr_scale=lr_scale, kernel_warmup=0)

    def recipe(cfg: TrainConfig, table: Parametrization | None = None) -> dict[str, Any]:
        shapes = {width: model_config(replace(cfg, width=width), corpus, "dense", torch.float32) for width in widths}
        if table is not None:
            shapes = {width: replace(shape, parametrization=table) for width, shape in shapes.items()}
        return {
            "build_model": lambda width: GPT(shapes[width], cfg.seed + torch.initial_seed()),
            "optimizer": lambda model: build_optimizers(model, cfg, World()),
        }

    arms = []
    for name, hidden_optimizer, role, slope in _GPT_CONTROLS if controls else ():
        changes: dict[str, Any] = {"parametrization": name}
        if hidden_optimizer and hidden_optimizer != cfg.hidden_optimizer:
            if cfg.hidden_optimizer == "adam":
                continue  # Muon's rules are not in use
            changes |= {"hidden_optimizer": hidden_optimizer, "matrix_lr": ADAM_MATRIX_LR}
        arms.append(Control(name, **recipe(replace(cfg, **changes)), role=role, slope=slope))
    batches = train_batches(corpus, tokens, 1, cfg.seed, order=cfg.data_order)
    return coord_check(
        widths=widths,
        data=map(batches.micro_batch, itertools.count()),
        loss=lambda model, batch: model(*batch, window),
        **recipe(cfg, table),
        controls=arms,
        steps=steps,
        seeds=seeds,
        taps=_tap_scores,
        output_scale=_logit_scale,
        name=f"GPT, {table.name if table else cfg.parametrization}, {cfg.hidden_optimizer}",
        progress=progress,
    )


class _TappedAttention(Dense):
    """The reference attention, which tells `record` its scores."""

    def __init__(self, name: str, record: Record):
        self.name, self.record = name, record

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
        """q, k, v (T, H, C) -> (T, H, C)."""
        if not torch.is_grad_enabled():  # looks are taken without
            self.record(self.name, torch.einsum("qhc,khc->hqk", q, k)[:, mask] * scale)
        return super().attend(q, k, v, mask, scale)


def _logit_scale(model: Any) -> dict[str, float]:
    """What a GPT multiplies the product of its head by."""
    return {"lm_head.weight": model.logit_scale}


def _tap_scores(model: Any, record: Record) -> None:
    """Have every attention layer of a GPT record what goes into its softmax."""
    for layer, block in enumerate(model.blocks):
        if block.attn is not None:
            block.attn.backend = _TappedAttention(f"blocks.{layer}.attn.scores", record)


# ---------------------------------------------------------------------------------------------------------------------
# Picture
# ---------------------------------------------------------------------------------------------------------------------

_STYLE: Any = {
    "font.size": 8,
    "axes.titlesize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "legend.frameon": False,
    "savefig.dpi": 200,
}
_COLORS: dict[Role | None, tuple[str, str]] = {  # of Okabe and Ito
    Role.INPUT: ("#0072b2", "input"),
    Role.HIDDEN: ("#d55e00", "hidden"),
    Role.OUTPUT: ("#009e73", "output"),
    Role.SCALAR: ("#cc79a7", "scalar"),
    None: ("#8a8a8a", "modules"),
}
_EFFECT = "rms of $(W_t - W_0)\\, x_t$"


def _plot(check: CoordCheck, path: Path) -> None:
    """Rows: effects, activations, and the last effects of the checked arm beside its controls. Columns: t."""
    times = range(check.steps + 1)
    columns, rows = max(len(times), 1 + len(check.controls)), 2 + bool(check.controls)
    with picture(path, (1.25 * columns + 0.4, 1.6 * rows + 0.7), _STYLE) as figure:
        from matplotlib.lines import Line2D

        axes = figure.subplots(rows, columns, sharey="row", squeeze=False)
        for row, (quantity, label) in enumerate((("effect", _EFFECT), ("activation", "rms of activations"))):
            for t, panel in zip(times, axes[row]):
                _draw(panel, check.arm, quantity, t, f"$t = {t}$")
            axes[row, 0].set_ylabel(label)
            _fit(axes[row, 0], [axes[row, t] for t in times if t == 0 or t >= check.thresholds.first_step])
        axes[0, 0].set_title("$t = 0$: of $W_0\\, x_0$")
        if check.controls:
            _draw(axes[2, 0], check.arm, "effect", check.steps, "checked\n")
            axes[2, 0].set_ylabel(f"{_EFFECT}\nat $t = {check.steps}$, with controls")
            for c, panel in zip(check.controls, axes[2, 1:]):
                slope = f"{c.slope:+.2f}".replace("-", "\N{MINUS SIGN}")
                _draw(
                    panel,
                    c.arm,
                    "effect",
                    check.steps,
                    f"{plain(c.arm.name)}\n{c.role.value if c.role else 'all'} {slope}",
                )
                panel.set_facecolor("#f4f4f4")
        for panel in axes.flat:
            if panel.get_title():
                panel.set_xlabel("width" if panel in axes[-1] else "")
            else:
                panel.remove()
        figure.suptitle(f"Coordinate check of {plain(check.arm.name)}: {check.verdict}", fontsize=10)
        style: dict[str, Any] = {"marker": "o", "markersize": 3, "linewidth": 1.2}
        drawn = {series.role for series in check.arm.series if series.quantity in ("effect", "activation")}
        handles = [
            Line2D([], [], color=c, label=label, **style) for role, (c, label) in _COLORS.items() if role in drawn
        ]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))


def _draw(panel: Any, arm: ArmResult, quantity: str, t: int, title: str) -> None:
    """A curve per tensor against width, at one t."""
    for series in arm.series:
        if series.quantity == quantity and not np.isnan(series.values[:, t]).all():
            color, order = _COLORS[series.role][0], 2 if series.role else 1
            style: dict[str, Any] = {"linewidth": 0.9, "markersize": 2, "alpha": 0.7, "zorder": order}
            panel.plot(arm.widths, series.values[:, t], "o-", color=color, **style)
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xticks(arm.widths, [str(width) for width in arm.widths])
    panel.minorticks_off()
    panel.set_title(title)


def _fit(panel: Any, judged: Sequence[Any]) -> None:
    """Set the common limits of a row by its judged panels: what is noise before may fall outside."""
    shown = np.concatenate([line.get_ydata() for one in judged for line in one.lines])
    shown = shown[np.isfinite(shown)]
    panel.set_ylim(shown.min() / 2, shown.max() * 2)
