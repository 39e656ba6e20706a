"""muP for models that know nothing of it: roles, start, forward factors, and that base size changes nothing."""

import copy
import math
import warnings
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from speedrun_mup.core import mup
from speedrun_mup.core.mup import BaseShapeError
from tests.helpers.foreign_models import (
    GPT,
    VOCAB,
    GPTConfig,
    Recurrent,
    ResNet,
    llama_like,
    loss_of,
    tokens,
    wide_heads,
)


def roles_of(model):
    return {name: spec.role.value for name, _, spec in mup.named_specs(model)}


def rates(optimizer, model):
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}


def gpt(width, heads=4, **options):
    return GPT(GPTConfig(n_embd=width, n_head=heads, **options))


MODELS = {
    "gpt": gpt,
    "untied": partial(gpt, tied=False),
    "llama": llama_like,
    "experts": partial(llama_like, experts=True),
    "wide-heads": wide_heads,
    "lstm": Recurrent,
    "resnet": ResNet,
}


def batch_for(name):
    return torch.randn(2, 3, 6, 6) if name == "resnet" else tokens()


def run(name, model, optimizer):
    """Logits after two steps."""
    x = batch_for(name)
    for _ in range(2):
        optimizer.zero_grad()
        (F.cross_entropy(model(x), torch.tensor([1, 2])) if name == "resnet" else loss_of(model, x)).backward()
        optimizer.step()
    return model(x).detach()


@pytest.mark.parametrize("name", MODELS)
def test_at_base_size_nothing_changes_not_even_a_bit(name):
    torch.manual_seed(0)
    plain = MODELS[name](64)
    ours = mup.adapt(copy.deepcopy(plain), 64, build=MODELS[name])
    torch.manual_seed(1)
    expected = run(name, plain, torch.optim.AdamW(plain.parameters(), lr=1e-3))
    torch.manual_seed(1)
    assert torch.equal(run(name, ours, mup.optimizer(ours, lr=1e-3)), expected)
    assert len(mup.optimizer(ours, lr=1e-3).param_groups) == 1


@pytest.mark.parametrize("name", MODELS)
def test_every_model_trains_at_four_times_its_base(name):
    model = mup.adapt(MODELS[name](64), 16, build=MODELS[name])
    for optimizer in ({}, {"optimizer": "muon+adamw", "muon_lr": 0.02}, {"optimizer": "sgd"}):
        assert run(name, model, mup.optimizer(model, lr=1e-3, **optimizer)).isfinite().all()


def test_roles_of_a_decoder_with_a_tied_head():
    model = mup.adapt(gpt(64), {"n_embd": 16, "n_head": 4})
    roles = roles_of(model)
    assert roles["wte.weight"] == roles["wpe.weight"] == roles["h.0.ln_1.weight"] == roles["h.0.c_attn.bias"] == "input"
    assert roles["h.1.c_attn.weight"] == roles["h.1.mlp.c_proj.weight"] == "hidden"
    assert isinstance(model.lm_head, mup.MuReadout) and model.lm_head.multiplier == 1 / 4
    assert model.lm_head.weight is model.wte.weight


@pytest.mark.parametrize("base", [{"n_embd": 16}, {"n_embd": 16, "n_head": 2}])
def test_roles_at_base_size_are_those_of_any_size(base):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        one, other = (mup.adapt(gpt(width, heads=2), base, init="keep") for width in (16, 32))
    assert roles_of(one) == roles_of(other) and roles_of(one)["h.0.mlp.c_proj.weight"] == "hidden"


def test_keys_values_and_routers_stay_inside_and_only_the_head_is_a_readout():
    few = partial(llama_like, head_dim=8, experts=True)
    model = mup.adapt(few(64), 16, build=few)
    specs = {name: spec for name, _, spec in mup.named_specs(model)}
    key, router = specs["layers.0.attn.k_proj.weight"], specs["layers.0.mlp.router"]
    assert (key.role.value, key.m_in, key.m_out) == (router.role.value, router.m_in, router.m_out) == ("hidden", 4, 1)
    assert specs["layers.1.mlp.gate_up_proj"].layout == ("-", "out", "in")
    assert [name for name, role in roles_of(model).items() if role == "output"] == ["head.weight"]


