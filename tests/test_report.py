"""Reports: the figures, and the three ways to write them down."""

import pytest
from test_transfer import control, sweep

from speedrun_mup.report import figures, png
from speedrun_mup.transfer import Run, TransferError, measure_transfer


@pytest.fixture(scope="module")
def result():
    """Two arms, one of them a control with a cliff and a lone seed."""
    runs = sweep(seeds=(0, 1), grid=range(-2, 3)) + control(-1.0, seeds=(0,), grid=range(-2, 3), cliff=1.5)
    return measure_transfer(runs, controls={"sp": -1.0}, resamples=100)


@pytest.mark.parametrize("suffix", ["png", "svg"])
@pytest.mark.parametrize("figure", [figures.lr_curves, figures.drift, figures.best_losses])
def test_pictures_have_the_same_bytes_every_time(tmp_path, result, figure, suffix):
    first, second = tmp_path / f"first.{suffix}", tmp_path / f"second.{suffix}"
    png.draw(figure(result), first)
    png.draw(figure(result), second)
    assert first.read_bytes() == second.read_bytes() and first.stat().st_size > 5000


def test_no_picture_of_nothing():
    with pytest.raises(TransferError, match="for a picture"):
        figures.lr_curves(measure_transfer([Run(64, 1.0, 0, 3.0)]))
    with pytest.raises(TransferError, match="no arm has a drift"):
        figures.drift(measure_transfer(sweep(widths=(64,))))
