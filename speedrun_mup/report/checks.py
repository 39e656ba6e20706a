"""Coordinate checks in a report, from the JSON that `CoordCheck.to_json` writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from speedrun_mup.core.errors import ConfigError, in_a_line
from speedrun_mup.files import printable, read_bytes
from speedrun_mup.report.contents import ARM_COLORS, GREY, Axis, Choice, Color, Figure, Key, Mark, Panel, Section, Table
from speedrun_mup.report.figures import signed

ROLE_COLORS: dict[str | None, Color] = {
    **dict(zip(("input", "hidden", "output", "scalar"), ARM_COLORS)),
    **dict(zip(("outside", "branch", "writes", "skip", "stream"), ARM_COLORS)),
    None: GREY,
}


_EXPECTED = {
    "widths": "Flat means that the rule scales as muP says.",
    "layers": "Flat means that each layer learns as much at any depth; what it writes into the stream is to fall as 1 / layers.",
}


def _axis(check: dict[str, Any]) -> str:
    """What sizes are called; checks of earlier editions are of widths."""
    return "layers" if check.get("axis") == "n_layer" else "widths"


def check_section(path: Path, number: int) -> Section:
    """What one check found. Raises ConfigError for a file that `speedrun-mup coord-check` did not write."""
    try:
        check = json.loads(read_bytes(path))
        figure, tables = check_figure(check, number), [_slopes(check), _controls(check)]
        arm, verdict = check["arm"], check["verdict"]
        text = [
            f"{path.parent.name}: {verdict}. Model {arm['name']}, {_axis(check)} {', '.join(map(str, arm['widths']))}; "
            f"{check['steps']} updates; seeds: {arm['seeds']}.",
            *check["reasons"],
        ]
    except Exception as fault:  # whatever numbers and types a stranger's file holds
        why = printable(in_a_line(fault))
        raise ConfigError(
            f"{printable(path)} is not a valid result of a coordinate check ({why}); give a coord-check.json"
        ) from None
    return Section(f"Coordinate check: {verdict}", text, [figure], [table for table in tables if table.rows])


def check_figure(check: dict[str, Any], number: int = 0) -> Figure:
    """Updates, start or activations against width, a panel for the checked arm and one for each control.

    Args:
        check: what `CoordCheck.to_json` holds.
        number: of the check within a report.
    """
    last, first = check["steps"], min(check["thresholds"]["first_step"], check["steps"])
    shown = [(f"updates, t = {t}", "effect", t) for t in range(last, first - 1, -1)]
    shown += [("W_0 x_0, t = 0", "effect", 0), (f"activations, t = {last}", "activation", last)]
    panels = [Panel(f"checked: {check['arm']['name']}\n{check['verdict']}", _marks(check["arm"], shown))]
    for control in check["controls"]:
        whose = f"{control['role'] or 'all'} {signed(control['slope'])}"
        panels.append(Panel(f"control {control['arm']['name']}\nslope of {whose}", _marks(control["arm"], shown)))
    roles = {series["role"] for series in check["arm"]["series"] if series["quantity"] in ("effect", "activation")}
    keys = [Key(role or "modules", "line", color, marked=True) for role, color in ROLE_COLORS.items() if role in roles]
    caption = (
        f"Coordinate check: what all updates so far do to the present input, a line per parameter. {_EXPECTED[_axis(check)]} "
        "Next to it the controls, each with one rule wrong on purpose and the slope that this gives."
    )
    name = "coord-check" if number == 0 else f"coord-check-{number + 1}"
    x = Axis(_axis(check).replace("widths", "width"), "log2", ticks=check["arm"]["widths"])
    options = [label for label, _, _ in shown]
    choice = Choice("what", "shown", options, printed=[options[0], *options[-2:]])
    return Figure(name, caption, x, Axis("rms", "log"), panels, keys, choice, size=(1.9, 2.1))


def _marks(arm: dict[str, Any], shown: list[tuple[str, str, int]]) -> list[Mark]:
    marks = []
    for label, quantity, t in shown:
        for series in arm["series"]:
            pairs = [(w, row[t]) for w, row in zip(arm["widths"], series["values"]) if row[t]]
            if series["quantity"] == quantity and pairs:
                widths, values = zip(*pairs)
                color = ROLE_COLORS[series["role"]]
                name = f"{series['name']} ({series['role'] or 'module'})"
                marks.append(
                    Mark("line", widths, values, color, name, {"what": label}, size=0.9, opacity=0.75, marked=True)
                )
    return marks


def _slopes(check: dict[str, Any]) -> Table:
    """The judged slopes, a row per kind of tensor."""
    rows = []
    for row in check["arm"]["rows"]:
        if row["verdict"]:
            predicted = "" if row["predicted"] is None else signed(row["predicted"])
            kind = [row["kind"], row["role"] or "module", row["quantity"]]
            rows.append([*kind, signed(row["slope"]), predicted, row["verdict"]])
    return Table(["parameter", "role", "quantity", "slope", "predicted", "verdict"], rows)


def _controls(check: dict[str, Any]) -> Table:
    rows = [
        [
            control["arm"]["name"],
            control["role"] or "all",
            signed(control["slope"]),
            signed(control["predicted"]),
            "detected" if control["seen"] else "NOT DETECTED",
        ]
        for control in check["controls"]
    ]
    return Table(["control", "updates of", "slope", "predicted", "outcome"], rows)
