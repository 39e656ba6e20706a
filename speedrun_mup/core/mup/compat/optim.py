"""Optimizers with muP: plain torch optimizers, handed one parameter group per set of factors from the rule table.

MuAdam, MuAdamW, MuSGD and process_param_groups have the names and arguments of microsoft/mup's module. An Adam-like
optimizer (Lion, Adagrad) becomes a muP one by MuAdam(params, impl=...), an SGD-like one by MuSGD(params, impl=...).
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Muon, Optimizer

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup.compat.infshape import InfShape, spec_of
from speedrun_mup.core.mup.rules import PARAMETRIZATIONS, NoRuleError, Parametrization, Update
from speedrun_mup.core.mup.spec import ParamSpec, named_specs

Params = nn.Module | Iterable[Any]  # a model; or tensors, (name, tensor) pairs or group dicts, as torch takes them

_MUP = PARAMETRIZATIONS["mup"]


def process_param_groups(params: Iterable[Any], **kwargs: Any) -> list[dict[str, Any]]:
    """New group dicts with lr, weight_decay (default 0) and eps filled in from `kwargs` where a group has none.

    The caller's dicts are left as they are. Raises ConfigError if a group has no lr.
    """
    filled = {"weight_decay": 0.0} | {key: kwargs[key] for key in ("lr", "weight_decay", "eps") if key in kwargs}
    if isinstance(params, Tensor) or not isinstance(params, Iterable):
        raise ConfigError(
            f"an optimizer takes a model, or tensors, pairs and groups in a list, not a {type(params).__name__}"
        )
    entries = list(params)
    if not any(isinstance(entry, dict) for entry in entries):
        entries = [{"params": entries}]
    groups = []
    for entry in entries:
        if not isinstance(entry, dict) or "params" not in entry:
            raise ConfigError("a parameter group is a dict with the key params")
        members = entry["params"]
        group = filled | entry | {"params": [members] if isinstance(members, Tensor) else list(members)}
        if "lr" not in group:
            raise ConfigError("a parameter group has no lr; pass lr=")
        for key in ("lr", "weight_decay"):
            if not isinstance(group[key], float | int | Tensor):
                raise ConfigError(f"{key}={group[key]!r} of a parameter group is not a number")
        groups.append(group)
    return groups


@dataclass(frozen=True)
class _Split:
    """How groups of parameters become groups with factors from the table: at the start, and for what is added later.

    compensate: what to multiply the LR by to undo what the optimizer does to it; lr * weight_decay does not feel it.
    """

    update: Update
    options: dict[str, Any]
    table: Parametrization
    model: nn.Module | None
    scale_eps: bool = True
    compensate: Callable[[ParamSpec], float] = lambda spec: 1.0

    def __call__(self, params: Iterable[Any]) -> list[dict[str, Any]]:
        """Groups in which lr, weight_decay and eps carry the factors, in the order of the parameters."""
        known = {id(p): (name, spec) for name, p, spec in named_specs(self.model)} if self.model is not None else {}
        groups = []
        for group in process_param_groups(params, **self.options):
            split: dict[tuple[float, float, float], list[Any]] = {}
            for member in group["params"]:
                name, p = member if isinstance(member, tuple) else ("", member)
                if not isinstance(p, Tensor):
                    raise ConfigError(
                        f"an optimizer takes tensors, (name, tensor) pairs and groups, not {type(p).__name__}"
                    )
                found, spec = known.get(id(p)) or (getattr(p, "infshape", InfShape()).name, spec_of(p))
                split.setdefault(self._factors(spec, found or name), []).append(member)
            groups += [group | {"params": members} | _times(group, *key) for key, members in split.items()]
        return groups

    def _factors(self, spec: ParamSpec, name: str) -> tuple[float, float, float]:
        try:
            factors, undo = spec.factors(self.table, self.update), self.compensate(spec)
        except NoRuleError as fault:
            raise NoRuleError(f"{name or 'a parameter'} {spec.shape}: {fault}") from None
        return factors.lr * undo, factors.weight_decay / undo, factors.eps if self.scale_eps else 1.0


def _times(group: dict[str, Any], lr: float, weight_decay: float, eps: float) -> dict[str, Any]:
    """The group's values times the factors. An eps that is not one number (Adafactor's pair) is left as it is."""
    scaled = {"lr": group["lr"] * lr, "weight_decay": group["weight_decay"] * weight_decay}
    return scaled | ({"eps": group["eps"] * eps} if isinstance(group.get("eps"), float | int | Tensor) else {})


@functools.cache
def _scaling(kind: Any) -> Any:
    """`kind`, but for add_param_group, which scales what it is given."""

    def add_param_group(self: Any, param_group: dict[str, Any]) -> None:
        split = vars(self).get("mup_split")
        if split is None:
            raise ConfigError("a copied optimizer does not know how to scale another group; make a new one")
        for group in split([param_group]):
            kind.add_param_group(self, group)

    def reduce(self: Any) -> Any:
        state = kind.__getstate__(self) if hasattr(kind, "__getstate__") else vars(self)
        return _revived, (kind,), {key: value for key, value in state.items() if key != "mup_split"}

    body = {"add_param_group": add_param_group, "__reduce__": reduce, "__doc__": kind.__doc__}
    return type(kind.__name__, (kind,), body | {"__module__": kind.__module__, "__qualname__": kind.__qualname__})


def _revived(kind: Any) -> Any:
    made = _scaling(kind)
    return made.__new__(made)


def _scaled(params: Params, impl: Callable[..., Optimizer], kwargs: dict[str, Any], split: _Split) -> Optimizer:
    """`impl` over the groups that `split` makes of `params`, now and whenever it is given another group."""
    if isinstance(params, nn.Module):
        split, params = replace(split, model=params), params.named_parameters()
    if not callable(impl):
        raise ConfigError(f"impl={impl!r} is not an optimizer class")
    signature = inspect.signature(impl).parameters
    defaults = {k: signature[k].default for k in ("lr", "weight_decay", "eps") if k in signature}
    defaults = {k: v for k, v in defaults.items() if v is not inspect.Parameter.empty}
    split = replace(split, options=defaults | kwargs)
    made: Any = impl(split(params), **kwargs)
    if isinstance(made, Adafactor) or getattr(made, "defaults", {}).get("scale_parameter"):
        raise ConfigError(
            f"{type(made).__name__} multiplies its step by each parameter's size, and its eps is a pair: the table has "
            "factors for steps of fixed size; take AdamW, or another Adafactor with scale_parameter=False"
        )
    if isinstance(made, Optimizer):
        kind: Any = type(made)
        made.__class__ = _scaling(kind)
        vars(made)["mup_split"] = split
    return made


def _table(parametrization: Parametrization, decoupled_wd: bool) -> Parametrization:
    return replace(parametrization, weight_decay="coupled") if decoupled_wd else parametrization


def MuAdam(
    params: Params,
    impl: Callable[..., Optimizer] = Adam,
    decoupled_wd: bool = False,
    *,
    model: nn.Module | None = None,
    parametrization: Parametrization = _MUP,
    scale_eps: bool = True,
    **kwargs: Any,
) -> Optimizer:
    """Adam, or another `impl` whose update has entries of fixed size, with muP.

    params: tensors (with the infshape of set_base_shapes), (name, tensor) pairs, group dicts, or the model. model:
    where to look up parameters that lost their infshape. decoupled_wd: leave weight_decay alone, for an `impl` that
    does not multiply it by lr; else it follows the parametrization's regime. scale_eps: let eps follow the gradients,
    as the table says. kwargs: for `impl`, whose defaults hold. As in torch, weight_decay is an L2 penalty here; MuAdamW
    decays weights. Raises UndeclaredParameterError.
    """
    return _scaled(
        params, impl, kwargs, _Split(Update.ENTRYWISE, {}, _table(parametrization, decoupled_wd), model, scale_eps)
    )


def MuAdamW(params: Params, **kwargs: Any) -> Optimizer:
    """MuAdam over torch's AdamW, with its default weight_decay of 0.01."""
    return MuAdam(params, impl=AdamW, **kwargs)


