"""Optimizers with muP: plain torch optimizers, handed one parameter group per set of factors from the rule table.

MuAdam, MuAdamW, MuSGD and process_param_groups have the names and arguments of microsoft/mup's module. An Adam-like
optimizer (Lion, Adagrad) becomes a muP one by MuAdam(params, impl=...), an SGD-like one by MuSGD(params, impl=...).
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Muon, Optimizer

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup.infshape import spec_of
from speedrun_mup.core.mup.rules import PARAMETRIZATIONS, Parametrization
from speedrun_mup.core.mup.spec import ParamSpec, named_specs

Params = nn.Module | Iterable[Any]  # a model; or tensors, (name, tensor) pairs or group dicts, as torch takes them

_MUP = PARAMETRIZATIONS["mup"]


def process_param_groups(params: Iterable[Any], **kwargs: Any) -> list[dict[str, Any]]:
    """New group dicts with lr, weight_decay (default 0) and eps filled in from `kwargs` where a group has none.

    The caller's dicts are left as they are. Raises ConfigError if a group has no lr.
    """
    filled = {"weight_decay": 0.0} | {key: kwargs[key] for key in ("lr", "weight_decay", "eps") if key in kwargs}
    entries = list(params)
    if not entries or not isinstance(entries[0], dict):
        entries = [{"params": entries}]
    groups = []
    for entry in entries:
        members = entry["params"]
        group = filled | entry | {"params": [members] if isinstance(members, Tensor) else list(members)}
        if "lr" not in group:
            raise ConfigError("a parameter group has no lr; pass lr=")
        groups.append(group)
    return groups


def _scaled(
    params: Params,
    optimizer: str,
    impl: Callable[..., Optimizer],
    kwargs: dict[str, Any],
    table: Parametrization,
    model: nn.Module | None,
    scale_eps: bool = True,
    compensate: Callable[[ParamSpec], float] = lambda spec: 1.0,
) -> Optimizer:
    """`impl` over groups in which lr, weight_decay and eps carry the table's factors, in the order of the parameters.

    compensate: what to multiply the LR by to undo what `impl` does to it; lr * weight_decay does not feel it.
    """
    if isinstance(params, nn.Module):
        model, params = params, params.named_parameters()
    specs = {id(p): spec for _, p, spec in named_specs(model)} if model is not None else {}
    signature = inspect.signature(impl).parameters
    defaults = {k: signature[k].default for k in ("lr", "weight_decay", "eps") if k in signature}
    defaults = {k: v for k, v in defaults.items() if v is not inspect.Parameter.empty}
    groups = []
    for group in process_param_groups(params, **defaults | kwargs):
        split: dict[tuple[float, float, float], list[Any]] = {}
        for member in group["params"]:
            p = member[1] if isinstance(member, tuple) else member
            spec = specs.get(id(p)) or spec_of(p)
            factors, undo = spec.factors(table, optimizer), compensate(spec)
            key = (factors.lr * undo, factors.weight_decay / undo, factors.eps if scale_eps else 1.0)
            split.setdefault(key, []).append(member)
        for (lr, weight_decay, eps), members in split.items():
            scaled = {"params": members, "lr": group["lr"] * lr, "weight_decay": group["weight_decay"] * weight_decay}
            if "eps" in group:
                scaled["eps"] = group["eps"] * eps
            groups.append(group | scaled)
    return impl(groups, **kwargs)


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
    return _scaled(params, "adam", impl, kwargs, _table(parametrization, decoupled_wd), model, scale_eps)


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
    return _scaled(params, "sgd", impl, kwargs, _table(parametrization, decoupled_wd), model)


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
    Raises ValueError for parameters that are not HIDDEN.
    """
    if shape_factor is None:
        if impl is not Muon:
            raise ConfigError(f"pass shape_factor=: what {impl} multiplies the update of a (rows, columns) matrix by")
        shape_factor = _match_rms_adamw if kwargs.get("adjust_lr_fn") == "match_rms_adamw" else _original

    def compensate(spec: ParamSpec) -> float:
        return shape_factor(*spec.base_shape[-2:]) / shape_factor(*spec.shape[-2:])

    return _scaled(params, "muon", impl, kwargs, parametrization, model, compensate=compensate)
