"""Parameter groups and one optimizer object for a model in muP, from rates tuned at base size."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup.anymodel.adapt import adapt
from speedrun_mup.core.mup.anymodel.sizes import Base
from speedrun_mup.core.mup.compat.combined import Combined
from speedrun_mup.core.mup.compat.optim import MuAdam, MuMuon, MuSGD, for_torch_muon, scaled_groups
from speedrun_mup.core.mup.rules import PARAMETRIZATIONS, Parametrization, Role, Update
from speedrun_mup.core.mup.run_rules import NO_RUN_SCALING, RunScaling
from speedrun_mup.core.mup.spec import named_specs

_ADAMS: dict[str, Any] = {"adam": Adam, "adamw": AdamW}
OPTIMIZERS = ("adamw", "adam", "sgd", "muon+adamw")
_DECAYS = {"adamw": 0.01, "adam": 0.0, "sgd": 0.0, "muon": 0.1}  # torch's
Named = list[tuple[str, Tensor]]


def _of_run(run: RunScaling, kind: Update, options: dict[str, Any], decay: float) -> dict[str, Any]:
    """The options at the batch and the tokens of this run, from those at base; `decay` is torch's own weight decay."""
    if not run.parts:
        return options
    factors = run.factors(kind)
    scaled = {
        "lr": options["lr"] * factors.lr,
        "weight_decay": options.get("weight_decay", decay) * factors.weight_decay,
    }
    if kind is Update.ENTRYWISE:
        betas = options.get("betas", (0.9, 0.999))
        scaled["betas"] = tuple(factors.beta(which, beta) for which, beta in enumerate(betas))
        scaled["eps"] = options.get("eps", 1e-8) * factors.eps
    return options | scaled


def split_for_muon(model: nn.Module) -> tuple[Named, Named]:
    """(what Muon takes, what Adam takes) of the parameters that are trained: matrices from width to width, and the rest."""
    trained = [(name, p, spec) for name, p, spec in named_specs(model) if p.requires_grad]
    hidden = {name for name, p, spec in trained if spec.role is Role.HIDDEN and p.ndim == 2}
    return [(n, p) for n, p, _ in trained if n in hidden], [(n, p) for n, p, _ in trained if n not in hidden]


def _check(optimizer: str, lr: float, muon_lr: float | None) -> None:
    if optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer={optimizer!r} is unknown; choose {', '.join(OPTIMIZERS)}")
    if (muon_lr is None) == (optimizer == "muon+adamw"):
        raise ConfigError(
            f"optimizer={optimizer!r} takes the rate of the hidden matrices as muon_lr=, lr={lr:g} is that of the others"
            if muon_lr is None
            else f"optimizer={optimizer!r} has no muon_lr; say optimizer='muon+adamw'"
        )


def param_groups(
    model: nn.Module,
    base: Base = None,
    *,
    lr: float,
    optimizer: str = "adamw",
    muon_lr: float | None = None,
    weight_decay: float | None = None,
    eps: float = 1e-8,
    parametrization: Parametrization = PARAMETRIZATIONS["mup"],
    run: RunScaling = NO_RUN_SCALING,
    **adapting: Any,
) -> list[dict[str, Any]]:
    """Groups for an optimizer of torch's kind: {"params", "lr", "weight_decay", "eps" (Adam), "use_muon" (with Muon)}.

    Args:
        model: in muP (adapt, set_base_shapes or declare); or a fresh one, with `base`, which adapts it.
        base, adapting: as for adapt.
        lr: tuned at base size.
        optimizer: adamw, adam, sgd, or muon+adamw, whose groups say "use_muon"; theirs is torch's Muon.
        muon_lr: of Muon's groups, tuned at base size.
        weight_decay: at base size; by default torch's: 0.01 for AdamW, else 0. Muon's groups have it too.
        eps: Adam's, at base size.
        parametrization: the rule table.
        run: how far the batch and the tokens of this run are from base, and the rules for it; groups then have "betas".

    Raises:
        ConfigError: for an unknown optimizer, or a rate that is missing.
        UndeclaredParameterError: for a model that is not in muP, without `base`.
    """
    _check(optimizer, lr, muon_lr)
    if base is not None or adapting:
        adapt(model, base, **{"parametrization": parametrization} | adapting)
    decay = (0.01 if optimizer.endswith("adamw") else 0.0) if weight_decay is None else weight_decay
    matrices, others = split_for_muon(model)
    if optimizer != "muon+adamw":
        others, matrices = [(n, p) for n, p in model.named_parameters() if p.requires_grad], []
    options = {"lr": lr, "weight_decay": decay} | ({} if optimizer == "sgd" else {"eps": eps})
    kind = Update.GRADIENT if optimizer == "sgd" else Update.ENTRYWISE
    own = _of_run(run, kind, options, decay)
    groups = scaled_groups(model, others, kind, parametrization, own)
    groups = [group | {key: own[key] for key in ("betas",) if key in own} for group in groups]
    if matrices:
        tuned = _of_run(run, Update.SPECTRAL, {"lr": muon_lr, "weight_decay": decay}, decay)
        spectral = scaled_groups(model, matrices, Update.SPECTRAL, parametrization, tuned, for_torch_muon)
        groups = [g | {"use_muon": True} for g in spectral] + [g | {"use_muon": False} for g in groups]
    return groups


def optimizer(
    model: nn.Module,
    base: Base = None,
    *,
    lr: float,
    optimizer: str = "adamw",
    muon_lr: float | None = None,
    muon: Mapping[str, Any] | None = None,
    parametrization: Parametrization = PARAMETRIZATIONS["mup"],
    run: RunScaling = NO_RUN_SCALING,
    adapting: Mapping[str, Any] | None = None,
    **options: Any,
) -> Optimizer:
    """One optimizer object that trains `model` with muP's rates, whatever the loop around it.

    Args:
        model: in muP; or a fresh one, with `base`, which adapts it.
        base, adapting: as for adapt (adapting: its other arguments).
        lr: tuned at base size.
        optimizer: adamw, adam, sgd or muon+adamw: Muon for matrices from width to width, AdamW for the rest.
        muon_lr: Muon's rate, tuned at base size.
        muon: Muon's other options (momentum, weight_decay, adjust_lr_fn ...).
        parametrization: the rule table.
        run: how far the batch and the tokens of this run are from base, and the rules for it.
        options: of torch's Adam, AdamW or SGD: betas, eps, weight_decay, momentum ...

    Raises:
        ConfigError: for an unknown optimizer, or a rate that is missing.
        UndeclaredParameterError: for a model that is not in muP, without `base`.
    """
    _check(optimizer, lr, muon_lr)
    if base is not None or adapting:
        adapt(model, base, **{"parametrization": parametrization} | dict(adapting or {}))
    matrices, others = split_for_muon(model)
    shared: dict[str, Any] = {"model": model, "parametrization": parametrization}
    kind = Update.GRADIENT if optimizer == "sgd" else Update.ENTRYWISE
    own = _of_run(run, kind, {"lr": lr, **options}, _DECAYS[optimizer.removeprefix("muon+")])
    if optimizer == "muon+adamw":
        of_muon = _of_run(run, Update.SPECTRAL, {"lr": muon_lr, **(muon or {})}, _DECAYS["muon"])
        made = [MuMuon(matrices, **shared, **of_muon)] if matrices else []
        return Combined(*made, *([MuAdam(others, impl=AdamW, **shared, **own)] if others else []))
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    if optimizer == "sgd":
        return MuSGD(trained, impl=SGD, **shared, **own)
    return MuAdam(trained, impl=_ADAMS[optimizer], **shared, **own)
