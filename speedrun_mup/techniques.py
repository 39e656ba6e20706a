"""Techniques beyond record 26, each absent unless its setting asks for it: TECHNIQUES has an entry for each.

What they build is in core/model/options, one technique a file, which is imported when a run has the technique. Imports no
torch, so that `--help` and a misspelt flag answer at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, Literal, TypeVar

from speedrun_mup.core.registry import resolve
from speedrun_mup.flags import LARGEST
from speedrun_mup.param_groups import ParamGroup
from speedrun_mup.settings import Valid, at_least, at_most, setting, with_settings

T = TypeVar("T")
C = TypeVar("C", bound=type)
Adds = str | Callable[..., Any]
COUNT = (at_most(LARGEST), at_least(0))
_OPTIONS = "speedrun_mup.core.model.options"
_OPTIMIZERS = "speedrun_mup.core.optimizers.options"
_SCHEDULE = "speedrun_mup.training.schedule_options"


@dataclass(frozen=True)
class Technique:
    """What a technique is called and set by, and where it changes a run.

    Args:
        about: what its setting means, for `--help`.
        off: the default of its setting, with which it is absent. It has the setting's type.
        model: (GPTConfig, value of the setting) -> GPTConfig, or the place of such a function, "module:function".
        schedule: (Schedule, value) -> Schedule, likewise.
        optimizers: (hyperparameters by parameter group, value) -> the same, likewise.
        valid: conditions on a value.
        choices: the values that a text may have.
        param_groups: groups of parameters of its own, by the names that its modules declare.
        on: settings with which an ablation has it; without, a technique that is switched on or off is on.
        settings: more of them, by name; these functions get their values by these names.
    """

    about: str
    off: Any = False
    _: KW_ONLY
    model: Adds = ""
    schedule: Adds = ""
    optimizers: Adds = ""
    on: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    valid: Sequence[Valid] = ()
    choices: Collection[str] = ()
    param_groups: Mapping[str, ParamGroup] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def switched_on(self, name: str) -> dict[str, Any]:
        """Settings with which an ablation has the technique `name`; none where it would have to choose a value."""
        return dict(self.on) or ({name: True} if self.off is False else {})

    def fields(self, name: str) -> list[tuple[str, Any, Any]]:
        """The settings of the technique `name`, as `dataclasses.make_dataclass` takes them."""
        own = setting(
            "techniques", self.about, self.off, affects="result", choices=self.choices, valid=tuple(self.valid)
        )
        made = [(name, type(self.off), own)]
        for key, declared in self.settings.items():
            meta = declared.metadata["setting"]._replace(needs=name)
            made.append(
                (key, type(declared.default), dataclasses.field(default=declared.default, metadata={"setting": meta}))
            )
        for key, group in self.param_groups.items():
            made += group._replace(needs=name).fields(key)
        return made


# By the name of the setting; applied in this order.
TECHNIQUES: dict[str, Technique] = {
    "attention_gate": Technique(
        "channels of its input that gate each attention head (record 28; 12 since record 30); 0: no gates",
        0,
        model=f"{_OPTIONS}.gates:add_attention_gate",
        valid=COUNT,
        on={"attention_gate": 12},
        param_groups={  # record 56; before, Muon
            "gate": ParamGroup("gates of attention heads", lr=0.008, beta1=0.9, beta2=0.99)
        },
    ),
    "cautious_decay": Technique(
        "weight decay of those entries alone that the step moves towards zero (records 43 and 50)",
        optimizers=f"{_OPTIMIZERS}:add_cautious_decay",
        on={"cautious_decay": True, "weight_decay": 0.1},
    ),
    "hidden_init": Technique(
        "how hidden matrices begin: the last of each branch at zero as in record 26, or none (track 3), which MuonH needs",
        "record26",
        model=f"{_OPTIONS}.starts:set_hidden_init",
        choices=("record26", "track3"),
        on={"hidden_init": "track3"},
    ),
    "multi_token": Technique(
        "predict the next three tokens with the same logits, then two, then one (record 53)",
        schedule=f"{_SCHEDULE}:predict_several",
    ),
    "asymmetric_softcap": Technique(
        "logits are 23 sigmoid((z + 5) / 7.5) instead of 30 sigmoid(z / 7.5) (record 54)",
        model=f"{_OPTIONS}.cap:set_asymmetric_cap",
    ),
    "decay_schedule": Technique(
        "what weight decay follows from step to step: the learning rate, its square (record 43), or nothing",
        "rate",
        schedule=f"{_SCHEDULE}:set_decay_schedule",
        choices=("rate", "squared", "constant"),
        on={"decay_schedule": "squared", "weight_decay": 0.1},
    ),
}


def with_technique_settings(config: C) -> C:
    """Give a class of settings, which is to be a dataclass, those of TECHNIQUES."""
    return with_settings(config, (field for name, entry in TECHNIQUES.items() for field in entry.fields(name)))


def with_techniques(part: Literal["model", "schedule", "optimizers"], of_run: T, cfg: Any) -> T:
    """`of_run`, a run's `part`, with what the techniques add that the settings `cfg` ask for."""
    for name, technique in TECHNIQUES.items():
        add, value = getattr(technique, part), getattr(cfg, name, technique.off)
        if add and value != technique.off:
            more = {key: getattr(cfg, key) for key in technique.settings}
            of_run = (resolve(add) if isinstance(add, str) else add)(of_run, value, **more)
    return of_run
