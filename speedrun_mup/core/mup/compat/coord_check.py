"""Coordinate check: train a few steps at several widths and see whether any activation grows or shrinks with width.

Same names as microsoft/mup's module. get_coord_data returns a pandas DataFrame; pandas is needed here only. It looks at
what modules put out and at the scores of torch's attention, and is blind for matrices whose effect something else hides;
speedrun_mup.coord_check is not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup.compat.optim import MuAdam, MuAdamW, MuSGD
from speedrun_mup.core.mup.compat.scores import AttentionScores
from speedrun_mup.core.mup.compat.toy_models import lazy_models

Stat = Callable[[Tensor], Tensor]


def cov(x: Tensor) -> Tensor:
    """Gram matrix of the vectors in `x` over their size: (..., d) -> (N, N)."""
    vectors = x.reshape(1, 1) if x.nelement() == 1 else x.reshape(-1, x.shape[-1])
    return vectors @ vectors.T / vectors.shape[-1]


def covoffdiag(x: Tensor) -> Tensor:
    """The entries of cov(x) off the diagonal: (..., d) -> (N * (N - 1),)."""
    gram = cov(x)
    return gram[~torch.eye(len(gram), dtype=torch.bool, device=gram.device)]


FDICT: dict[str, Stat] = {
    "l1": lambda x: x.abs().mean(),
    "l2": lambda x: (x**2).mean() ** 0.5,
    "mean": lambda x: x.mean(),
    "std": lambda x: x.std(),
    "covl1": lambda x: cov(x).abs().mean(),
    "covl2": lambda x: (cov(x) ** 2).mean() ** 0.5,
    "covoffdiagl1": lambda x: covoffdiag(x).abs().mean(),
    "covoffdiagl2": lambda x: (covoffdiag(x) ** 2).mean() ** 0.5,
}


def convert_fdict(d: Mapping[str, str | Stat]) -> dict[str, Stat]:
    """`d` with names of statistics replaced by the functions in FDICT."""
    return {key: FDICT[stat] if isinstance(stat, str) else stat for key, stat in d.items()}


def _tensors(value: Any, name: str) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of every tensor in nested tuples, lists and dicts; names gain [index] or [key]."""
    if isinstance(value, Tensor):
        yield name, value
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _tensors(item, f"{name}[{key}]")
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}[{i}]")


def _record(
    records: list[dict[str, Any]],
    width: int,
    t: int,
    named: Iterable[tuple[str, Tensor]],
    stats: Mapping[str, str | Stat] | None,
) -> None:
    """Append to `records` the statistics (default l1) of tensors."""
    for name, x in named:
        values = {key: stat(x.detach().float()).item() for key, stat in convert_fdict(stats or {"l1": "l1"}).items()}
        records.append({"width": width, "module": name, "t": t} | values)


def _record_coords(
    records: list[dict[str, Any]],
    width: int,
    modulename: str,
    t: int,
    output_fdict: Mapping[str, str | Stat] | None = None,
    input_fdict: Mapping[str, str | Stat] | None = None,
    param_fdict: Mapping[str, str | Stat] | None = None,
) -> Callable[[nn.Module, Any, Any], None]:
    """A forward hook that appends to `records` the statistics of a module's output, input and parameters."""

    record = partial(_record, records, width, t)

    def hook(module: nn.Module, inputs: Any, output: Any) -> None:
        where = modulename if isinstance(output, Tensor) else f"{modulename}:out"
        record(_tensors(output, where), output_fdict)
        if input_fdict:
            record(_tensors(inputs, f"{modulename}:in"), input_fdict)
        if param_fdict:
            record(((f"{modulename}:param[{name}]", p) for name, p in module.named_parameters()), param_fdict)

    return hook


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "xent": F.cross_entropy,
    "nll": F.nll_loss,
    "mse": F.mse_loss,
    "l1": F.l1_loss,
}
_MU_OPTIMIZERS = {"sgd": MuSGD, "adam": MuAdam, "adamw": MuAdamW}
_PLAIN_OPTIMIZERS = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}


def _optimizer_builder(
    optimizer: str | Callable[[nn.Module], torch.optim.Optimizer],
    lr: float | None,
    mup: bool,
    chosen: Callable[[str], bool] | None,
) -> tuple[Callable[[nn.Module], torch.optim.Optimizer], float | None]:
    """What makes the optimizer of a model, of the parameters whose names are `chosen`; and its learning rate."""
    if not isinstance(optimizer, str):
        if lr is not None or chosen is not None:
            raise ConfigError("optimizer is a function and sets lr itself; leave out lr and filter_trainable_by_name")
        return optimizer, None
    if optimizer not in _MU_OPTIMIZERS:
        raise ConfigError(f"optimizer={optimizer!r} is unknown; give sgd, adam, adamw or a function of the model")
    rate = lr if lr is not None else 0.1 if optimizer == "sgd" else 1e-3
    make: Any = (_MU_OPTIMIZERS if mup else _PLAIN_OPTIMIZERS)[optimizer]

    def build(model: nn.Module) -> torch.optim.Optimizer:
        wanted = [p for name, p in model.named_parameters() if chosen is None or chosen(name)]
        return make(wanted, lr=rate, model=model) if mup else make(wanted, lr=rate)

    return build, rate


