"""Try odd inputs, made by rules, on every command, and count what ends badly.

python benchmarks/odd_inputs.py --count 400            a seeded sample
python benchmarks/odd_inputs.py --kind tables          one kind, all of it
python benchmarks/odd_inputs.py --publish              everything -> results/odd_inputs.md
"""

from __future__ import annotations

import argparse
import importlib
import shutil
import sys
import tempfile
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import circumstances, publish, table  # noqa: E402
from odd.harness import HEAVY, Case, attempt  # noqa: E402
from odd.inputs import Materials, everything  # noqa: E402


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=0, help="how many of them (default: all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", default="", help="only kinds that hold this text")
    parser.add_argument("--publish", action="store_true")
    arguments = parser.parse_args()
    for name in HEAVY:
        importlib.import_module(f"speedrun_mup.{name}")
    tried: Counter[str] = Counter()
    bad: list[tuple[Case, str]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        materials = Materials(folder, ROOT / "tests" / "data" / "transfer_sweep.csv")
        cases = [case for case in everything(materials, arguments.seed) if arguments.kind in case.kind]
        for number, case in enumerate(cases[: arguments.count or None]):
            place = folder / "cases" / str(number)
            outcome, fault = attempt(case, place)
            tried[case.kind] += 1
            if fault:
                bad.append((case, fault))
                print(f"{fault} ({outcome.code}): {case}\n    {outcome.said.strip()[-300:]!r}", flush=True)
            shutil.rmtree(place, ignore_errors=True)
    columns = {"tracebacks": "traceback", "hangs": "hang", "silent": "silent"}
    rows = []
    for kind, count in sorted(tried.items()):
        found = [fault for case, fault in bad if case.kind == kind]
        counts = [sum(fault.startswith(word) for fault in found) for word in columns.values()]
        rows.append([kind, count, *counts, len(found) - sum(counts)])
    rows.append(["all", *(sum(row[i] for row in rows) for i in range(1, 6))])
    text = table(["kind", "tried", *columns, "other"], rows)
    about = "Tracebacks, hangs, exit codes of 0 for inputs without a right answer, and what else a user should not see."
    if arguments.publish:
        publish("odd_inputs", ["# Odd inputs", about, text, circumstances()])
    else:
        print(text)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