def MuSGD(
    params: Params,
    impl: Callable[..., Optimizer] = SGD,
    decoupled_wd: bool = False,
    *,
    model: nn.Module | None = None,
    parametrization: Parametrization = _MUP,
    **kwargs: Any,
) -> Optimizer:
    """SGD, or another `impl` whose update is proportional to the gradient, with muP. Arguments as for MuAdam."""
    return _scaled(params, impl, kwargs, _Split(Update.GRADIENT, {}, _table(parametrization, decoupled_wd), model))


def _original(rows: int, columns: int) -> float:
    return math.sqrt(max(1.0, rows / columns))


def _match_rms_adamw(rows: int, columns: int) -> float:
    return 0.2 * math.sqrt(max(rows, columns))


def MuMuon(
    params: Params,
    impl: Callable[..., Optimizer] = Muon,
    *,
    model: nn.Module | None = None,
    parametrization: Parametrization = _MUP,
    shape_factor: Callable[[int, int], float] | None = None,
    **kwargs: Any,
) -> Optimizer:
    """Muon with muP, for HIDDEN matrices only; torch's takes two dimensions.

    The step is lr * shape_factor(base shape) * sqrt(m_out / m_in), whatever shape factor `impl` applies: torch's Muon
    at base width, and the spectral rule elsewhere, also with adjust_lr_fn="match_rms_adamw". shape_factor: what another
    `impl` multiplies the update of a (rows, columns) matrix by. Other arguments as for MuAdam.
    Raises NoRuleError for parameters that are not HIDDEN.
    """
    if shape_factor is None:
        if impl is not Muon:
            raise ConfigError(f"pass shape_factor=: what {impl} multiplies the update of a (rows, columns) matrix by")
        shape_factor = _match_rms_adamw if kwargs.get("adjust_lr_fn") == "match_rms_adamw" else _original
    compensate = partial(_compensation, shape_factor, impl is Muon)
    return _scaled(params, impl, kwargs, _Split(Update.SPECTRAL, {}, parametrization, model, compensate=compensate))


def _compensation(shape_factor: Callable[[int, int], float], of_torch: bool, spec: ParamSpec) -> float:
    """What undoes the shape factor of an optimizer, but for what it is at base."""
    if of_torch and len(spec.shape) != 2:
        raise NoRuleError("torch's muon must not own it, only matrices of two dimensions: use adam")
    return shape_factor(*spec.base_shape[-2:]) / shape_factor(*spec.shape[-2:])


for_torch_muon = partial(_compensation, _original, True)


def scaled_groups(
    model: nn.Module,
    params: Iterable[tuple[str, Tensor]],
    update: Update,
    table: Parametrization,
    options: dict[str, Any],
    compensate: Callable[[ParamSpec], float] = lambda spec: 1.0,
) -> list[dict[str, Any]]:
    """Groups of plain tensors with the table's factors in lr, weight_decay and eps, for an optimizer made elsewhere.

    Args:
        model: where the parameters' specs are.
        params: (name, tensor) pairs of it.
        update: the kind of the optimizer's update.
        table: the rules.
        options: lr, weight_decay and eps at base size.
        compensate: what undoes a factor that the optimizer applies by shape.
    """
    groups = _Split(update, options, table, model, compensate=compensate)(list(params))
    return [group | {"params": [p for _, p in group["params"]]} for group in groups]
