"""The path that a run's settings take through the code, as a reader follows it from `train(cfg)` on.

The path of the settings as a whole: every function of the package that is given them, at its first call, and back to the
one that called it. A part of the package (config, data, training, core.model, ...) counts as one place; the path is how
often one goes from one place to another. The path of one setting: the places that read it, one after another.
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from test_house_rules import floor_of

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.model import ModelShape
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.training import train

PACKAGE = "speedrun_mup."
EACH_ONE = {"settings.problems", "config_file.to_json"}  # of all settings alike
NAME_OF_A_RUN = {"training.run_folder._open_folder", "training.run.Run.describe", "scaling.rules_in_force"}


def place(module: str) -> str:
    parts = module.split(".")
    return ".".join(parts[: 2 if parts[0] == "core" else 1])


class Path:
    """What a profiler sees of the functions that get a TrainConfig."""

    def __init__(self):
        self.modules, self._stack, self._seen = [], [], set()

    def __call__(self, frame, event, argument):
        module = frame.f_globals.get("__name__", "")
        if not module.startswith(PACKAGE):
            return
        if event == "call":
            function = module, frame.f_code.co_qualname
            given = frame.f_code.co_varnames[: frame.f_code.co_argcount + frame.f_code.co_kwonlyargcount]
            new = function not in self._seen and any(isinstance(frame.f_locals.get(n), TrainConfig) for n in given)
            self._stack.append((frame, new, module))
            if new:
                self._seen.add(function)
                self.modules.append(module)
        elif event == "return":
            while self._stack:
                other, new, _ = self._stack.pop()
                if other is frame:
                    self.modules += [module for _, is_new, module in reversed(self._stack) if new and is_new][:1]
                    return

    @property
    def changes(self) -> list[str]:
        """The places in turn."""
        return [name for name, _ in itertools.groupby(place(m.removeprefix(PACKAGE)) for m in self.modules)]


@pytest.mark.slow
def test_the_settings_change_places_twenty_times_at_most(tiny):
    """As long as the loop that follows it: a path that gets longer asks for a file that does two things."""
    path, cfg = Path(), tiny(iterations=1, val_every=0)
    find_corpus(cfg.data, cfg.tokenizer)  # written by now
    sys.setprofile(path)
    try:
        train(cfg, observe=lambda step, model, batches: sys.setprofile(None))  # up to the first step
    finally:
        sys.setprofile(None)
    assert len(path.changes) - 1 <= 20, path.changes
    assert {"config", "data", "training", "param_groups"} <= {*path.changes} and path.changes[0] == "training"


@contextmanager
def reads(monkeypatch) -> Iterator[list[tuple[str, str]]]:
    """(setting, module.function) of every read of a setting, or of what a model's config has under the same name."""
    found = []

    def note(kind):
        usual = kind.__getattribute__

        def get(self, name):
            frame = sys._getframe(1)
            found.append((name, f"{frame.f_globals['__name__']}.{frame.f_code.co_qualname}"))
            return usual(self, name)

        monkeypatch.setattr(kind, "__getattribute__", get)

    with monkeypatch.context():
        note(TrainConfig)
        note(ModelShape)
        yield found


@pytest.mark.parametrize("setting", ["width", "seed", "parametrization", "lr_scale"])
def test_a_setting_visits_a_place_once_and_climbs_twice_at_most(setting, tiny, monkeypatch):
    cfg = dataclasses.replace(tiny(iterations=1, val_every=0))
    with reads(monkeypatch) as found:
        train(cfg)
    mine = [where.removeprefix(PACKAGE) for name, where in found if name == setting and where.startswith(PACKAGE)]
    path = [
        where for where in dict.fromkeys(mine) if not any(where.startswith(each) for each in EACH_ONE | NAME_OF_A_RUN)
    ]
    assert path, "nothing reads it"
    places = [name for name, _ in itertools.groupby(place(where) for where in path)]
    assert len(places) == len({*places}), path
    floors = [floor_of(".".join(part for part in where.split(".<")[0].split(".") if part.islower())) for where in path]
    assert sum(after > before for before, after in itertools.pairwise(floors)) <= 2, list(
        zip(path, floors, strict=True)
    )
