"""The coordinate check of a model that is not ours, named as package.module:function.

The function takes a width and returns the model, or (model, optimizer). Functions `data` and `loss` beside it say what it
is trained on; a language model of Hugging Face's needs neither.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import os
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from speedrun_mup.coord_check.check import CoordCheckError, coord_check
from speedrun_mup.coord_check.results import FOREIGN, CoordCheck
from speedrun_mup.core import mup
from speedrun_mup.core.errors import UserError, in_a_line
from speedrun_mup.core.mup import named_specs


@dataclass(frozen=True)
class Subject:
    """What is checked: a function from width to a model, with what it is trained on and how.

    build: width -> a model in muP or not, or (model, optimizer). data: batches. loss: (model, batch) -> a scalar.
    optimizer: model -> an optimizer; None: what build returns, else mup.optimizer.
    """

    build: Callable[[int], Any]
    data: Iterable[Any]
    loss: Callable[[nn.Module, Any], Tensor]
    optimizer: Callable[[nn.Module], Optimizer] | None = None
    name: str = "model"


def load_subject(named: str) -> Subject:
    """The subject that `package.module:function` names.

    Raises:
        CoordCheckError: for a name that cannot be imported, and a model without data or loss that are known.
    """
    module_name, _, function = named.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as fault:
        raise CoordCheckError(f"{named}: cannot import {module_name} ({in_a_line(fault)})") from None
    finally:
        sys.path.remove(os.getcwd())
    build = getattr(module, function, None)
    if not callable(build):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise CoordCheckError(
            f"{named}: {module_name} has no function {function!r}, but {', '.join(known[:6]) or 'none'}"
        )
    data, loss = getattr(module, "data", None), getattr(module, "loss", None)
    if data is None or loss is None:
        data, loss = _of_hugging_face(named, build, data, loss)
    return Subject(build, data() if callable(data) else data, loss, getattr(module, "optimizer", None), named)


def _of_hugging_face(named: str, build: Callable[[int], Any], data: Any, loss: Any) -> tuple[Any, Any]:
    """Data and loss of a language model that computes its own loss from labels."""
    with torch.random.fork_rng(devices=[]):
        built = build(64)
    model = _only_model(built)
    vocabulary = getattr(getattr(model, "config", None), "vocab_size", None)
    if not isinstance(vocabulary, int) or "labels" not in inspect.signature(model.forward).parameters:
        raise CoordCheckError(
            f"{named}: its module needs a function `data` (batches) and a function `loss` (model, batch): the model is none "
            "of Hugging Face's with a loss of its own"
        )
    return data or (lambda: random_walks(vocabulary)), loss or hugging_face_loss


def random_walks(vocabulary: int, sequences: int = 8, length: int = 16, seed: int = 0) -> Iterator[Tensor]:
    """Batches (sequences, length) of a language that is quickly learned: each token is the last one plus 1 to 4."""
    rng = torch.Generator().manual_seed(seed)
    for _ in itertools.count():
        yield torch.randint(1, 5, (sequences, length), generator=rng).cumsum(dim=-1) % vocabulary


def hugging_face_loss(model: nn.Module, batch: Tensor) -> Tensor:
    """What the model says of tokens as their own labels."""
    cached = {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
    return model(input_ids=batch, labels=batch, **cached).loss


def foreign_coord_check(
    subject: Subject,
    widths: Sequence[int] = (32, 64, 128, 256),
    *,
    base: int | None = None,
    lr: float = 3e-3,
    optimizer: str = "adamw",
    muon_lr: float | None = None,
    steps: int = 6,
    seeds: int = 2,
    seed: int = 0,
    progress: bool = True,
) -> CoordCheck:
    """Check a model of any code; only PASS or FAIL, or INCONCLUSIVE with what is missing.

    A model that is not in muP is adapted over `base` first, so what is checked is what mup.adapt makes of it.

    Args:
        subject: see Subject.
        widths: three or more, the widest at least four times the narrowest.
        base: for a model that is not in muP; the narrowest width by default.
        lr, optimizer, muon_lr: of mup.optimizer, where the subject brings none.
        steps: updates, at least 4.
        seeds: models per width.
        seed: of the first.
        progress: whether to show a progress bar.

    Raises:
        CoordCheckError: for widths, steps, seeds or data that cannot give a verdict.
    """
    base = min(widths) if base is None else base
    made: dict[int, Optimizer] = {}

    def build(width: int) -> nn.Module:
        torch.manual_seed(torch.initial_seed() + seed)
        built = _in_a_line(subject, width)
        model, own = built if isinstance(built, tuple) else (built, None)
        if not any("mup_specs" in vars(module) for module in model.modules()):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                mup.adapt(model, base, build=lambda width: _only_model(subject.build(width)))
        list(named_specs(model))
        made.clear()
        if own is not None:
            made[id(model)] = own
        return model

    def train(model: nn.Module) -> Optimizer:
        if id(model) in made:
            return made.pop(id(model))
        if subject.optimizer is not None:
            return subject.optimizer(model)
        return mup.optimizer(model, lr=lr, optimizer=optimizer, muon_lr=muon_lr)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", mup.PlainOptimizerWarning)  # the verdict says it
        return coord_check(
            build,
            widths,
            subject.data,
            subject.loss,
            train,
            steps=steps,
            seeds=seeds,
            thresholds=FOREIGN,
            name=subject.name,
            progress=progress,
        )


def _only_model(built: Any) -> nn.Module:
    return built[0] if isinstance(built, tuple) else built


def _in_a_line(subject: Subject, width: int) -> Any:
    try:
        return subject.build(width)
    except UserError:
        raise
    except Exception as fault:
        raise CoordCheckError(
            f"{subject.name} cannot build width {width} ({in_a_line(fault)}); choose other --widths"
        ) from None
