"""Break runs on purpose, as often as you like: every promise of docs/reliability.md has a command.

python benchmarks/reliability.py list                        what there is
python benchmarks/reliability.py G1 --count 200 --seed 1     200 SIGKILLs, at other moments than --seed 0
python benchmarks/reliability.py all --publish               every goal with its own count -> results/reliability.md
python benchmarks/reliability.py matrix --publish            all rows of the fault matrix -> results/fault_matrix.md
python benchmarks/reliability.py matrix --count 50           50 times in a row, each with its own seed: nothing may flake
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from common import circumstances, commit, publish, quantile, table  # noqa: E402
from faults.matrix import CHECKPOINT, CONFIG, DATA, HERE, MATRIX, SHARDS, TRAINING, UTILS  # noqa: E402

GOALS_FILE = "tests/faults/test_goals.py"


@dataclass(frozen=True)
class Goal:
    """A promise, the tests that try to break it, and how often they do for a published result (0: as they stand)."""

    promise: str
    tests: tuple[str, ...]
    count: int = 0


GOALS = {
    "G1": Goal(
        "SIGKILL at random moments of training, one rank: losses and final weights bitwise equal",
        (f"{TRAINING}::test_sigkill_at_random_moments_changes_nothing", f"{CHECKPOINT}::test_random_kills"),
        200,
    ),
    "G2": Goal(
        "death before every file-system call of save, purge and cleaning up", (f"{CHECKPOINT}::test_every_crash_point",)
    ),
    "G3": Goal(
        "killed attempts on 1, 2 and 4 ranks, another number at each resume: bitwise equal with --deterministic",
        (f"{GOALS_FILE}::test_killed_lives_over_world_sizes",),
        100,
    ),
    "G4": Goal(
        "single bit flips: none loaded, and the checkpoint before is taken by itself (G5)",
        (f"{CHECKPOINT}::test_flipped_bits_are_never_loaded",),
        1000,
    ),
    "G5": Goal("truncations, as G4", (f"{CHECKPOINT}::test_truncated_longer_and_missing_files_are_never_loaded",), 200),
    "G6": Goal(
        "damaged shards are refused, also under python -O",
        tuple(
            f"{SHARDS}::{test}"
            for test in ("test_fuzzed_files", "test_bad_file_is_refused", "test_checks_survive_python_minus_o")
        ),
    ),
    "G7": Goal(
        "the tokens of a step do not depend on the ranks", (f"{DATA}::test_tokens_do_not_depend_on_the_world_size",)
    ),
    "G8": Goal(
        "any step can be resumed", (f"{DATA}::test_any_step_can_be_resumed", f"{DATA}::test_usage_counts_every_token")
    ),
    "G9": Goal(
        "signals at random moments: bitwise, each life over in 25 s",
        (f"{HERE}::test_row_41_signals_at_random_times",),
        30,
    ),
    "G10": Goal(
        "a rank that dies or hangs is named, and the others end",
        (f"{UTILS}::test_the_others_name_a_rank_that_is_lost",),
    ),
    "G11": Goal(
        "torchrun restarts after a SIGKILL and resumes, bitwise, on gloo",
        (f"{HERE}::test_row_47_torchrun_restarts_after_a_death",),
        10,
    ),
    "G12": Goal("torchrun killed: no orphans, and a checkpoint", (f"{HERE}::test_row_45_torchrun_is_killed",), 20),
    "G13": Goal(
        "NaN or infinity in any entry, parameter, rank and step: stopped before the update",
        (f"{GOALS_FILE}::test_a_nan_anywhere_stops_before_the_update",),
        50,
    ),
    "G15": Goal(
        "a disk fault at every call of a save",
        (
            f"{CHECKPOINT}::test_a_disk_fault_at_any_call_spares_the_earlier_ones",
            f"{HERE}::test_row_04_training_outlives_a_full_disk",
        ),
    ),
    "G17": Goal(
        "bad settings: one line and exit code 2",
        (f"{CONFIG}::test_bad_flags_cost_one_clear_line", f"{CONFIG}::test_a_corrupt_config_is_one_clear_error"),
    ),
    "G18": Goal(
        "no code in a file is executed, nothing is written outside",
        (
            f"{CHECKPOINT}::test_no_planted_code_runs",
            f"{CHECKPOINT}::test_the_package_never_unpickles",
            f"{HERE}::test_row_53_names_that_lead_out",
        ),
    ),
    "G19": Goal(
        "checkpoints of every released format load and resume",
        (f"{CHECKPOINT}::test_schema_1_stays_readable", f"{HERE}::test_row_18_a_checkpoint_of_version_0_1_0_resumes"),
    ),
    "G20": Goal(
        "one result per seed, in float32 and bfloat16; on 1, 2 and 4 ranks with --deterministic; within 1e-4 without",
        (
            f"{GOALS_FILE}::test_this_machine_gives_the_same_bits_every_time",
            f"{GOALS_FILE}::test_without_strict_ranks_change_little",
            f"{TRAINING}::test_a_strict_run_is_the_same_to_the_bit_on_any_number_of_ranks",
        ),
    ),
    "fuzz": Goal(
        "mutated checkpoint and config files: one clear error, or what the file says",
        (f"{GOALS_FILE}::test_fuzzed_checkpoints", f"{GOALS_FILE}::test_fuzzed_configs"),
        1000,
    ),
}


def run_tests(tests: Iterable[str], count: int, seed: int, workers: int = 1) -> tuple[dict[str, list[str]], float]:
    """{test without parameters: outcome of each of its cases} and the seconds it all took."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "RELIABILITY_SEED": str(seed)}
    environment |= {"RELIABILITY_COUNT": str(count)} if count else {}
    with TemporaryDirectory() as folder:
        report, began = Path(folder, "report.xml"), time.perf_counter()
        arguments = ["-q", "-p", "no:cacheprovider", f"--junitxml={report}", *dict.fromkeys(tests)]
        arguments += ["-n", str(workers), "--dist=worksteal"] if workers > 1 else []
        subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT, env=environment)
        took = time.perf_counter() - began
        outcomes: dict[str, list[str]] = {}
        for case in ET.parse(report).iter("testcase"):
            file = case.get("classname", "").replace(".", "/") + ".py"
            found = [child.tag for child in case if child.tag in ("failure", "error", "skipped")]
            outcomes.setdefault(f"{file}::{case.get('name', '').partition('[')[0]}", []).append(
                (found or ["passed"])[0]
            )
    return outcomes, took