def _import_pandas() -> Any:
    try:
        import pandas
    except ImportError:
        raise ConfigError("get_coord_data returns a pandas DataFrame; run: pip install pandas") from None
    return pandas


def _loss_of(
    device: torch.device,
    output_name: str | None,
    flatten_input: bool,
    flatten_output: bool,
    lossfn: str | Callable[[Tensor, Tensor], Tensor],
    one_hot_target: bool,
    model: nn.Module,
    batch: Any,
) -> Tensor:
    """The loss of a model on a batch, by get_coord_data's arguments. output_name: None where batches are pairs."""
    if output_name is not None:
        out = model(**{key: v.to(device) if isinstance(v, Tensor) else v for key, v in batch.items()})
        return out[output_name] if isinstance(out, Mapping) else out[0]
    data, target = (x.to(device) for x in batch)
    out = model(data.flatten(1) if flatten_input else data)
    out = out.flatten(0, -2) if flatten_output else out
    if one_hot_target or (lossfn == "mse" and not target.is_floating_point()):
        target = F.one_hot(target, out.shape[-1]).to(out.dtype)
    return (LOSSES[lossfn] if isinstance(lossfn, str) else lossfn)(out, target)


def get_coord_data(
    models: Mapping[int, Callable[[], nn.Module]],
    dataloader: Iterable[Any],
    optimizer: str | Callable[[nn.Module], torch.optim.Optimizer] = "sgd",
    lr: float | None = None,
    mup: bool = True,
    filter_trainable_by_name: Callable[[str], bool] | None = None,
    *,
    nsteps: int = 3,
    dict_in_out: bool = False,
    flatten_input: bool = False,
    flatten_output: bool = False,
    output_name: str = "loss",
    lossfn: str | Callable[[Tensor, Tensor], Tensor] = "xent",
    filter_module_by_name: Callable[[str], bool] | None = None,
    fix_data: bool = True,
    cuda: bool = False,
    nseeds: int = 1,
    output_fdict: Mapping[str, str | Stat] | None = None,
    input_fdict: Mapping[str, str | Stat] | None = None,
    param_fdict: Mapping[str, str | Stat] | None = None,
    show_progress: bool = True,
    one_hot_target: bool = False,
) -> Any:
    """A pandas DataFrame: width, module, t, optimizer, lr and statistics (default l1) of what each module puts out,
    and of the scores of torch's attention as "MODULE.scores".

    models: {width: constructor}. dataloader: (input, label) pairs, or with dict_in_out keyword arguments of a model
    that returns its loss under `output_name`, or first. optimizer: sgd, adam or adamw (lr default 0.1 or 1e-3; torch's
    own with mup=False), or a function of the model. t = 1 is before any update. The seed is set again for every model,
    so that nothing but width differs. fix_data: train on the first batch only. lossfn: a name in LOSSES or a function
    of output and label. one_hot_target: make vectors of class labels (always so for mse). Raises ConfigError.
    """
    pandas = _import_pandas()
    from tqdm import tqdm

    build_optimizer, lr = _optimizer_builder(optimizer, lr, mup, filter_trainable_by_name)
    device = torch.device("cuda" if cuda else "cpu")

    loss_of = partial(
        _loss_of, device, output_name if dict_in_out else None, flatten_input, flatten_output, lossfn, one_hot_target
    )

    def see_scores(width: int, t: int, name: str, scores: Tensor) -> None:
        if not filter_module_by_name or filter_module_by_name(name):
            _record(records, width, t, [(name, scores)], output_fdict)

    batches = [next(iter(dataloader))] * nsteps if fix_data else dataloader
    records: list[dict[str, Any]] = []
    for seed, width in tqdm(list(product(range(nseeds), models)), disable=not show_progress):
        torch.manual_seed(seed)
        model = models[width]().to(device).train()
        stepper = build_optimizer(model)
        for t, batch in zip(range(1, nsteps + 1), batches):
            fdicts = (output_fdict, input_fdict, param_fdict)
            hooks = [
                module.register_forward_hook(_record_coords(records, width, name, t, *fdicts))
                for name, module in model.named_modules()
                if not filter_module_by_name or filter_module_by_name(name)
            ]
            with AttentionScores(model, partial(see_scores, width, t)) as attention:
                loss = loss_of(model, batch)
            for hook in [*hooks, *attention.hooks]:
                hook.remove()
            stepper.zero_grad()
            loss.backward()
            stepper.step()
    label = optimizer if isinstance(optimizer, str) else getattr(optimizer, "__name__", str(optimizer))
    return pandas.DataFrame(records).assign(optimizer=label, lr=lr)


