"""Which column of a table means what: by its own name, by names of other programs, or as the user says."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from speedrun_mup.files import printable
from speedrun_mup.transfer.axes import RATE, SIZES, Axes
from speedrun_mup.transfer.points import TransferError
from speedrun_mup.transfer.sources.logs import PEAK, STEPS, Rows

OPTIONAL = ("seed", "arm")
# How other programs call them: a name that is or ends with one of these is a candidate.
ALIKE = {
    RATE: ("lr", "learning_rate", "max_lr", "peak_lr", "base_lr", "lr_scale"),
    "loss": ("loss", "nll", "cross_entropy", "perplexity", "ppl", "bpb", "bpc", "bits_per_byte"),
    "seed": ("seed", "random_seed", "rng_seed"),
    "arm": ("arm", "parametrization", "parameterization", "method"),
}
NOT_NATS = re.compile("perplexity|ppl|bpb|bpc|bits")
CHOSEN = ("loss", "nll", "cross_entropy")  # what is taken for a loss unasked
MOST_COLUMNS = 10_000


@dataclass(frozen=True)
class Columns:
    """Role -> number of its column, and a note on those that were found by another name. An axis's role is its name."""

    place: dict[str, int]
    notes: tuple[str, ...]


def find_columns(path: Path, rows: Rows, axes: Axes, called: Mapping[str, str], more: Sequence[str]) -> Columns:
    """The columns of a table.

    One that has a role's own name has that role; of a log's curves, which have other programs' names, this does not hold for
    the loss. Else the name is one that is known for the role; of several none is taken, unless they hold the same.

    Args:
        path: For messages.
        rows: The table.
        axes: What was scaled, and what was tuned.
        called: Role -> name of its column, as the user says.
        more: Further sizes.

    Raises:
        TransferError: A column is missing or ambiguous.
    """
    names = [name.strip().lower() for name in rows.header]
    if len(names) > MOST_COLUMNS:
        raise TransferError(f"{printable(path)}: {len(names):,} columns; give a table of at most {MOST_COLUMNS:,}")
    shown = printable(",".join(names), 120)
    roles = (axes.size, *more, axes.hyperparameter, "seed", "loss", "arm")
    called = {(axes.hyperparameter if role == RATE else role): name for role, name in called.items()}
    if unknown := [role for role in called if role not in (*roles, "step")]:
        raise TransferError(
            f"columns {printable(unknown[0], 40)}=...: give {', '.join(roles)}, each the name of a column"
        )
    place, absent, chosen = dict[str, int](), list[str](), dict[str, str]()
    for role in (*roles, "step") if "step" in called else roles:
        name = called.get(role, role).strip().lower()
        found = [number for number, other in enumerate(names) if other == name and _may_be(role, number, rows, called)]
        if len(found) > 1:
            raise TransferError(f"{printable(path)}: more than one column {name!r} in the header ({shown}); drop one")
        if not found and role not in called:
            found = _by_other_names(role, names, rows)
            chosen |= {role: f"{role} is the column {printable(names[found[0]], 60)}"} if len(found) == 1 else {}
        if len(found) == 1:
            place[role] = found[0]
        elif role in called:
            raise TransferError(f"{printable(path)}: no column {printable(name, 60)} in the header ({shown})")
        elif role not in OPTIONAL or found:
            absent.append(role)
    if absent:
        absent = [role for role in roles if role in absent or role in chosen]  # one line to type for all of them
        missing = absent if len(names) > 1 else roles[:-1]
        raise TransferError(
            f"{printable(path)}: no column {', '.join(missing)} in the header ({shown}); {_advice(absent, names, rows)}"
        )
    if len(set(place.values())) < len(place):
        raise TransferError(f"{printable(path)}: one column for two meanings; give each of {', '.join(place)} its own")
    return Columns(place, (f"{', '.join(chosen.values())}; --columns says otherwise",) if chosen else ())


def _may_be(role: str, number: int, rows: Rows, called: Mapping[str, str]) -> bool:
    """Whether a column with just the name can have the role: in logs a setting is no curve, and a loss needs to be told."""
    return rows.curves is None or role in called or (number not in rows.curves and role != "loss")


