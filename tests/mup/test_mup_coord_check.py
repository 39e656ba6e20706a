"""Coordinate check of the toy models: muP is flat, the standard parametrization is not; wider is better in muP only."""

import itertools
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup.compat import coord_check
from speedrun_mup.core.mup.compat.coord_check import get_coord_data, plot_coord_data
from speedrun_mup.core.mup.compat.toy_models import lazy_models

pytest.importorskip("pandas")


@pytest.fixture
def batch():
    data = torch.Generator().manual_seed(0)
    return torch.randn(32, 3, 8, 8, generator=data), torch.randint(10, (32,), generator=data)


def ratios(arch, widths, batch, optimizer, nseeds=4, **kwargs):
    """{(module, t): l1 at the larger width over l1 at the smaller}, without modules that put out 0."""
    models = lazy_models(arch, widths, kwargs.get("mup", True), batchnorm=arch == "cnn")
    df = get_coord_data(
        models, [batch], optimizer, flatten_input=arch == "mlp", nseeds=nseeds, show_progress=False, **kwargs
    )
    small, large = (df[df["width"] == width].groupby(["module", "t"])["l1"].mean() for width in widths)
    return (large / small)[small > 0].to_dict()


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("arch, widths", [("mlp", (256, 1024)), ("cnn", (16, 64))])
def test_mup_is_flat(arch, widths, optimizer, batch):
    """Over a factor of four in width, every l1 stays within 20 %, before and after one and two updates."""
    found = ratios(arch, widths, batch, optimizer)
    assert {t for _, t in found} == {1, 2, 3}
    assert min(found.values()) > 1 / 1.2 and max(found.values()) < 1.2, found


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("arch, widths", [("mlp", (256, 1024)), ("cnn", (16, 64))])
def test_standard_parametrization_is_not_flat(arch, widths, optimizer, batch):
    """The control: after an update the output grows with width."""
    found = ratios(arch, widths, batch, optimizer, mup=False)
    assert max(value for (_, t), value in found.items() if t > 1) > 1.4, found


@pytest.mark.slow
def test_half_of_mup_is_not_flat(batch):
    """Another control: a muP model, but hidden matrices learn as fast as at base width."""
    table = mup.PARAMETRIZATIONS["adam-constant"]
    wrong = lambda model: mup.MuAdam(model, lr=0.01, parametrization=table)  # noqa: E731
    right = lambda model: mup.MuAdam(model, lr=0.01)  # noqa: E731
    df = {
        make: get_coord_data(
            lazy_models("mlp", (256, 1024)), [batch], make, flatten_input=True, nsteps=4, show_progress=False
        )
        for make in (wrong, right)
    }
    for make, data in df.items():
        hidden = data[(data["t"] == 4) & (data["module"] == "3")].set_index("width")["l1"]
        assert (hidden[1024] / hidden[256] > 1.4) == (make is wrong)


def losses(width, optimizer, lr, mup_on):
    """Mean training loss of the MLP after 50, 100 and 150 steps on a linear teacher's labels."""
    makers = {"sgd": (torch.optim.SGD, mup.MuSGD), "adam": (torch.optim.Adam, mup.MuAdam)}
    torch.manual_seed(0)
    model = lazy_models("mlp", [width], mup_on)[width]()
    stepper = makers[optimizer][mup_on](model.parameters(), lr=lr)
    data = torch.Generator().manual_seed(1)
    teacher = torch.randn(192, 10, generator=data)
    history = []
    for _ in range(150):
        x = torch.randn(64, 192, generator=data)
        loss = F.cross_entropy(model(x), (x @ teacher).argmax(1))
        stepper.zero_grad()
        loss.backward()
        stepper.step()
        history.append(loss.item())
    return torch.tensor([history[0], *(sum(history[:n]) / n for n in (50, 100, 150))])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer, lr", [("sgd", 0.2), ("adam", 0.008)])
def test_wider_is_better(optimizer, lr):
    by_width = [losses(width, optimizer, lr, True) for width in (32, 128, 512)]
    assert by_width[0][0] == by_width[1][0] == by_width[2][0]  # the readout starts at zero
    assert all((narrow[1:] > wide[1:]).all() for narrow, wide in itertools.pairwise(by_width)), by_width


@pytest.mark.slow
def test_wider_is_not_better_in_the_standard_parametrization():
    """The control, at the same learning rate."""
    assert (losses(512, "adam", 0.008, False) > losses(128, "adam", 0.008, False))[2:].all()


def test_columns_and_names(batch):
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(3, 10)

        def forward(self, x):
            out = self.inner(x)
            return {"loss": out.sum(), "parts": (out, out)}

    df = get_coord_data(
        {1: Branching},
        [{"x": torch.ones(2, 3)}],
        "adam",
        mup=False,
        nsteps=2,
        dict_in_out=True,
        output_fdict={"l2": "l2", "max": lambda x: x.max()},
        input_fdict={"l1": "l1"},
        param_fdict={"std": "std"},
        show_progress=False,
    )
    assert {"width", "module", "t", "optimizer", "lr", "l1", "l2", "max", "std"} == set(df.columns)
    assert set(df["module"]) == {
        *("inner", "inner:in[0]", "inner:param[weight]", "inner:param[bias]"),
        *(":out[loss]", ":out[parts][0]", ":out[parts][1]", ":param[inner.weight]", ":param[inner.bias]"),
    }
    assert set(df["t"]) == {1, 2} and set(df["optimizer"]) == {"adam"} and set(df["lr"]) == {1e-3}