@pytest.mark.slow
def test_heads_that_widen_are_scaled_by_their_size_and_others_are_not():
    wide = mup.adapt(wide_heads(64), 16, build=wide_heads)
    attention = wide.layers[0]["attn"]
    assert attention.scaling == pytest.approx(4**-0.5 / 4)  # 1/sqrt(4) at base, over 4
    assert mup.adapt(wide, 16, build=wide_heads).layers[0]["attn"].scaling == attention.scaling
    more = mup.adapt(llama_like(64), 32, build=llama_like)
    assert more.layers[0]["attn"].scaling == 16**-0.5
    fused = gpt(64)
    before = fused.h[0].c_attn(torch.ones(64))
    mup.adapt(fused, {"n_embd": 16, "n_head": 4}, init="keep")
    ratio = fused.h[0].c_attn(torch.ones(64)) / before
    assert torch.allclose(ratio[:64], torch.tensor(0.5)) and torch.allclose(ratio[64:], torch.tensor(1.0))


class OwnAttention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.n_heads, self.head_dim = 4, width // 4
        self.mixed = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, 5)


def test_attention_that_cannot_be_scaled_is_refused_with_what_to_do():
    with pytest.raises(BaseShapeError, match=r"OwnAttention\): its heads are 4 times as wide .* attribute `scale`"):
        mup.adapt(OwnAttention(64), 16, build=OwnAttention)
    with pytest.raises(BaseShapeError, match="MultiheadAttention"):
        layers = lambda width: nn.Sequential(nn.TransformerEncoderLayer(width, 2, width), nn.Linear(width, 5))  # noqa: E731
        mup.adapt(layers(64), 16, build=layers)


@pytest.mark.parametrize("name", ["gpt", "lstm", "resnet", "experts"])
def test_the_start_becomes_mups_whatever_it_was(name):
    """Every matrix then has the std of base size, over the root of its fan-in's growth if it is hidden."""
    torch.manual_seed(0)
    model = mup.adapt(MODELS[name](128), 32, build=MODELS[name])
    base = MODELS[name](32)
    at_base = dict(base.named_parameters())
    for parameter_name, p, spec in mup.named_specs(model):
        if p.ndim > 1:
            growth = 0.5 if spec.role is mup.Role.HIDDEN else 1.0
            ratio = (p.std() / at_base[parameter_name].std()).item()
            assert ratio == pytest.approx(growth, rel=0.2 if p.numel() > 1000 else 0.35), parameter_name
    first = {key: p.clone() for key, p in model.named_parameters()}
    mup.adapt(model, 32, build=MODELS[name])
    assert all(torch.equal(first[key], p) for key, p in model.named_parameters())


def test_a_trained_model_is_not_rescaled_by_mistake():
    trained = Recurrent(64)
    with torch.no_grad():
        trained.rnn.weight_hh_l0.mul_(3.3)
    with pytest.raises(BaseShapeError, match="rnn.weight_hh_l0 .* no initialisation does .* init='keep'"):
        mup.adapt(trained, 16, build=Recurrent)
    before = trained.rnn.weight_ih_l0.clone()
    mup.adapt(trained, 16, build=Recurrent, init="keep")
    assert torch.equal(trained.rnn.weight_ih_l0, before)


def test_what_follows_the_width_is_said():
    with pytest.warns(UserWarning, match="n_head=1 follow the width"):
        mup.adapt(gpt(64), {"n_embd": 16})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mup.adapt(gpt(64), {"n_embd": 16, "n_head": 1})


class Detour(nn.Module):
    """A layer to a finite size that is registered first: an output, or not?"""

    def __init__(self, width):
        super().__init__()
        self.value = nn.Linear(width, 2)
        self.body, self.other = nn.Linear(7, width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn(6, width))

    def forward(self, x):
        return self.value(F.relu(self.other(F.relu(self.body(x)))) + self.table[:1])


