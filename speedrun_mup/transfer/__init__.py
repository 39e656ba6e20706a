"""Does the best learning rate stay put as the model gets wider? The estimator, the equivalence test and the verdict.

    result = measure_transfer(read_runs("sweep.csv"), controls={"sp": -1.0})
    print(result.summary())

Learning rates live on a log2 axis, in octaves. At each width a parabola through the points near the lowest loss gives
the optimum; the slope of the optima on log2(width) is the drift, in octaves per doubling of width. Transfer means that
the drift is shown to be small, which is an equivalence test: "no significant drift" is what a noisy sweep says of
anything. Runs of one seed share initialisation and batches over all learning rates, so seeds are resampled whole.

What is turned is a learning rate in all names here, and may be any hyperparameter above zero (`knob`).

Intervals speak of noise. That a loss curve is no parabola is the business of the second, narrow window.

Arrays named draws, and the rows of `Bowls`, hold the estimate from the data in row 0 and resamples in rows 1 to B.
Shapes: S seeds, K stable learning rates, W widths, R = 1 + B rows.
"""

from speedrun_mup.transfer.claims import MADE_WITH, Doubt, differing, missing
from speedrun_mup.transfer.fits import Array, Bowls, Cells, Estimate, WidthFit, fit_bowls
from speedrun_mup.transfer.forecast import Forecast, loss_forecast
from speedrun_mup.transfer.measure import measure_transfer
from speedrun_mup.transfer.results import ArmResult, TransferResult
from speedrun_mup.transfer.runs import CurveKey, Run, TransferError, is_rate, knob_name
from speedrun_mup.transfer.table import Table, read_runs, read_table
from speedrun_mup.transfer.thresholds import Thresholds, Verdict
from speedrun_mup.transfer.wider import WiderIsBetter, wider_is_better

__all__ = [
    "MADE_WITH",
    "ArmResult",
    "Array",
    "Bowls",
    "Cells",
    "CurveKey",
    "Doubt",
    "Estimate",
    "Forecast",
    "Run",
    "Table",
    "Thresholds",
    "TransferError",
    "TransferResult",
    "Verdict",
    "WiderIsBetter",
    "WidthFit",
    "differing",
    "fit_bowls",
    "is_rate",
    "knob_name",
    "loss_forecast",
    "measure_transfer",
    "missing",
    "read_runs",
    "read_table",
    "wider_is_better",
]
