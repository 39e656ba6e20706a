"""Many small runs: arms x widths x learning rates x seeds, in parallel, resumable, refined where it counts.

    sweep = Sweep(make_config("laptop", {"base_width": 64}), widths=(64, 128, 256), arms=pick_arms(["mup", "adam-sp"]))
    with closing(LocalEngine()) as engine:
        print(run_sweep(sweep, Path("sweeps/laptop"), engine).summary())

A cell is one run. Its id is a hash of what it computes, and it is done once cells/<id>/result.json exists. Only the
process that holds the folder's lock writes there, so workers may die at any moment. The same command does what is
missing; another one with the same base adds to the folder. Cells differ in nothing but arm, width, seed and a factor
2**octaves on one hyperparameter, the knob. A seed draws initialisation and, but in the record's own order, the order of
the data, so that all cells of one seed share it (common random numbers) and seeds differ in both.
"""

from speedrun_mup.sweep.cost import Pace
from speedrun_mup.sweep.engines import RAY_LISTENS, Engine, LocalEngine, RayEngine, cores, open_engine, visible_gpus
from speedrun_mup.sweep.folder import CELLS, COLUMNS, RESULT, read_definition, read_results, tuned_flag, write_csv
from speedrun_mup.sweep.grid import next_points
from speedrun_mup.sweep.measure import measure_sweep, points_of, training_curves
from speedrun_mup.sweep.one_run import attempt, run_cell
from speedrun_mup.sweep.result import CellResult, Failure
from speedrun_mup.sweep.run import SweepResult, run_sweep
from speedrun_mup.sweep.spec import ARMS, Arm, Cell, Sweep, arm_name, check_given, pick_arms

__all__ = [
    "ARMS",
    "CELLS",
    "COLUMNS",
    "RAY_LISTENS",
    "RESULT",
    "Arm",
    "Cell",
    "CellResult",
    "Engine",
    "Failure",
    "LocalEngine",
    "Pace",
    "RayEngine",
    "Sweep",
    "SweepResult",
    "arm_name",
    "attempt",
    "check_given",
    "cores",
    "measure_sweep",
    "next_points",
    "open_engine",
    "pick_arms",
    "points_of",
    "read_definition",
    "read_results",
    "run_cell",
    "run_sweep",
    "training_curves",
    "tuned_flag",
    "visible_gpus",
    "write_csv",
]