BAD = {
    "no base": (lambda: mup.adapt(Recurrent(64)), "base= is missing"),
    "a number without build": (lambda: mup.adapt(Recurrent(64), 16), "pass the function that builds it"),
    "no config": (lambda: mup.adapt(Recurrent(64), {"width": 16}), "a Recurrent has no config .* pass build="),
    "unknown field": (lambda: mup.adapt(gpt(64), {"hidden": 16}), "has no 'hidden'"),
    "unknown init": (lambda: mup.adapt(gpt(64), {"n_embd": 16}, init="mine"), "choose turn, one-std, torch, keep"),
    "base size without delta": (lambda: mup.adapt(Recurrent(64), Recurrent(64)), "pass delta="),
    "a vocabulary that grows": (
        lambda: mup.adapt(nn.Embedding(8, 4), 4, build=lambda n: nn.Embedding(2 * n, n)),
        r"weight \(8, 4\): .* dimension 0 must not grow with width",
    ),
    "a base that cannot be built": (
        lambda: mup.adapt(Recurrent(64), {"width": 16, "depth": 2}, build=Recurrent),
        "cannot be built on the meta device .*unexpected keyword",
    ),
    "open table": (
        lambda: mup.adapt(Detour(64), 16, build=Detour, roles={"value.weight": "output"}),
        r"^table \(6, 64\): .* roles=\{\"table\": \"hidden\"\}",
    ),
    "open layer": (
        lambda: mup.adapt(Detour(64), 16, build=Detour, roles={"table": "input"}),
        r"value.weight read from width .* roles=\{\"value.weight\": \"output\"\}",
    ),
    "pattern that fits nothing": (
        lambda: mup.adapt(Detour(64), 16, build=Detour, roles={"tabel": "input"}),
        "no parameter is called 'tabel'",
    ),
    "no role": (lambda: mup.adapt(Detour(64), 16, build=Detour, roles={"table": "vector"}), "'vector' is no role"),
    "no muon rate": (lambda: mup.optimizer(gpt(64), lr=1e-3, optimizer="muon+adamw"), "as muon_lr="),
    "a rate too many": (lambda: mup.optimizer(gpt(64), lr=1e-3, muon_lr=0.1), "has no muon_lr"),
    "no optimizer": (lambda: mup.param_groups(gpt(64), lr=1e-3, optimizer="lion"), "choose adamw, adam, sgd, muon"),
    "not in muP": (lambda: mup.optimizer(gpt(64), lr=1e-3), "has no declared role"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_known_is_one_line_that_says_what_to_do(name):
    attempt, says = BAD[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(mup.UndeclaredParameterError if name == "not in muP" else Exception, match=says) as fault:
            attempt()
    assert "\n" not in str(fault.value)


def test_what_the_user_says_wins():
    roles = {"value.weight": "output", "table": "input", "other.weight": "input: out -", "*.bias": "scalar"}
    with pytest.raises(BaseShapeError, match="other.bias has 1 dimensions"):
        mup.adapt(Detour(64), 16, build=Detour, roles={"other.*": "input: out -"})
    model = mup.adapt(Detour(64), 16, build=Detour, roles=roles)
    assert roles_of(model)["table"] == "input" and roles_of(model)["other.weight"] == "input"
    assert roles_of(model)["other.bias"] == "scalar" and model.value.multiplier == 1 / 4


def test_groups_carry_the_factors_of_the_table():
    model = mup.adapt(gpt(64), {"n_embd": 16, "n_head": 4})
    groups = mup.param_groups(model, lr=1.0, weight_decay=0.1, optimizer="muon+adamw", muon_lr=2.0)
    names = {id(p): name for name, p in model.named_parameters()}
    seen = {names[id(p)]: group for group in groups for p in group["params"]}
    assert seen.keys() == set(names.values()) and seen["h.0.c_attn.weight"]["use_muon"]
    assert seen["h.0.c_attn.weight"]["lr"] == 2.0 and not seen["wte.weight"]["use_muon"]
    adam = {names[id(p)]: g for g in mup.param_groups(model, lr=1.0, weight_decay=0.1) for p in g["params"]}
    assert adam["h.0.c_attn.weight"]["lr"] == 1 / 4 and adam["h.0.c_attn.weight"]["weight_decay"] == pytest.approx(0.4)
    assert adam["wte.weight"]["lr"] == 1.0 and adam["wte.weight"]["eps"] == pytest.approx(1e-8 / 4)
    torch.optim.AdamW(mup.param_groups(model, lr=1.0))
    assert rates(mup.optimizer(model, lr=1.0), model) == {name: group["lr"] for name, group in adam.items()}


def test_one_call_adapts_and_makes_groups():
    model = gpt(64)
    groups = mup.param_groups(model, {"n_embd": 16, "n_head": 4}, lr=1e-3)
    assert {group["lr"] for group in groups} == {1e-3, 1e-3 / 4} and isinstance(model.lm_head, mup.MuReadout)


def test_the_table_of_any_model_names_its_forward_factors():
    lines = mup.explain(mup.adapt(wide_heads(64), 16, build=wide_heads)).splitlines()
    assert lines[0].split()[:2] == ["parameter", "role"]
    assert any(line.startswith("layers.*.attn.q_proj.weight (2)  ") and " hidden " in line for line in lines)
    assert "layers.*.attn.scaling is 0.125 instead of 0.25: heads widen" in lines
    assert lines[-1] == "what head reads is multiplied by 0.25: the readout"


def test_a_convolution_as_the_last_layer_reads_less():
    def build(width):
        return nn.Sequential(
            nn.Conv2d(3, width, 3), nn.ReLU(), nn.Conv2d(width, width, 3), nn.ReLU(), nn.Conv2d(width, 2, 1)
        )

    plain = build(32)
    with torch.no_grad():
        plain[4].bias.zero_()
    ours = mup.adapt(copy.deepcopy(plain), 8, build=build, init="keep")
    x = torch.randn(1, 3, 9, 9)
    assert torch.allclose(ours(x), plain(x) / 4) and roles_of(ours)["4.weight"] == "output"


def test_adapters_have_roles():
    class Adapted(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.body = nn.Linear(width, width)
            self.lora_A = nn.ModuleDict({"default": nn.Linear(width, 4, bias=False)})
            self.lora_B = nn.ModuleDict({"default": nn.Linear(4, width, bias=False)})
            self.head = nn.Linear(width, 3)

    model = mup.adapt(Adapted(64), 16, build=Adapted)
    roles = roles_of(model)
    assert (roles["lora_A.default.weight"], roles["lora_B.default.weight"]) == ("hidden", "input")
    assert isinstance(model.head, mup.MuReadout)


def test_mambas_numbers_for_each_channel_are_known_by_name():
    class Mixer(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.in_proj = nn.Linear(width, 2 * width)
            self.A_log = nn.Parameter(torch.ones(2 * width, 4))
            self.conv1d = nn.Conv1d(2 * width, 2 * width, 4, groups=2 * width)
            self.out_proj = nn.Linear(2 * width, width)

    roles = roles_of(mup.adapt(Mixer(64), 16, build=Mixer))
    assert roles["A_log"] == roles["conv1d.weight"] == "input" and roles["out_proj.weight"] == "hidden"


def test_a_model_of_another_size_and_stored_shapes_are_bases_too(tmp_path):
    model = mup.adapt(llama_like(64), llama_like(32), init="one-std")
    mup.save_base_shapes(model, tmp_path / "base.bsh")
    again = mup.adapt(llama_like(64), tmp_path / "base.bsh", init="one-std")
    assert roles_of(again) == roles_of(model) and again.head.multiplier == 1 / 2
    by_values = mup.adapt(llama_like(64), llama_like(32))
    assert math.isclose(by_values.head.multiplier, 0.5)
    with pytest.raises(BaseShapeError, match="cannot be seen without the base model's values"):
        mup.adapt(llama_like(64), tmp_path / "base.bsh")


def test_another_field_of_a_dataclass_stays_as_it_is():
    model = GPT(replace(GPTConfig(), n_embd=64, n_layer=1, tied=False))
    mup.adapt(model, {"n_embd": 32, "n_head": 2})
    assert model.lm_head.out_features == VOCAB and model.lm_head.multiplier == 1 / 2


# ---------------------------------------------------------------------------------------------------------------------
# What becomes of an adapted model


def wide_gpt():
    return mup.adapt(gpt(64, tied=True), {"n_embd": 16, "n_head": 4})


@pytest.mark.parametrize("build", [wide_gpt, lambda: mup.adapt(wide_heads(64), 16, build=wide_heads)])
def test_folding_gives_a_plain_model_that_computes_the_same(build):
    model = build()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    plain = mup.fold(model)
    torch.testing.assert_close(plain(tokens()), model(tokens()))
    assert not any(key.startswith("mup_") for module in plain.modules() for key in vars(module))
    assert type(plain.lm_head if hasattr(plain, "lm_head") else plain.head) is nn.Linear
    fresh = gpt(64, tied=False) if isinstance(plain, GPT) else wide_heads(64)
    fresh.load_state_dict(plain.state_dict())
    torch.testing.assert_close(fresh(tokens()), model(tokens()))


def test_a_gain_that_is_added_to_one_cannot_hold_a_scale():
    class OnePlus(nn.RMSNorm):
        def forward(self, x):
            return F.rms_norm(x, x.shape[-1:]) * (1 + self.weight)

    model = wide_heads(64)
    model.layers[0]["attn"].q_norm = OnePlus(16)
    mup.adapt(model, 16, build=wide_heads, init="keep")
    with pytest.raises(BaseShapeError, match=r"layers.0.attn.q_norm \(OnePlus\): its factor 0.5 fits into no weight"):
        mup.fold(model)


@pytest.mark.slow
@pytest.mark.parametrize("build", [wide_gpt, lambda: mup.adapt(wide_heads(64), 16, build=wide_heads)])
def test_copies_and_state_dicts_keep_the_forward_factors(build, tmp_path):
    from safetensors.torch import load_model, save_model

    model, x = build(), tokens()
    expected = model(x)
    assert torch.equal(copy.deepcopy(model)(x), expected)
    twin = build()
    twin.load_state_dict(model.state_dict())
    assert torch.equal(twin(x), expected)
    save_model(model, str(tmp_path / "model.safetensors"))
    twin = build()
    load_model(twin, str(tmp_path / "model.safetensors"))
    assert torch.equal(twin(x), expected)
    assert roles_of(copy.deepcopy(model)) == roles_of(model)


def trained(optimizer, model, steps, clip=True, accumulate=2):
    """The last loss of `steps` updates with gradients accumulated and clipped."""
    for step in range(steps):
        optimizer.zero_grad()
        for part in range(accumulate):
            loss = loss_of(model, tokens(seed=accumulate * step + part)) / accumulate
            loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    return loss.item()


MUON = {"lr": 1e-3, "optimizer": "muon+adamw", "muon_lr": 0.02}


@pytest.mark.slow
def test_muon_and_adam_are_saved_and_resumed_as_one():
    model = wide_gpt()
    optimizer = mup.optimizer(model, **MUON)
    trained(optimizer, model, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    assert saved[1].keys() == {"state", "param_groups"} and len(saved[1]["state"]) == len(list(model.parameters()))
    expected = trained(optimizer, model, 2)
    again = wide_gpt()
    resumed = mup.optimizer(again, **MUON)
    again.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    assert trained(resumed, again, 2) == expected
    of_the_first_edition = {"optimizers": [o.state_dict() for o in optimizer.optimizers]}
    resumed.load_state_dict(of_the_first_edition)
    assert [len(o.state) for o in resumed.optimizers] == [len(o.state) for o in optimizer.optimizers]


def test_what_one_writes_into_the_state_arrives():
    model = wide_gpt()
    optimizer = mup.optimizer(model, **MUON)
    trained(optimizer, model, 1)
    weight = model.h[0].c_proj.weight
    for p in list(optimizer.state):
        optimizer.state[p] = {key: 0 * x for key, x in optimizer.state[p].items()}
    assert not optimizer.optimizers[0].state[weight]["momentum_buffer"].any() and weight in optimizer.state
    del optimizer.state[weight]
    assert weight not in optimizer.state and torch.zeros(1) not in optimizer.state


@pytest.mark.slow
def test_muon_and_adam_under_autocast_and_a_grad_scaler():
    model = wide_gpt()
    optimizer, scaler = mup.optimizer(model, **MUON), torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = model.wte.weight.clone()
    for step in range(12):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, tokens(seed=step))
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        if step == 0:
            scaler.step(optimizer)
            scaler.update()
            assert torch.equal(model.wte.weight, before)  # an overflow: neither of the two has made a step
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        else:
            scaler.step(optimizer)
            scaler.update()
    assert not torch.equal(model.wte.weight, before) and loss.isfinite()


# ---------------------------------------------------------------------------------------------------------------------
# Optimizers that know nothing of muP


def step_of(optimizer, model):
    optimizer.zero_grad()
    loss_of(model, tokens()).backward()
    optimizer.step()


def test_an_optimizer_with_one_rate_for_all_is_warned_of_once():
    model = wide_gpt()
    with pytest.warns(mup.PlainOptimizerWarning, match="AdamW trains a GPT .* 4 times that of .*c_attn.weight") as said:
        step_of(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
    assert len(said) == 1 and "\n" not in str(said[0].message)
    step_of(torch.optim.SGD(model.parameters(), lr=1e-3), model)
    with pytest.warns(mup.PlainOptimizerWarning, match="SGD"):
        again = wide_gpt()
        step_of(torch.optim.SGD(nn.Sequential(again).parameters(), lr=1e-3), again)


@pytest.mark.slow
def test_right_rates_base_size_and_folded_models_are_not_warned_of():
    groups = wide_gpt()
    step_of(torch.optim.AdamW(mup.param_groups(groups, lr=1e-3)), groups)
    for options in ({"lr": 1e-3}, MUON, {"lr": 1e-3, "optimizer": "sgd"}):
        ours = wide_gpt()
        step_of(mup.optimizer(ours, **options), ours)
    folded = mup.fold(wide_gpt())
    step_of(torch.optim.AdamW(folded.parameters(), lr=1e-3), folded)
    base = mup.adapt(gpt(16), {"n_embd": 16, "n_head": 4})
    step_of(torch.optim.AdamW(base.parameters(), lr=1e-3), base)


@pytest.mark.slow
def test_a_warning_keeps_no_model_alive():
    import gc
    import weakref

    model = wide_gpt()
    left = weakref.ref(model)
    copy.deepcopy(model)
    del model
    gc.collect()
    assert left() is None


# ---------------------------------------------------------------------------------------------------------------------
# Depth


def deep(layers, width=32, base=None, **options):
    torch.manual_seed(0)
    model = gpt(width, heads=2, n_layer=layers)
    return mup.adapt(model, base or {"n_embd": 32, "n_head": 2, "n_layer": 2}, **options)


@pytest.mark.slow
def test_deeper_models_follow_completep():
    """Worked out by hand for 8 layers over 2: the last matrices of branches have 1/4 of the rate, and of the start."""
    model = deep(8)
    lr = rates(mup.optimizer(model, lr=1.0), model)
    assert lr["h.7.c_proj.weight"] == lr["h.0.mlp.c_proj.weight"] == lr["h.3.c_proj.bias"] == 1 / 4
    assert lr["h.7.c_attn.weight"] == lr["h.7.ln_1.weight"] == lr["wte.weight"] == lr["ln_f.weight"] == 1
    eps = {id(p): group["eps"] for group in mup.optimizer(model, lr=1.0).param_groups for p in group["params"]}
    assert eps[id(model.h[0].c_attn.weight)] == pytest.approx(1e-8 / 4)
    std = model.h[5].mlp.c_proj.weight.std().item()
    assert std == pytest.approx(0.02 / math.sqrt(2 * 2) / 4, rel=0.1)  # its own start would be 0.02 / sqrt(2 x 8)
    assert model.h[5].c_attn.weight.std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.slow
def test_depth_and_width_multiply_and_base_depth_changes_nothing():
    model = deep(8, width=128, base={"n_embd": 32, "n_head": 2, "n_layer": 2})
    assert rates(mup.optimizer(model, lr=1.0), model)["h.7.c_proj.weight"] == 1 / 16
    torch.manual_seed(0)
    plain = gpt(32, heads=2, n_layer=2)
    ours = deep(2)
    assert all(torch.equal(p, q) for p, q in zip(plain.parameters(), ours.parameters()))
    assert set(rates(mup.optimizer(ours, lr=1.0), ours).values()) == {1.0}
    only = deep(4, base={"n_layer": 2})
    assert rates(mup.optimizer(only, lr=1.0), only)["h.3.c_proj.weight"] == 1 / 2


@pytest.mark.slow
def test_another_rule_and_roles_of_ones_own():
    hyperp = replace(mup.mup(), depth=mup.DEPTH_RULES["hyperp"])
    model = deep(8, parametrization=hyperp)
    lr = rates(mup.optimizer(model, lr=1.0, parametrization=hyperp), model)
    assert (lr["h.0.c_attn.weight"], lr["h.0.c_proj.weight"], lr["wte.weight"]) == (1 / 2, 1 / 4, 1 / 2)
    assert model.h[5].mlp.c_proj.weight.std().item() == pytest.approx(0.01 / 2, rel=0.1)
    said = deep(8, roles={"*.ln_1.weight": "writes"})
    assert rates(mup.optimizer(said, lr=1.0), said)["h.0.ln_1.weight"] == 1 / 4


def test_layers_in_which_nothing_writes_by_name_are_refused():
    model = gpt(32, heads=2, n_layer=4)
    for block in model.h:
        block.c_proj, block.mlp = block.c_attn, nn.ModuleDict()
    model.__class__ = type("Odd", (GPT,), {"__init__": odd_init})
    with pytest.raises(BaseShapeError, match=r'h.0 \(GPTBlock\) has no matrix .* roles=\{"\*.NAME.weight": "writes"\}'):
        mup.adapt(model, {"n_layer": 2}, init="keep")


def odd_init(self, config):
    GPT.__init__(self, config)
    for block in self.h:
        block.c_proj, block.mlp = block.c_attn, nn.ModuleDict()


def test_batch_and_tokens_multiply_what_width_gives():
    """marin at 4 times the batch: rates twice, beta2 to the 4th power, rate times decay 4 times; AdamW and Muon."""
    model, run = wide_gpt(), mup.RunScaling(mup.BATCH_RULES["marin"], m_batch=4)
    options = MUON | {"weight_decay": 0.1, "betas": (0.9, 0.99)}
    plain, scaled = mup.optimizer(model, **options), mup.optimizer(model, run=run, **options)
    for before, after in zip(plain.param_groups, scaled.param_groups):
        assert after["lr"] == pytest.approx(2 * before["lr"])
        assert after["lr"] * after["weight_decay"] == pytest.approx(4 * before["lr"] * before["weight_decay"])
        assert "betas" not in after or after["betas"] == pytest.approx((0.9, 0.99**4))
    groups = mup.param_groups(model, lr=1e-3, run=run)
    assert {group["lr"] for group in groups} == {2e-3, 2e-3 / 4} and groups[0]["betas"][1] == pytest.approx(0.999**4)
    longer = mup.RunScaling(tokens=mup.TOKENS_RULES["bjorck"], m_tokens=8)
    assert mup.optimizer(model, lr=1.0, run=longer).param_groups[0]["lr"] == pytest.approx(8**-0.32)
