"""Rules of a run for batch and tokens: their numbers, their limits, and what optimizers get of them."""

import dataclasses
import math

import pytest
from torch import nn

from speedrun_mup.config import make_config
from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.mup import PARAMETRIZATIONS, Role, Update
from speedrun_mup.core.mup.run_rules import BATCH_RULES, NO_RUN_SCALING, TOKENS_RULES, RunFactors, RunScaling
from speedrun_mup.core.optimizers import Tuned, param_groups
from speedrun_mup.scaling import SCALING_SETTINGS, rules_in_force, run_scaling

ADAM, MUON = Update.ENTRYWISE, Update.SPECTRAL
RULES = [*BATCH_RULES.values(), *TOKENS_RULES.values()]


def of(rule, m=4.0):
    return RunScaling(**{rule.axis: rule, f"m_{rule.axis}": m})


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.axis}-{rule.name}")
def test_at_base_every_factor_is_exactly_one(rule):
    for kind in Update:
        assert of(rule, 1.0).factors(kind) == NO_RUN_SCALING.factors(kind) == RunFactors()
        assert of(rule, 1.0).factors(kind).beta(1, 0.95) == 0.95


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: f"{rule.axis}-{rule.name}")
def test_every_rule_says_where_it_is_from(rule):
    assert rule.source and rule.grade[0] in "ABCD"


# (rule, m) -> learning rate, eps, weight decay, beta1 of 0.9, beta2 of 0.99, all of Adam
NUMBERS = {
    ("batch", "marin", 4.0): (2.0, 1.0, 2.0, 0.9, 0.99**4),
    ("batch", "completedp", 4.0): (2.0, 0.5, 2.0, 0.6, 0.96),
    ("batch", "completedp", 0.25): (0.5, 2.0, 0.5, 0.975, 0.9975),
    ("batch", "none", 4.0): (1.0, 1.0, 1.0, 0.9, 0.99),
    ("tokens", "bjorck", 4.0): (4**-0.32, 1.0, 0.25 / 4**-0.32, 0.9, 0.99),
    ("tokens", "completedp", 4.0): (0.5, 2.0, 0.5, 0.975, 0.9975),
    ("tokens", "steplaw", 4.0): (4**0.02, 1.0, 0.25 / 4**0.02, 0.9, 0.99),
    ("tokens", "nanochat", 4.0): (4**0.19, 1.0, 0.25 / 4**0.19, 0.9, 0.99),
}


@pytest.mark.parametrize("case", NUMBERS, ids=str)
def test_the_numbers_of_a_rule_for_adam(case):
    axis, name, m = case
    factors = of({"batch": BATCH_RULES, "tokens": TOKENS_RULES}[axis][name], m).factors(ADAM)
    found = (factors.lr, factors.eps, factors.weight_decay, factors.beta(0, 0.9), factors.beta(1, 0.99))
    assert found == pytest.approx(NUMBERS[case])


def test_muon_keeps_its_memory():
    factors = of(BATCH_RULES["completedp"]).factors(MUON)
    assert factors.lr == 2.0 and factors.eps == 1.0 and factors.beta(1, 0.99) == 0.99


def test_batch_and_tokens_together_leave_the_memory_where_they_cancel():
    """Four times the batch and four times the tokens are as many steps: the same rate, the same memory in steps."""
    both = RunScaling(BATCH_RULES["completedp"], TOKENS_RULES["completedp"], 4.0, 4.0)
    assert both.factors(ADAM).beta(0, 0.8) == 0.8  # although the batch alone would take it out of [0, 1)
    assert both.factors(ADAM).lr == both.factors(ADAM).eps == both.factors(ADAM).weight_decay == 1
    assert both.lr_factors(ADAM) == {"batch": 2.0, "tokens": 0.5}


def test_a_beta_that_leaves_its_range_is_an_error():
    factors = of(BATCH_RULES["completedp"], 8.0).factors(ADAM)
    says = (
        r"^beta1=0.8 would become -0.6 by batch rule completedp at 8 times base, and must be in \[0, 1\); choose a rule that "
        r"keeps memory in steps or tokens \(--batch-rule marin, --tokens-rule bjorck\), or a base nearer to this run$"
    )
    with pytest.raises(ConfigError, match=says):
        factors.beta(0, 0.8)
    assert factors.beta(1, 0.95) == pytest.approx(0.6)
    assert 0 <= of(BATCH_RULES["marin"], 2.0**20).factors(ADAM).beta(1, 0.95) < 1  # memory in tokens never leaves


def test_a_kind_of_update_that_a_rule_does_not_know_is_an_error():
    with pytest.raises(
        ConfigError, match="tokens rule steplaw says nothing of spectral updates, only of entrywise ones"
    ):
        of(TOKENS_RULES["steplaw"]).factors(MUON)
    assert of(TOKENS_RULES["steplaw"].changed(None, -0.3)).factors(MUON).lr == 4**-0.3
    assert of(TOKENS_RULES["steplaw"].changed(-0.5, None)).factors(Update.GRADIENT).lr == 0.5