def verdict(outcomes: dict[str, list[str]], tests: Sequence[str]) -> str:
    """passed (n), or how many of the cases did not, and why."""
    cases = [outcome for test in tests for outcome in outcomes.get(test, ["not run"])]
    odd = {kind: cases.count(kind) for kind in cases if kind != "passed"}
    return f"passed ({len(cases)})" if not odd else ", ".join(f"{n} of {len(cases)} {kind}" for kind, n in odd.items())


def run_goals(names: Sequence[str], count: int | None, seed: int) -> Iterator[tuple[str, bool]]:
    """A table of goals with their outcome, and whether all held; again after each goal."""
    rows, good = [], True
    for name in names:
        goal = GOALS[name]
        times = goal.count and (count or goal.count)
        outcomes, took = run_tests(goal.tests, times, seed)
        told = verdict(outcomes, goal.tests)
        good &= told.startswith("passed")
        rows.append((name, goal.promise, times or "all", told, f"{took:,.0f} s"))
        text = table(("goal", "promise", "faults", "outcome (test cases)", "took"), rows)
        yield f"{text}\n\n{len(rows)} of {len(names)} goals were run, with seed {seed}.", good


def run_matrix(count: int, seed: int, workers: int, first: int) -> Iterator[tuple[str, bool]]:
    """A table of the rows from `first` on with their outcome over `count` runs, and whether all held; again after each run."""
    chosen = [row for row in MATRIX if row.number >= first]
    tests = list(dict.fromkeys(test for row in chosen for test in row.tests))
    cases, times, bad = dict[str, list[str]](), list[float](), dict[str, list[int]]()
    for run in range(count):
        outcomes, took = run_tests(tests, 0, seed + run, workers)
        times.append(took)
        for test in tests:
            found = outcomes.get(test, ["not run"])
            cases.setdefault(test, []).extend(found)
            if set(found) != {"passed"}:
                bad.setdefault(test, []).append(seed + run)
        rows = [
            (
                row.number,
                row.fault,
                row.expected,
                "<br>".join(test.rpartition("::")[2] for test in row.tests),
                verdict(cases, row.tests),
                row.needs,
            )
            for row in chosen
        ]
        text = table(("row", "fault", "what must happen", "tests", "outcome (cases)", "needs"), rows)
        runs = f"{len(times)} of {count} runs in a row, seeds {seed} to {seed + run}, {workers} tests at a time"
        spread = f"{quantile(times, 0.5):,.0f} s (median; {min(times):,.0f} to {max(times):,.0f})"
        text += f"\n\n{runs}: {len(tests)} tests took {spread} a run.\n\n"
        text += "".join(
            f"- {test.rpartition('::')[2]} did not pass in {len(seeds)} of {len(times)} runs (seeds {seeds})\n"
            for test, seeds in bad.items()
        )
        yield text + ("" if bad else "Every test passed in every run."), not bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["list", "all", "matrix", *GOALS])
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places; %(default)s")
    parser.add_argument(
        "--count", type=int, help="faults to inject (default: each goal's own), or runs of the matrix (1)"
    )
    parser.add_argument(
        "--workers", type=int, default=3, help="tests of the matrix at a time; %(default)s, many only wait"
    )
    parser.add_argument("--from", type=int, default=1, dest="first", metavar="ROW", help="of the matrix; %(default)s")
    parser.add_argument("--publish", action="store_true", help="write results/")
    flags = parser.parse_args()
    if flags.what == "list":
        print(table(("goal", "promise", "faults"), [(name, g.promise, g.count or "all") for name, g in GOALS.items()]))
        return 0
    if flags.what == "matrix":
        name, title = "fault_matrix", "# The fault matrix"
        if flags.first > 1:  # beside the table of all rows, which it does not replace
            name, title = f"fault_matrix_from_{flags.first}", f"# The fault matrix, rows from {flags.first} on"
        outcomes = run_matrix(flags.count or 1, flags.seed, flags.workers, flags.first)
    else:
        name, title = "reliability", "# Promises under faults"
        chosen = list(GOALS) if flags.what == "all" else [flags.what]
        outcomes = run_goals(chosen, flags.count, flags.seed)
    code = 1
    commit()  # is asked once: what is tested is this, whatever is committed meanwhile
    for text, good in outcomes:  # each has all that was found so far: an interruption loses nothing
        if flags.publish:
            publish(name, [title, text, circumstances()])
        else:
            print(text)
        code = int(not good)
    return code


if __name__ == "__main__":
    sys.exit(main())
