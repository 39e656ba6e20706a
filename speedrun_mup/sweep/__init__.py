"""Many small runs: arms x sizes x learning rates x seeds, in parallel, resumable, refined where it counts.

    sweep = Sweep(make_config("laptop", {"base_width": 64}), (64, 128, 256), pick_arms(["mup", "adam-sp"]))
    with closing(LocalEngine()) as engine:
        print(run_sweep(sweep, Path("sweeps/laptop"), engine).summary())

The id of a run is a hash of what it computes, and it is done once cells/<id>/result.json exists. Only the process that
holds the folder's lock writes there, so workers may die at any moment. The same command does what is missing; another one
with the same base adds to the folder. Runs differ in nothing but arm, size, seed and a factor 2**log2_factor on one
hyperparameter. A seed draws initialisation and, but in the record's own order, the order of the data, so that all runs of
one seed share it (common random numbers) and seeds differ in both.

`speedrun_mup.sweep(...)` is `functions.sweep`.
"""

from speedrun_mup.callables import make_callable
from speedrun_mup.sweep.any_sweep import AnyRun, AnySweep, grid_of, run_safely
from speedrun_mup.sweep.arms import ARMS, Arm, arm_name, check_given, pick_arms
from speedrun_mup.sweep.command.metric import Metric
from speedrun_mup.sweep.command.run import CommandRun, Program
from speedrun_mup.sweep.command.sweep import CommandSweep
from speedrun_mup.sweep.cost import CostModel
from speedrun_mup.sweep.engines import RAY_LISTENS, Engine, LocalEngine, RayEngine, cores, open_engine, visible_gpus
from speedrun_mup.sweep.folder import (
    axes_of,
    read_definition,
    read_results,
    size_names,
    trainer_of,
    tuned_flag,
    write_csv,
)
from speedrun_mup.sweep.function import FunctionRun, FunctionSweep
from speedrun_mup.sweep.grid import propose_points
from speedrun_mup.sweep.measure import measure_sweep, measure_sweep_surface, points_of, read_along, read_curves
from speedrun_mup.sweep.one_run import RunSpec, run_one
from speedrun_mup.sweep.result import Failure, RunResult
from speedrun_mup.sweep.run import SweepResult, run_sweep
from speedrun_mup.sweep.spec import Sweep, times

make_callable(__name__)

__all__ = [
    "ARMS",
    "RAY_LISTENS",
    "AnyRun",
    "AnySweep",
    "Arm",
    "CommandRun",
    "CommandSweep",
    "CostModel",
    "Engine",
    "Failure",
    "FunctionRun",
    "FunctionSweep",
    "LocalEngine",
    "Metric",
    "Program",
    "RayEngine",
    "RunResult",
    "RunSpec",
    "Sweep",
    "SweepResult",
    "arm_name",
    "axes_of",
    "check_given",
    "cores",
    "grid_of",
    "measure_sweep",
    "measure_sweep_surface",
    "open_engine",
    "pick_arms",
    "points_of",
    "propose_points",
    "read_along",
    "read_curves",
    "read_definition",
    "read_results",
    "run_one",
    "run_safely",
    "run_sweep",
    "size_names",
    "times",
    "trainer_of",
    "tuned_flag",
    "visible_gpus",
    "write_csv",
]