def test_exponents_of_the_user_s_own():
    rule = BATCH_RULES["marin"].changed(1.0, 0.25)
    assert (of(rule).factors(ADAM).lr, of(rule).factors(MUON).lr) == (4.0, 4**0.25)
    assert of(rule).factors(ADAM).weight_decay == 1.0  # rate times decay goes as the batch over the tokens
    assert of(BATCH_RULES["none"].changed(0.5, None)).factors(ADAM).lr == 2.0


def groups_of(run, **tuned):
    layer = nn.Linear(8, 8, bias=False)
    mup.declare(layer, "weight", Role.HIDDEN, (8, 8), "out in", "matrix")
    values = {"optimizer": "adam", "lr": 0.1, "weight_decay": 0.5, "eps": 1e-8, **tuned}
    ((group,),) = param_groups(layer, PARAMETRIZATIONS["mup"], {"matrix": Tuned(**values)}, run).values()
    return {key: value for key, value in group.items() if key != "params"}


def test_what_an_optimizer_gets():
    assert groups_of(NO_RUN_SCALING) == groups_of(of(BATCH_RULES["completedp"], 1.0))
    marin = groups_of(of(BATCH_RULES["marin"]))  # betas are the optimizer's own: 0.8, 0.95
    assert marin["lr"] == marin["initial_lr"] == 0.2 and marin["betas"] == (0.8, 0.95**4) and marin["eps"] == 1e-8
    assert marin["weight_decay"] == 1.0
    given = groups_of(of(BATCH_RULES["completedp"]), betas=(0.9, None))
    assert given["betas"] == pytest.approx((0.6, 0.8)) and given["eps"] == 0.5e-8
    assert "betas" not in groups_of(of(TOKENS_RULES["bjorck"]))
    muon = groups_of(of(BATCH_RULES["marin"]), optimizer="muon", eps=None)
    assert muon["lr"] == 0.2 and "betas" not in muon


ASKED = {  # settings -> rule and base of (batch, tokens), under the laptop preset: 2,048 tokens a step, 409,600 in all
    (): ("none", None, "none", None),
    (("base_batch_tokens", 512),): ("marin", 512, "none", None),
    (("batch_rule", "completedp"),): ("completedp", 2048, "none", None),
    (("base_tokens", 10**6),): ("none", None, "bjorck", 10**6),
    (("tokens_rule", "completedp"), ("iterations", 800)): ("none", None, "completedp", 409_600),
    (("base_tokens", 10**6), ("tokens_rule", "none")): ("none", None, "none", 10**6),
}


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_a_base_or_a_rule_switches_an_axis_on(asked):
    cfg = make_config("laptop", dict(asked))
    assert (cfg.batch_rule, cfg.base_batch_tokens, cfg.tokens_rule, cfg.base_tokens) == ASKED[asked]
    assert ("batch:" in rules_in_force(cfg), "; tokens:" in rules_in_force(cfg)) == (
        cfg.base_batch_tokens is not None,
        cfg.base_tokens is not None,
    )


def test_how_far_a_run_is_from_its_bases():
    cfg = make_config("laptop", {"base_batch_tokens": 512, "base_tokens": 102_400, "batch_lr_exponent": 0.4})
    scaling = run_scaling(cfg)
    assert (scaling.m_batch, scaling.m_tokens) == (4.0, 4.0) and scaling.lr_factors(MUON)["batch"] == 4**0.4
    assert run_scaling(make_config("laptop", {})) == NO_RUN_SCALING
    grown = make_config("laptop", {"batch_schedule": "1/2:1,1/2:2", "base_tokens": 409_600, "base_batch_tokens": 2048})
    assert run_scaling(grown).m_tokens == 1.5 and run_scaling(grown).m_batch == 1  # its first batch is what grows


def test_an_exponent_without_a_base_is_refused():
    for name in SCALING_SETTINGS:
        if name.endswith("_exponent"):
            with pytest.raises(ConfigError, match=f"{name} has no effect without base_"):
                make_config("laptop", {name: 0.3})


@pytest.mark.slow
@pytest.mark.parametrize("more", [{}, {"matrix_optimizer": "adam", "matrix_lr": 0.004}])
def test_a_run_trains_with_all_rules(tiny, more):
    from speedrun_mup.training import train

    scaled = tiny(
        n_layer=4, base_layers=2, base_batch_tokens=256, base_tokens=1024, iterations=4, val_every=0, save=False, **more
    )
    plain = dataclasses.replace(scaled, base_layers=None, base_batch_tokens=None, base_tokens=None)
    ruled, unruled = train(scaled), train(plain)
    assert math.isfinite(ruled.val_loss) and ruled.val_loss != unruled.val_loss
    at_base = {"base_layers": 4, "base_batch_tokens": 512, "base_tokens": 2048}
    based = dataclasses.replace(scaled, **at_base, depth_rule="completep", batch_rule="marin", tokens_rule="bjorck")
    assert train(based).val_loss == unruled.val_loss