def plot_coord_data(
    df: Any,
    y: str = "l1",
    save_to: str | Path | None = None,
    suptitle: str | None = None,
    x: str = "width",
    hue: str = "module",
    legend: str | bool | None = "full",
    name_contains: str | None = None,
    name_not_contains: str | None = None,
    module_list: list[str] | None = None,
    loglog: bool = True,
    logbase: int = 2,
    face_color: str | None = None,
    subplot_width: int = 5,
    subplot_height: int = 4,
) -> Any:
    """A matplotlib figure of what get_coord_data found: a plot per t, a line per module, a band of +-1 std over seeds.

    The root module is left out. legend: falsy for none. name_contains, name_not_contains (regular expressions) and
    module_list pick modules. Lines are flat if the model is in muP.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    keep = df["module"] != ""
    if name_contains is not None:
        keep &= df["module"].str.contains(name_contains)
    if name_not_contains is not None:
        keep &= ~df["module"].str.contains(name_not_contains)
    if module_list is not None:
        keep &= df["module"].isin(module_list)
    df = df[keep]
    steps, lines = sorted(df["t"].unique()), list(df[hue].unique())
    colors = colormaps["viridis"].resampled(max(len(lines), 2))
    size = (subplot_width * len(steps), subplot_height)
    figure = Figure(figsize=size, facecolor=face_color or "white", layout="constrained")
    for plot, (axes, t) in enumerate(zip(figure.subplots(1, len(steps), squeeze=False)[0], steps)):
        for i, line in enumerate(lines):
            points = df[(df["t"] == t) & (df[hue] == line)].groupby(x)[y].agg(["mean", "std"])
            axes.plot(points.index, points["mean"], color=colors(i), label=str(line))
            if points["std"].notna().any():
                low, high = points["mean"] - points["std"], points["mean"] + points["std"]
                axes.fill_between(points.index, low, high, color=colors(i), alpha=0.2)
        axes.set(title=f"t={t}", xlabel=x, ylabel=y if plot == 0 else "")
        if loglog:
            axes.set_xscale("log", base=logbase)
            if (df[df["t"] == t][y] > 0).any():
                axes.set_yscale("log", base=logbase, nonpositive="mask")
        if legend and plot == 0:
            axes.legend(fontsize="x-small")
    figure.suptitle(suptitle or "")
    if save_to is not None:
        figure.savefig(save_to)
    return figure


def example_plot_coord_check(
    arch: str = "mlp",
    optimizer: str = "sgd",
    lr: float | None = None,
    widths: Iterable[int] | None = None,
    mup: bool = True,
    nsteps: int = 3,
    nseeds: int = 10,
    plotdir: str | Path = "",
    batchnorm: bool = False,
    batch_size: int = 16,
    init: str = "kaiming_fan_in_normal",
    legend: str | bool | None = "full",
    name_contains: str | None = None,
    name_not_contains: str | None = None,
) -> Any:
    """Check the toy MLP or CNN on random images, save the plot in `plotdir` and return it. Downloads nothing."""
    images = torch.Generator().manual_seed(0)
    batch = (torch.randn(batch_size, 3, 8, 8, generator=images), torch.randint(10, (batch_size,), generator=images))
    widths = widths or ([64, 128, 256, 512, 1024] if arch == "mlp" else [4, 8, 16, 32])
    models = lazy_models(arch, widths, mup, init, batchnorm=batchnorm)
    options: dict[str, Any] = {"flatten_input": arch == "mlp", "nseeds": nseeds, "nsteps": nsteps}
    df = get_coord_data(models, [batch], optimizer, lr, mup, show_progress=False, **options)
    name, lr = "muP" if mup else "SP", df["lr"][0]
    return plot_coord_data(
        df,
        legend=legend,
        name_contains=name_contains,
        name_not_contains=name_not_contains,
        save_to=Path(plotdir) / f"{name.lower()}_{arch}_{optimizer}_lr{lr}_nseeds{nseeds}_bn{int(batchnorm)}_coord.png",
        suptitle=f"{name} {arch.upper()} {optimizer} lr={lr} bn={'on' if batchnorm else 'off'} nseeds={nseeds}",
        face_color=None if mup else "xkcd:light grey",
    )