def _by_other_names(role: str, names: Sequence[str], rows: Rows) -> list[int]:
    """The columns that may be meant by a role, as far as names say. Of several that hold the same the first.

    A setting has a known name, else one within a group of settings, such as model/n_embd, else it is the largest of a rate
    that was logged. A loss is whatever is called so; and what tells arms apart is for the user to say.
    """
    if role == "arm":
        return []
    kinds = (*(CHOSEN if role == "loss" else _kinds(role)), *rows.also.get(role, ()))
    plain = {n: _plain(names[n]) for n in _allowed(role, names, rows)}
    if role == "loss":
        ranks = [[n for n, name in plain.items() if _is_kind(name, names[n], kinds)]]
    else:
        inner = {n: _plain(re.split("[/.:]", names[n])[-1].removeprefix("params_")) for n in plain}
        ranks = [[n for n, name in plain.items() if name in kinds]]
        ranks.append([n for n, name in inner.items() if name in kinds and not names[n].startswith(PEAK)])
        ranks.append([n for n, name in inner.items() if name in kinds and names[n].startswith(PEAK)])
    filled = next((some for rank in ranks if (some := _filled(rank, rows))), [])
    return filled[:1] if len(filled) > 1 and _same(filled, rows) else filled


def _allowed(role: str, names: Sequence[str], rows: Rows) -> list[int]:
    """The columns that can have a role: of logs a loss is a curve, and everything else is none."""
    return [n for n in range(len(names)) if rows.curves is None or (n in rows.curves) == (role == "loss")]


def _is_kind(plain: str, name: str, kinds: Sequence[str]) -> bool:
    """Whether a name is or ends with one of `kinds`, or begins with one as loss/val does."""
    ends = any(plain == kind or plain.endswith(f"_{kind}") for kind in kinds)
    return bool(plain) and (ends or ("/" in name and _plain(name.split("/")[0]) in kinds))


def _kinds(role: str) -> tuple[str, ...]:
    return (role, *SIZES[role].also) if role in SIZES else ALIKE.get(role, (role,))


def _plain(name: str) -> str:
    return "" if "," in name or "=" in name else re.sub("[^a-z0-9]+", "_", name).strip("_")


def _filled(numbers: Sequence[int], rows: Rows) -> list[int]:
    """Those columns that say anything in some row; a lone one may be empty, which is said where it is read."""
    if len(numbers) < 2:
        return list(numbers)
    said = {n for _, cells in rows.rows for n in numbers if n < len(cells) and _value(cells[n]) != ""}
    return [n for n in numbers if n in said]


def _same(numbers: Sequence[int], rows: Rows) -> bool:
    return all(len({_value(cells[n]) for n in numbers if n < len(cells)}) == 1 for _, cells in rows.rows)


def _value(cell: str) -> str | float:
    """A cell in one spelling; "" if it says nothing."""
    text = cell.strip().lower()
    try:
        return float(text)
    except ValueError:
        return "" if text in ("none", "null") else text


def step_column(rows: Rows, called: Mapping[str, str]) -> int | None:
    """The column of a table that counts the steps of a run, if it has one row for each of them."""
    names = [name.strip().lower() for name in rows.header]
    wanted = [called["step"].strip().lower()] if "step" in called else STEPS
    return next((names.index(name) for name in wanted if name in names), None)


def units(column: str) -> Iterator[str]:
    """A line where the name of the loss says that it is not in nats."""
    if NOT_NATS.search(column.lower()):
        name = printable(column.strip(), 40)
        yield f"the loss is {name}: what is said in nats, bounds and sigma too, is in its unit; better give its logarithm in nats"


def _advice(absent: Sequence[str], names: Sequence[str], rows: Rows) -> str:
    """Which --columns to give instead, as far as names show it."""
    if len(names) <= 1:
        return "separate columns with commas, semicolons or tabs"
    found = {role: _candidates(role, names, rows) for role in absent}
    if not any(found.values()):
        return (
            "name each once, or say what they are called, such as --columns width=n_embd,lr=learning_rate,loss=val/loss"
        )
    given = ",".join(f"{role}={printable(some[0], 60) if some else '...'}" for role, some in found.items())
    choices = [
        f"; {role} may be any of {', '.join(printable(name, 60) for name in some[:6])}"
        for role, some in found.items()
        if len(some) > 1
    ]
    return f"give --columns {given}" + "".join(choices)


def _candidates(role: str, names: Sequence[str], rows: Rows) -> list[str]:
    """Names that may be meant by a role, the likeliest first: validation before training, the shortest before longer ones."""

    def worth(name: str) -> tuple[bool, int]:
        return not re.search("val|eval|test", name), len(name)

    kinds = (*_kinds(role), *rows.also.get(role, ()))
    some = [names[n] for n in _allowed(role, names, rows)]
    return sorted((name for name in some if _is_kind(_plain(name), name, kinds)), key=worth)
