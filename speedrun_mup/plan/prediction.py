"""What a finished sweep says about the target run, and how far off that was."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path

from speedrun_mup.config import TrainConfig, computed_settings
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.files import write_whole
from speedrun_mup.plan.design import arm_of
from speedrun_mup.plan.folder import PLAN, Prediction, read_content, read_prediction, target_in
from speedrun_mup.sweep import measure_sweep, read_results
from speedrun_mup.sweep.result import in_bits_per_byte
from speedrun_mup.training.run_folder import saved_config
from speedrun_mup.training.tracking import read_metrics
from speedrun_mup.transfer import ArmResult, Forecast, TransferError, loss_forecast
from speedrun_mup.transfer.published import BY_DATA_ORDER

LAW_WIDTHS, FEW_SEEDS = 4, 3  # widths that determine the law of the loss; fewer seeds leave the noise uncertain
WIDE = 20  # standard deviations of one run; an interval of the loss wider than this is explained


def predict(out: Path) -> Prediction:
    """Learning rate and loss of the target from the finished sweep in `out`; also written to its plan.json.

    Raises ConfigError without a plan, TransferError if the sweep does not bear a forecast.
    """
    content = read_content(out)
    target = target_in(content, out)
    name = arm_of(target).name
    arm = measure_sweep(out, [name]).arms[name]
    try:
        forecast = loss_forecast(arm, target.width, known=BY_DATA_ORDER[target.data_order])
    except TransferError as fault:
        raise TransferError(f"{fault}; or plan again with a larger --budget, for more seeds and widths") from None
    slow, fast = forecast.log2_value.interval()
    if math.isnan(slow):
        raise ConfigError(f"{out}: with one seed the noise is unknown, and so is every interval; run a second seed")
    prediction = Prediction(
        width=target.width,
        lr_scale=target.lr_scale * 2**forecast.log2_value.value,
        lr_scale_interval=(target.lr_scale * 2**slow, target.lr_scale * 2**fast),
        loss=forecast.loss.value,
        loss_interval=forecast.loss.interval(),
        verdict=arm.verdict.value,
        method=forecast.method,
        wide=_why_wide(arm, forecast),
        bits_per_byte=in_bits_per_byte(forecast.loss.value, read_results(out)),
    )
    write_whole(out / PLAN, json.dumps(content | {"prediction": asdict(prediction)}, indent=1, allow_nan=False) + "\n")
    return prediction


def _why_wide(arm: ArmResult, forecast: Forecast) -> str:
    """A sentence where the interval of the loss is far wider than the scatter of runs alone would make it."""
    low, high = forecast.loss.interval()
    if not high - low > WIDE * arm.noise.total > 0:
        return ""
    widths, seeds = [fit.size for fit in arm.usable], [len(fit.table.losses) for fit in arm.usable]
    reasons = []
    if len(widths) < LAW_WIDTHS:
        reasons.append(f"{len(widths)} widths do not determine how the loss falls with width: more widths narrow it")
    if min(seeds) < FEW_SEEDS:
        reasons.append(
            f"seeds are few ({', '.join(map(str, seeds))} at widths {', '.join(map(str, widths))}): more narrow it"
        )
    why = ", and because ".join(reasons) or f"{forecast.axes.at(forecast.size)} is far from the widths of the sweep"
    return f"the interval is {(high - low) / arm.noise.total:.0f} standard deviations of one run wide because {why}"


@dataclass(frozen=True)
class Comparison:
    """Predicted against measured. log2_factor: of the learning rate used over the predicted one."""

    prediction: Prediction
    measured: float
    log2_factor: float

    @property
    def inside(self) -> bool:
        """Whether the measured loss lies in the predicted interval."""
        low, high = self.prediction.loss_interval
        return low <= self.measured <= high

    @property
    def miss(self) -> str:
        """How far off the prediction was, as a sentence."""
        return miss(self.prediction.loss, self.prediction.loss_interval, self.measured)

    def summary(self) -> str:
        """For a terminal."""
        predicted = f"validation loss: predicted {self.prediction.loss:.4f}, measured {self.measured:.4f}"
        lines = [f"{predicted}: {self.miss}", *([self.prediction.wide] if self.prediction.wide else [])]
        if abs(self.log2_factor) > 0.01:
            lines.append(f"the run's learning rate is 2^{self.log2_factor:+.2f} times the predicted one")
        return "\n".join(lines)


def miss(predicted: float, interval: tuple[float, float], measured: float) -> str:
    """How far off a predicted loss was, as a sentence. interval: its 90 %."""
    low, high = interval
    where = "inside" if low <= measured <= high else "outside"
    return f"missed by {measured - predicted:+.4f} nats; {where} the 90 % interval ({low:.4f} to {high:.4f})"


def compare(out: Path, run: Path) -> Comparison:
    """The prediction in the plan.json of `out` against the finished target run in the folder `run`.

    Raises ConfigError if there is no prediction, if the run is not at its end, or if it is not the target that was
    planned; another learning rate or seed is no obstacle.
    """
    planned, prediction = read_prediction(out)
    done, measured = finished_run(planned, read_content(out)["corpus"], run)
    return Comparison(prediction, measured, math.log2(done.lr_scale / prediction.lr_scale))


def finished_run(planned: TrainConfig, corpus: str, run: Path) -> tuple[TrainConfig, float]:
    """Settings and last validation loss of the finished run in the folder `run`, which is `planned` but for its rate and seed.

    corpus: fingerprint of its data. Raises ConfigError for another run, and for one that is not at its end.
    """
    done = saved_config(run)
    if not find_corpus(done.data, done.tokenizer)[0].is_known_as(corpus):
        raise ConfigError(
            f"{run} is not the planned run: it was trained on other data; compare the run that was planned"
        )
    mine, theirs = computed_settings(planned), computed_settings(done)
    differ = [key for key in mine if mine[key] != theirs[key] and key not in ("lr_scale", "seed")]
    if differ:
        changes = "; ".join(f"{key} was planned as {mine[key]}, is {theirs[key]}" for key in differ)
        raise ConfigError(f"{run} is not the planned run: {changes}; compare the run that was planned")
    losses = [row["loss"] for row in read_metrics(run) if row["kind"] == "val" and row["step"] == done.iterations]
    if not losses or losses[-1] is None:
        raise ConfigError(f"{run} has no loss at step {done.iterations}; train it to its end first")
    return done, losses[-1]