def test_it_trains_as_a_plain_loop_does(batch):
    torch.manual_seed(0)
    model = nn.Linear(192, 10)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    expected = []
    for _ in range(3):
        expected.append(model.weight.std().item())
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0].flatten(1)), batch[1]).backward()
        optimizer.step()
    df = get_coord_data(
        {1: lambda: nn.Linear(192, 10)},
        [batch],
        mup=False,
        flatten_input=True,
        param_fdict={"std": "std"},
        show_progress=False,
    )
    assert df[df["module"] == ":param[weight]"]["std"].tolist() == expected


def test_defect_12_callable_optimizer(batch):
    def slow_sgd(model):
        return mup.MuSGD(model, lr=0.01)

    models = lazy_models("mlp", [64])
    kwargs = {"flatten_input": True, "show_progress": False}
    df = get_coord_data(models, [batch], slow_sgd, **kwargs)
    assert set(df["optimizer"]) == {"slow_sgd"} and df["lr"].isna().all()
    by_name = get_coord_data(models, [batch], "sgd", lr=0.01, **kwargs)
    assert df["l1"].tolist() == by_name["l1"].tolist()
    with pytest.raises(ConfigError, match="sets lr itself"):
        get_coord_data(models, [batch], slow_sgd, lr=0.1)
    with pytest.raises(ConfigError, match="sgd, adam, adamw"):
        get_coord_data(models, [batch], "lion")


def test_defect_12_every_width_starts_from_the_same_seed(batch):
    def l1(widths):
        df = get_coord_data(lazy_models("mlp", widths), [batch], flatten_input=True, show_progress=False)
        return df[df["width"] == 128]["l1"].tolist()

    assert l1([64, 128]) == l1([128])


def test_frozen_parameters_and_chosen_modules(batch):
    df = get_coord_data(
        lazy_models("mlp", [64]),
        [batch],
        lr=1.0,
        flatten_input=True,
        filter_trainable_by_name=lambda name: name.startswith("6"),
        filter_module_by_name=lambda name: name in ("0", "6"),
        show_progress=False,
    )
    assert set(df["module"]) == {"0", "6"}
    assert df[df["module"] == "0"]["l1"].nunique() == 1 and df[df["module"] == "6"]["l1"].nunique() == 3


@pytest.mark.parametrize("lossfn", ["xent", "mse", "nll", F.cross_entropy])
def test_losses_and_batches(lossfn, batch):
    batches = [batch, (batch[0] + 1, batch[1])]
    models = lazy_models("mlp", [64])
    df = get_coord_data(models, batches, flatten_input=True, lossfn=lossfn, fix_data=False, show_progress=False)
    assert set(df["t"]) == {1, 2}


def test_l1_loss_needs_vectors(batch):
    df = get_coord_data(
        lazy_models("mlp", [64]), [batch], flatten_input=True, lossfn="l1", one_hot_target=True, show_progress=False
    )
    assert df["l1"].notna().all()


def test_sequence_outputs_are_flattened():
    model = nn.Sequential(nn.Linear(3, 8), nn.Linear(8, 5))
    data = (torch.randn(2, 4, 3), torch.randint(5, (8,)))
    df = get_coord_data({8: lambda: model}, [data], mup=False, flatten_output=True, nsteps=1, show_progress=False)
    assert df["l1"].notna().all()


def test_without_pandas(monkeypatch, batch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="pip install pandas"):
        get_coord_data(lazy_models("mlp", [64]), [batch])


@pytest.mark.slow
def test_plot(tmp_path, batch):
    df = get_coord_data(lazy_models("mlp", [64, 128]), [batch], nseeds=2, flatten_input=True, show_progress=False)
    figure = plot_coord_data(df, save_to=tmp_path / "plot.png", suptitle="MLP", name_not_contains="2")
    assert (tmp_path / "plot.png").stat().st_size > 0
    assert [axes.get_title() for axes in figure.axes] == ["t=1", "t=2", "t=3"]
    labels = [text.get_text() for text in figure.axes[0].get_legend().get_texts()]
    assert labels == ["0", "1", "3", "4", "5", "6"]  # 2, the first ReLU, is left out
    assert len(figure.axes[0].lines) == 6  # and so is the root module
    figure = plot_coord_data(df, module_list=["0", "6"], legend=None, loglog=False)
    assert len(figure.axes[0].lines) == 2 and figure.axes[0].get_legend() is None
    assert len(plot_coord_data(df, name_contains="6").axes[0].lines) == 1


@pytest.mark.slow
@pytest.mark.parametrize("mup_on", [True, False])
def test_example(tmp_path, mup_on):
    figure = coord_check.example_plot_coord_check(widths=[32, 64], mup=mup_on, nseeds=1, plotdir=tmp_path)
    name = "mup" if mup_on else "sp"
    assert [path.name for path in tmp_path.iterdir()] == [f"{name}_mlp_sgd_lr0.1_nseeds1_bn0_coord.png"]
    assert len(figure.axes) == 3


def test_covariance_statistics():
    x = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]])
    assert coord_check.cov(x).tolist() == [[1, 0], [0, 1]]
    assert coord_check.covoffdiag(x).tolist() == [0, 0]
    stats = {name: stat(torch.randn(4, 8)).item() for name, stat in coord_check.convert_fdict({"l2": "l2"}).items()}
    assert stats["l2"] > 0 and all(stat(x).isfinite() for stat in coord_check.FDICT.values())
    assert coord_check.cov(torch.tensor(3.0)).tolist() == [[9]]
