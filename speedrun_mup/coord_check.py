"""The coordinate check: does every tensor's effect stay the same as the model gets wider, from the first updates on?

    result = coord_check(build_model, widths=[64, 128, 256, 512], data=batches, loss=loss, optimizer=make_optimizer)
    print(result.summary())

A model is trained for a few steps at several widths on the same batches. What is judged is the slope of log2(value)
against log2(width) of four quantities per parameter W with input x:

    init        rms(W_0 x) before any update
    update      rms((W_t - W_0) x_t): what the updates so far do to the present input
    gradient    rms of the gradient, which Adam's eps has to follow
    activation  rms of what modules put out

`update` is the heart. Activations alone are blind to a wrong learning rate of one matrix where another tensor's update
dominates what they carry (Yang et al., Tensor Programs V, appendix, look at activations; the spectral condition of Yang,
Simon and Bernstein, arXiv 2310.17813, speaks of updates). Control arms with a known wrong rule are run beside: a check
that does not see them proves nothing and says so.

Arrays: S seeds, W widths, T + 1 points in time t = 0 ... T; W_t is after t updates.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import itertools
import json
import math
import platform
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.attention import Dense
from speedrun_mup.core.errors import UserError
from speedrun_mup.core.model import GPT
from speedrun_mup.core.mup import ParamSpec, Parametrization, Role, named_specs
from speedrun_mup.core.utils import World
from speedrun_mup.corpus import find_corpus
from speedrun_mup.data import TrainBatches
from speedrun_mup.training import build_optimizers, model_config

Array = NDArray[np.float64]
Loss = Callable[[nn.Module, Any], Tensor]
Record = Callable[[str, Tensor], None]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


class CoordCheckError(UserError):
    """A check that cannot be run as asked."""

    exit_code = 2


class Verdict(enum.StrEnum):
    """What the check shows, best first. Only PASS is success."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"
    INCONCLUSIVE = "INCONCLUSIVE"


@dataclass(frozen=True)
class Thresholds:
    """Every number that decides a verdict.

    Every wrong rule that occurs in practice is off by a multiple of 1/2; correct ones measure below 0.15.
    """

    warn: float = 0.15  # octaves per doubling of width, between the measured and the predicted slope
    fail: float = 0.30
    first_step: int = 3  # earlier updates are shown, not judged: zero-initialised layers hide what lies behind them
    min_widths: int = 3
    min_span: float = 4.0  # widest width over narrowest

    def judge(self, deviation: float) -> Verdict:
        """The verdict on one deviation of a slope."""
        size = abs(deviation)
        return Verdict.PASS if size <= self.warn else Verdict.WARN if size <= self.fail else Verdict.FAIL


# Slopes in muP. A readout starts as a sum of m independent terms divided by m, so it starts small, as m**-1/2.
PREDICTED: dict[str, dict[Role, float]] = {
    "init": {Role.INPUT: 0.0, Role.HIDDEN: 0.0, Role.OUTPUT: -0.5, Role.SCALAR: 0.0},
    "update": dict.fromkeys(Role, 0.0),
    "gradient": {Role.INPUT: -1.0, Role.HIDDEN: -1.0, Role.OUTPUT: -1.0, Role.SCALAR: 0.0},
}


@dataclass(frozen=True)
class Arm:
    """One way to build and train the model at every width.

    build_model: width -> module with declared roles; initialised from torch's seed, so torch.initial_seed() tells it.
    optimizer: module -> optimizer or several. lr_power: learning rates are multiplied by (width / narrowest)**lr_power.
    """

    name: str
    build_model: Callable[[int], nn.Module]
    optimizer: Callable[[nn.Module], Optimizers]
    lr_power: float = 0.0


@dataclass(frozen=True)
class Control(Arm):
    """An arm with a rule that is wrong on purpose: the updates of `role` (None: all) must be seen to have `slope`."""

    role: Role | None = None
    slope: float = 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Series:
    """One quantity of one tensor over widths and time. values (W, T + 1): geometric mean over seeds, nan if not taken."""

    quantity: str
    name: str
    role: Role | None  # None: an activation
    values: Array

    @property
    def kind(self) -> str:
        """What tensors of all layers have in common: the name with its layer numbers replaced."""
        name = re.sub(r"(^|(?<=\.))\d+((?=\.)|$)", "*", self.name)
        return name if self.role is None else name.split("[")[0]


@dataclass(frozen=True)
class Row:
    """The slope of one quantity over all tensors of one kind. verdict None: shown, not judged."""

    quantity: str
    kind: str
    role: Role | None
    slope: float
    predicted: float
    verdict: Verdict | None
