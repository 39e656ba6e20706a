"""Which small runs a big one needs, what they cost, what learning rate and loss they promise, and by how much they miss.

    plan = make_plan(target, out, engine, budget_minutes=30)    # widths, seeds, cost; writes plan.json
    run_plan(plan, out, engine)
    print(predict(out).summary())                               # learning rate and loss, with intervals
    print(compare(out, run_folder).summary())                   # predicted against measured

The proxies train for as many steps on as many tokens as the target: it is width that learning rates transfer over. A plan
over several sizes makes them smaller in depth, batch and tokens too, and measures what that does (`joint`).

`speedrun_mup.plan(...)` is `functions.plan`.
"""

from speedrun_mup.callables import make_callable
from speedrun_mup.plan.design import Budget, NoPlanFits, Plan, choose_plan, design_table, expected_lr_error
from speedrun_mup.plan.folder import PLAN, Prediction, load_plan, make_plan, read_plan, run_plan, save_plan
from speedrun_mup.plan.joint import JointPlan, choose_joint_plan, whole_target
from speedrun_mup.plan.joint_folder import (
    JointComparison,
    JointPrediction,
    compare_joint,
    is_joint,
    joint_surface,
    load_joint_plan,
    predict_joint,
    read_joint_plan,
    read_joint_prediction,
    recommended_config,
    run_joint_plan,
    save_joint_plan,
)
from speedrun_mup.plan.known import published_priors
from speedrun_mup.plan.prediction import Comparison, compare, predict

make_callable(__name__)

__all__ = [
    "PLAN",
    "Budget",
    "Comparison",
    "JointComparison",
    "JointPlan",
    "JointPrediction",
    "NoPlanFits",
    "Plan",
    "Prediction",
    "choose_joint_plan",
    "choose_plan",
    "compare",
    "compare_joint",
    "design_table",
    "expected_lr_error",
    "is_joint",
    "joint_surface",
    "load_joint_plan",
    "load_plan",
    "make_plan",
    "predict",
    "predict_joint",
    "published_priors",
    "read_joint_plan",
    "read_joint_prediction",
    "read_plan",
    "recommended_config",
    "run_joint_plan",
    "run_plan",
    "save_joint_plan",
    "save_plan",
    "whole_target",
]
