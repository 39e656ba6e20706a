"""The coordinate check: does what the updates of a tensor do scale as it should when the model gets wider, or deeper?

    result = coord_check(build_model, widths=[64, 128, 256, 512], data=batches, loss=loss, optimizer=make_optimizer)
    print(result.summary())

A model is trained for a few steps at several widths, on the same batches. Judged are slopes of log2(value) against
log2(width). For every parameter W with input x:

    init        rms(W_0 x_0)
    update      rms((W_t - W_0) x_t): what all updates so far do to the present input
    gradient    rms of the gradient, which Adam's eps has to follow

and for what modules put out, and the scores of torch's attention:

    activation  its rms, which must not grow

Along depth, update is expected to stay where a layer reads and to go as 1 / layers where it writes into the stream; and

    stream      the share of the stream behind the last layer that the layers added

to stay. `update` is the heart of it. Activations alone, what coordinate checks usually look at (Yang et al., Tensor Programs V,
arXiv 2203.03466), do not show a wrong learning rate of a matrix whose effect another tensor's update drowns. Controls
are checked too, each with a rule wrong on purpose: if they are not detected, the check is inconclusive.

Shapes: S seeds, W widths, T + 1 points in time t = 0 ... T; W_t is the parameter after t updates.
"""

from speedrun_mup.coord_check.check import Control, CoordCheckError, coord_check
from speedrun_mup.coord_check.foreign import Subject, foreign_coord_check, load_subject
from speedrun_mup.coord_check.gpt import gpt_coord_check
from speedrun_mup.coord_check.observe import ArmRecipe
from speedrun_mup.coord_check.results import (
    DEPTH,
    WIDTH,
    CheckedArm,
    CheckedAxis,
    CheckVerdict,
    ControlResult,
    CoordCheck,
    Series,
    SlopeRow,
    SlopeThresholds,
)

__all__ = [
    "DEPTH",
    "WIDTH",
    "ArmRecipe",
    "CheckVerdict",
    "CheckedArm",
    "CheckedAxis",
    "Control",
    "ControlResult",
    "CoordCheck",
    "CoordCheckError",
    "Series",
    "SlopeRow",
    "SlopeThresholds",
    "Subject",
    "coord_check",
    "foreign_coord_check",
    "gpt_coord_check",
    "load_subject",
]
