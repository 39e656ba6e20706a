"""Does the best learning rate stay put as the model gets wider? The estimator, the equivalence test and the verdict.

    result = measure_transfer(read_points("sweep.csv"), controls={"sp": -1.0})
    print(result.summary())

Two axes are named by `Axes`: a size that is scaled (width unless it says otherwise) and a hyperparameter above zero that is
tuned (a learning rate unless it says otherwise). Both are logarithmic, to base 2. At each size a quadratic fit to the
points near the lowest loss gives the optimum; the slope of log2 of the optima on log2(size) is the drift. Transfer means
that the drift is shown to be small, which is an equivalence test: "no significant drift" is what a noisy sweep says about
anything. Runs of one seed share initialisation and batches over all values, so seeds are resampled whole.

Intervals speak of noise. Misfit of the quadratic is handled by the second, narrower window.

Arrays named draws, and the rows of `QuadraticFit`, hold the estimate from the data in row 0 and resamples in rows 1 to B.
Shapes: S seeds, K stable values, W sizes, R = 1 + B rows.

`speedrun_mup.transfer(...)` is `functions.transfer`.
"""

from speedrun_mup.callables import make_callable
from speedrun_mup.transfer.axes import SIZES, Axes, SizeAxis, with_article
from speedrun_mup.transfer.claims import MADE_WITH, Doubt, differing, missing
from speedrun_mup.transfer.fits import Array, Estimate, LossTable, QuadraticFit, SizeFit, fit_quadratics
from speedrun_mup.transfer.forecast import Forecast, loss_forecast
from speedrun_mup.transfer.larger import LargerIsBetter, larger_is_better
from speedrun_mup.transfer.law import Prior
from speedrun_mup.transfer.measure import measure_transfer
from speedrun_mup.transfer.points import CurveKey, Point, TransferError
from speedrun_mup.transfer.results import ArmResult, TransferResult
from speedrun_mup.transfer.surface import Known, fit_surface
from speedrun_mup.transfer.surface_results import AxisDrift, Surface, SurfaceForecast
from speedrun_mup.transfer.surface_verdict import SurfaceResult, measure_surface
from speedrun_mup.transfer.table import RunTable, read_points, read_table
from speedrun_mup.transfer.thresholds import Thresholds, Verdict

make_callable(__name__)

__all__ = [
    "MADE_WITH",
    "SIZES",
    "ArmResult",
    "Array",
    "Axes",
    "AxisDrift",
    "CurveKey",
    "Doubt",
    "Estimate",
    "Forecast",
    "Known",
    "LargerIsBetter",
    "LossTable",
    "Point",
    "Prior",
    "QuadraticFit",
    "RunTable",
    "SizeAxis",
    "SizeFit",
    "Surface",
    "SurfaceForecast",
    "SurfaceResult",
    "Thresholds",
    "TransferError",
    "TransferResult",
    "Verdict",
    "differing",
    "fit_quadratics",
    "fit_surface",
    "larger_is_better",
    "loss_forecast",
    "measure_surface",
    "measure_transfer",
    "missing",
    "read_points",
    "read_table",
    "with_article",
]
