"""What settings were called in the edition before, and what the hash of a run was made of when the first results were kept."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from speedrun_mup.core.errors import ConfigError


class Former(NamedTuple):
    """A flag, or name in a config.json, of the edition before.

    Attributes:
        setting: what it is called now; a flag that has no successor keeps its setting's name.
        values: what its values are now, if they were others.
    """

    setting: str
    values: Mapping[Any, Any] | None = None


# What the hash of a run was made of at first. A setting that came later counts where it is not at its default.
_FIRST_HASHED = (
    "width base_width parametrization n_layer head_dim block_size window_tokens iterations micro_batch_tokens micro_batches "
    "micro_batch seed strict on_nonfinite matrix_lr embed_lr head_lr scalar_lr lr_scale hidden_optimizer adam_beta1 adam_beta2 "
    "adam_eps scalar_eps weight_decay momentum momentum_start momentum_warmup cooldown lr_floor epochs val_tokens "
    "val_chunk_tokens dtype fp8"
)
FIRST_HASHED = frozenset(_FIRST_HASHED.split())
# Flags and names of the first edition. A config.json is read with them for good, a flag works for one release.
FORMER = {
    "pack": Former("micro_batches_per_forward"),
    "strict": Former("deterministic"),
    "micro_batch": Former("fit_memory", {"fixed": False, "auto": True}),
    "lr_floor": Former("final_lr_frac"),
    "hidden_optimizer": Former("matrix_optimizer"),
    "kernel_warmup": Former("kernel_warmup"),
    "momentum_start": Former("momentum_start"),
    "progress": Former("progress"),
    "save": Former("save"),
    "timeout_s": Former("timeout_s"),
}


def present_names(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Settings under the names, and with the values, that they have in this edition. ConfigError for one with two names."""
    values: dict[str, Any] = {}
    for name, value in saved.items():
        former = FORMER.get(name, Former(name))
        spelled = former.values or {}
        if former.setting in values:
            both = [other for other in saved if FORMER.get(other, Former(other)).setting == former.setting]
            raise ConfigError(f"{' and '.join(both)} are one setting, by its old and its new name; remove one of them")
        values[former.setting] = spelled.get(value, value) if isinstance(value, str) else value
    return values


def missing_settings(saved: Mapping[str, Any]) -> list[str]:
    """The settings that every edition saved with a run, of those that decide its result, and that `saved` has not."""
    now = {FORMER.get(name, Former(name)).setting for name in saved}
    return sorted({FORMER.get(name, Former(name)).setting for name in FIRST_HASHED} - now)


def first_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `present_names`."""
    first = dict(values)
    for name, former in FORMER.items():
        if name != former.setting and former.setting in first:
            now = first.pop(former.setting)
            first[name] = {is_: was for was, is_ in former.values.items()}[now] if former.values else now
    return first
