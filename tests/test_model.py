"""The record's architecture at any shape: its names, its pattern of layers, its arithmetic, its loss, and muP."""

from __future__ import annotations

import dataclasses
import math
import weakref
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from speedrun_mup.core import mup
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.kernels.fp8 import head_scales
from speedrun_mup.core.model import (
    GPT,
    MLP,
    GPTConfig,
    SoftcapCrossEntropy,
    loss_and_gradient,
    loss_and_gradient_in_place,
    pack_scalars,
    rms_norm,
    rotary_table,
    rotate,
    softcap,
    softcap_cross_entropy,
    strip_compiled,
    unpack_scalars,
)
from speedrun_mup.core.model import head as head_module
from speedrun_mup.core.model.record import ranges_of_scalars, to_record
from speedrun_mup.core.mup import PARAMETRIZATIONS, Role
from speedrun_mup.core.optimizers import DistAdam, Muon, Tuned, param_groups
from speedrun_mup.core.utils import generator

BOS = 256
CPU = torch.device("cpu")
SCALARS = ranges_of_scalars(6).keys()


def tiny(**changes) -> GPTConfig:
    """A model of 6 layers and width 32 over 257 tokens, that trains in milliseconds."""
    small = {"vocab_size": 257, "bos_token": BOS, "n_layer": 6, "width": 32, "base_width": 32, "head_dim": 16}
    return GPTConfig(**(small | {"block_size": 8} | changes))


def batch(length: int = 64, seed: int = 0) -> tuple[Tensor, Tensor]:
    """(T,) int32 inputs that start with a BOS and hold a few more, and (T,) int64 targets."""
    rng = generator(seed, "batch")
    tokens = torch.randint(0, BOS, (length + 1,), generator=rng)
    tokens[torch.randint(0, length, (3,), generator=rng)] = BOS
    tokens[0] = BOS
    return tokens[:-1].int(), tokens[1:]


@torch.no_grad()
def fill(model: GPT, seed: int = 0) -> GPT:
    """`model` with no parameter left at zero, so that every gradient is alive."""
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator(seed, "fill", name))
        parameter.add_(noise, alpha=0.1 if parameter.ndim == 1 else 0.5 * parameter.size(-1) ** -0.5)
    return model


def optimizers_for(model: GPT, hidden: str = "muon") -> list[DistAdam | Muon]:
    """The record's learning rates (for Adam on hidden matrices, one of ours), with some weight decay."""
    adam = {"embed": 0.6, "value_embed": 0.6, "head": 0.22, "scalar": 0.04}
    tuned = {group: Tuned("adam", lr, weight_decay=0.01) for group, lr in adam.items()}
    tuned["matrix"] = Tuned(hidden, 0.05 if hidden == "muon" else 0.002, weight_decay=0.1)
    groups = param_groups(model, model.cfg.rules, tuned)
    return [DistAdam(groups["adam"])] + ([Muon(groups["muon"])] if "muon" in groups else [])


def train(model: GPT, steps: int, hidden: str = "muon", window: int = 3) -> None:
    """`steps` updates on different batches."""
    optimizers = optimizers_for(model, hidden)
    for step in range(steps):
        model.zero_grad()
        model(*batch(seed=step), window).backward()
        for optimizer in optimizers:
            optimizer.step()


# The shape of the record


RECORD = GPTConfig()  # 12 layers, width 768


def test_the_pattern_of_twelve_layers_is_the_records():
    layers = range(12)
    assert [i for i in layers if RECORD.has_long_window(i)] == [0, 4, 7, 11]
    assert [RECORD.value_embed_of(i) for i in layers] == [0, 1, 2, *[None] * 6, 0, 1, 2]
    assert RECORD.layer_without_attention == 7
    assert RECORD.padded_vocab == 50304


@given(st.integers(3, 40).map(lambda half: 2 * half))
def test_the_pattern_at_any_even_depth(n_layer):
    cfg = tiny(n_layer=n_layer)
    layers = range(n_layer)
    long = [cfg.has_long_window(i) for i in layers]
    assert long[0] and long == long[::-1] and sum(long) == 2 * math.ceil(n_layer / 8)
    embeds = [cfg.value_embed_of(i) for i in layers]
    assert embeds[:3] == embeds[-3:] == [0, 1, 2] and embeds.count(None) == n_layer - 6
    assert n_layer // 2 < cfg.layer_without_attention < n_layer


@given(st.integers(2, 41))
@settings(deadline=None)
def test_the_pattern_at_any_depth_is_the_same_from_both_ends(n_layer):
    cfg = tiny(n_layer=n_layer)
    layers, n = range(n_layer), cfg.value_embeds
    long = [cfg.has_long_window(i) for i in layers]
    embeds = [cfg.value_embed_of(i) for i in layers]
    assert long[0] and long == long[::-1]
    assert embeds == [*range(n), *[None] * (n_layer - 2 * n), *range(n)] and n == min(3, n_layer // 2)
    without = cfg.layer_without_attention
    assert without is None if n_layer < 6 else (n_layer + 1) // 2 < without < n_layer


@pytest.mark.parametrize("n_layer", [2, 3, 4, 5, 7])
def test_of_an_odd_or_small_number_of_layers_each_takes_part(n_layer):
    """In an odd number the middle layer gets no skip and gives none; what few layers do not use is not there."""
    model = fill(GPT(tiny(n_layer=n_layer)))
    assert model.blocks.skip_weights.shape == (n_layer // 2,)
    model(*batch(), 3).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())
    if n_layer % 2:
        seen: list[Tensor] = []
        model.blocks[n_layer // 2].register_forward_hook(lambda block, inputs, output: seen.append(output))
        with torch.no_grad():
            mine = model.logits(batch()[0], 3)
            model.blocks.skip_weights.zero_()
            assert not torch.equal(model.logits(batch()[0], 3), mine) and torch.equal(*seen)


def state_dict_of_the_record(width: int, vocab: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes, written out from the record's description. 64 scalars: 60 and the padding of its 8 GPUs."""
    shapes: dict[str, tuple[int, ...]] = {"embed.weight": (vocab, width), "lm_head.weight": (vocab, width)}
    shapes |= {f"value_embeds.{i}.weight": (vocab, width) for i in range(3)}
    for i in range(12):
        if i != 7:
            shapes[f"blocks.{i}.attn.qkv_w"] = (3, width, width)
            shapes[f"blocks.{i}.attn.c_proj.weight"] = (width, width)
        shapes[f"blocks.{i}.mlp.c_fc.weight"] = (4 * width, width)
        shapes[f"blocks.{i}.mlp.c_proj.weight"] = (width, 4 * width)
    return shapes | {"scalars": (64,)}


def test_names_shapes_and_parameter_count_are_the_records():
    with torch.device("meta"):
        model = GPT(RECORD)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    assert {name: tuple(p.shape) for name, p in to_record(model.state_dict()).items()} == (
        state_dict_of_the_record(768, 50304) | {"scalars": (60,)}
    )
    named = {"blocks.skip_weights": (6,), "blocks.x0_lambdas": (12, 2), "value_embeds.lambdas": (12, 2)}
    assert shapes.items() >= named.items()
    assert sum(p.numel() for p in model.parameters()) == 275_742_784 - 4 - 6  # of the skips, the record uses half
    active = [p for name, p in model.named_parameters() if "embed" not in name and name not in SCALARS]
    assert sum(p.numel() for p in active) == 121_208_832


def test_a_checkpoint_of_the_record_loads_strictly():
    """Compiled names, bf16 embeddings and 64 scalars, as its 8 GPUs wrote them."""
    rng = generator(0, "upstream")
    upstream = {
        "_orig_mod." + name: torch.randn(shape, generator=rng).to(torch.bfloat16 if "embed" in name else torch.float32)
        for name, shape in state_dict_of_the_record(32, 384).items()
    }
    kept = dict(upstream)
    model = GPT(tiny(n_layer=12))
    result = model.load_state_dict(strip_compiled(upstream), strict=True)
    assert not result.missing_keys and not result.unexpected_keys
    packed = to_record(model.state_dict(), unused=upstream["_orig_mod.scalars"][:60])
    assert packed.keys() == state_dict_of_the_record(32, 384).keys()
    for name, parameter in packed.items():
        assert torch.equal(parameter, upstream["_orig_mod." + name][: len(parameter)].float()), name
    assert upstream == kept and len(upstream["_orig_mod.scalars"]) == 64  # the caller's own dict is left alone


def test_scalars_are_packed_into_the_records_vector_and_unpacked_from_it():
    flat = torch.arange(1.0, 61)
    named = unpack_scalars(flat, 12)
    assert {name: tensor.flatten()[0].item() for name, tensor in named.items()} == dict(zip(named, (1, 13, 37)))
    unused = [*range(6, 12)]
    packed = pack_scalars(named)
    assert (packed[unused] == 1).all()
    packed[unused] = flat[unused]
    assert torch.equal(packed, flat) and torch.equal(pack_scalars(named, unused=flat), flat)
    assert all(map(torch.equal, unpack_scalars(packed, 12).values(), named.values()))


def test_a_checkpoint_of_another_shape_does_not_load():
    model = GPT(tiny())
    state = model.state_dict()
    for length in (29, 30 + 64):
        with pytest.raises(RuntimeError, match="size mismatch for scalars"):
            model.load_state_dict(state | {"scalars": torch.zeros(length)})
    with pytest.raises(RuntimeError, match="Missing key"):
        model.load_state_dict(strip_compiled({"module." + name: tensor for name, tensor in state.items()}))


def test_init_is_the_records():
    model = GPT(tiny(width=64, base_width=64))
    parameters = dict(model.named_parameters())
    bound = math.sqrt(3) * 0.5 / math.sqrt(64)
    for name, parameter in parameters.items():
        if "embed" in name and name not in SCALARS:
            assert parameter.std().item() == pytest.approx(1, abs=0.02) and abs(parameter.mean().item()) < 0.02
        elif name.endswith(("qkv_w", "c_fc.weight")):
            assert parameter.abs().max() <= bound
            assert parameter.std().item() == pytest.approx(0.5 / 8, rel=0.03)
        elif name not in SCALARS:
            assert not parameter.any(), name
    assert pack_scalars(parameters).tolist() == [1.0] * 6 + [1.0, 0.0] * 6 + [0.5, 0.5] * 6


def test_init_depends_on_the_seed_and_each_parameters_own_name_only():
    first, deeper, other = GPT(tiny(), seed=1), GPT(tiny(n_layer=8), seed=1), GPT(tiny(), seed=2)
    ours, theirs = dict(first.named_parameters()), dict(deeper.named_parameters())
    for name in ("embed.weight", "value_embeds.2.weight", "blocks.1.attn.qkv_w", "blocks.5.mlp.c_fc.weight"):
        assert torch.equal(ours[name], theirs[name])
        assert not torch.equal(ours[name], dict(other.named_parameters())[name])
    assert not torch.equal(ours["blocks.0.attn.qkv_w"], ours["blocks.1.attn.qkv_w"])


def test_a_parameter_without_a_declared_init_is_an_error(monkeypatch):
    """It used to start at zero in silence, unless its name ended like one that does not."""
    monkeypatch.setattr("speedrun_mup.core.model.attention.INTO_THE_LAYER", None)
    for device in ("cpu", "meta"):
        with (
            pytest.raises(
                mup.UndeclaredParameterError, match=r"blocks.0.attn.qkv_w \(3, 32, 32\) has no declared init"
            ),
            torch.device(device),
        ):
            GPT(tiny())


# Any shape


@pytest.mark.slow
@given(
    st.integers(2, 12),
    st.integers(1, 6).map(lambda quarter: 4 * quarter),
    st.integers(1, 3),
    st.integers(1, 300),
    st.sampled_from(["dense", "blocked"]),
    st.data(),
)
@settings(deadline=None, max_examples=8)
@example(6, 4, 1, 1, "blocked", None)
def test_any_shape_builds_and_trains(n_layer, head_dim, heads, vocab, attention, data):
    width = head_dim * heads
    bos = data.draw(st.integers(0, vocab - 1)) if data else 0
    model = GPT(GPTConfig(vocab, bos, n_layer, width, head_dim, head_dim, 8, "mup", attention=attention))
    tokens = torch.randint(0, vocab, (17,), generator=generator(0, "tokens"))
    optimizers = optimizers_for(model)
    losses = []
    for _ in range(2):
        loss = model(tokens[:-1].int(), tokens[1:], 2)
        losses.append(loss.item() / 16)
        model.zero_grad()
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
    assert losses[0] == pytest.approx(math.log(-(-vocab // 128) * 128), rel=1e-6)
    assert losses[1] < losses[0]
    assert all(parameter.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 200, "head_dim": 64}, "width=200 is not a multiple of head_dim=64; try 192 or 256"),
        ({"width": 8}, "width=8 is not a multiple of head_dim=16; try 16 or 32"),
        ({"width": -32}, "width=-32 is not a multiple of head_dim=16; try 16 or 32"),
        ({"base_width": 40}, "base_width=40 is not a multiple of head_dim=16; try 32 or 48"),
        ({"n_layer": 1}, "n_layer=1 must be at least 2 (a layer on each side of the U-net)"),
        ({"n_layer": -6}, "n_layer=-6 must be at least 2 (a layer on each side of the U-net)"),
        (
            {"head_dim": 6, "width": 36, "base_width": 36},
            "head_dim=6 must be a multiple of 4 (half of its pairs rotate)",
        ),
        ({"head_dim": 0}, "head_dim=0 must be a multiple of 4 (half of its pairs rotate)"),
        ({"bos_token": 257}, "bos_token=257 is outside the vocabulary of 257"),
        ({"bos_token": -1}, "bos_token=-1 is outside the vocabulary of 257"),
        ({"vocab_size": 0}, "bos_token=256 is outside the vocabulary of 0"),
    ],
)
def test_impossible_shapes_are_config_errors(changes, says):
    with pytest.raises(ConfigError) as caught:
        tiny(**changes)
    assert str(caught.value) == says


def test_parametrizations_by_name_and_by_table():
    with pytest.raises(ConfigError, match="parametrization='mu-p' is unknown; choose mup, sp, record26"):
        GPT(tiny(parametrization="mu-p"))
    assert tiny(parametrization="sp").rules is PARAMETRIZATIONS["sp"]
    own = mup.mup(head=0.5)
    assert tiny(parametrization=own).rules is own


# The first steps


@pytest.mark.parametrize("vocab", [50257, 257, 128])
def test_step_0_loss_is_ln_of_the_padded_vocabulary(vocab):
    """The head starts at zero, and the padding takes part in the softmax."""
    model = GPT(tiny(vocab_size=vocab, bos_token=0))
    tokens = torch.arange(65) % vocab
    padded = {50257: 50304, 257: 384, 128: 128}[vocab]
    assert model(tokens[:-1].int(), tokens[1:], 1).item() / 64 == pytest.approx(math.log(padded), rel=1e-6)


def test_gradients_wake_up_in_the_order_of_the_record():
    """The head first; then the embedding and the projections back into the stream; then everything else."""
    model = GPT(tiny())
    optimizers = optimizers_for(model)
    awake = []
    for step in range(3):
        model.zero_grad()
        model(*batch(seed=step), 3).backward()
        # At step 1 the gradient of the scalars is zero in exact arithmetic, so what they have is rounding: left out.
        awake.append({name for name, p in model.named_parameters() if p.grad.any() and name not in SCALARS})
        for optimizer in optimizers:
            optimizer.step()
    everything = {name for name, _ in model.named_parameters()} - SCALARS
    assert awake[0] == {"lm_head.weight"}
    assert awake[1] == {name for name in everything if name in ("lm_head.weight", "embed.weight") or "c_proj" in name}
    assert awake[2] == everything


def test_unused_scalars_have_no_gradient():
    """The attention weights of the layer without attention, and those of absent value embeddings."""
    model = fill(GPT(tiny(n_layer=12)))
    model(*batch(), 3).backward()
    assert model.blocks.skip_weights.grad.all()
    weights = model.value_embeds.lambdas.grad
    assert not weights[7].any() and (weights[:, 0] != 0).tolist() == [i != 7 for i in range(12)]
    assert (weights[:, 1] != 0).tolist() == [i in (0, 1, 2, 9, 10, 11) for i in range(12)]
    assert model.blocks.x0_lambdas.grad.all()


# The forward pass


def reference_hidden(model: GPT, tokens: Tensor, window: int) -> Tensor:
    """The record's forward pass of six layers in float64, straight from its description; (T, D)."""
    p = {name: tensor.double() for name, tensor in to_record(model.state_dict()).items()}
    T, (C, B) = len(tokens), (model.cfg.head_dim, model.cfg.block_size)
    skip, mix, own = p["scalars"][:6], p["scalars"][6:18].view(6, 2), p["scalars"][18:].view(6, 2)
    rms = lambda x: x / (x.square().mean(-1, keepdim=True) + torch.finfo(torch.float32).eps).sqrt()  # noqa: E731
    position = torch.arange(T)
    documents = (tokens == BOS).cumsum(0)
    speed = torch.cat([(1 / 1024) ** torch.linspace(0, 1, C // 4, dtype=torch.float64), torch.zeros(C // 4)])
    turn = torch.polar(torch.ones(1, dtype=torch.float64), -position[:, None, None] * speed)

    def rotated(x: Tensor) -> Tensor:
        y = torch.complex(*x.chunk(2, -1)) * turn
        return torch.cat([y.real, y.imag], -1)

    def attention(x: Tensor, layer: int) -> Tensor:
        q, k, v = (F.linear(x, w).view(T, -1, C) for w in p[f"blocks.{layer}.attn.qkv_w"])
        v = own[layer, 0] * v
        which = {0: 0, 1: 1, 2: 2, 3: 0, 4: 1, 5: 2}[layer]
        v = v + own[layer, 1] * p[f"value_embeds.{which}.weight"][tokens].view_as(v)
        q, k = rotated(rms(q)), rotated(rms(k))
        reach = window if layer in (0, 5) else max(window // 2, 1)
        apart = position[:, None] // B - position // B
        sees = (position[:, None] >= position) & (documents[:, None] == documents) & (apart < reach)
        scores = (0.12 * torch.einsum("qhc,khc->hqk", q, k)).masked_fill(~sees, float("-inf"))
        y = torch.einsum("hqk,khc->qhc", scores.softmax(-1), v).reshape(T, -1)
        return F.linear(y, p[f"blocks.{layer}.attn.c_proj.weight"])

    x = x0 = rms(p["embed.weight"][tokens])
    stack = []
    for layer in range(6):
        if layer >= 3:
            x = x + skip[layer - 3] * stack.pop()
        x = mix[layer, 0] * x + mix[layer, 1] * x0
        if layer != 4:
            x = x + attention(rms(x), layer)
        inner = F.linear(rms(x), p[f"blocks.{layer}.mlp.c_fc.weight"]).clamp(min=0) ** 2
        x = x + F.linear(inner, p[f"blocks.{layer}.mlp.c_proj.weight"])
        if layer < 3:
            stack.append(x)
    return rms(x)


@pytest.mark.parametrize("attention", ["dense", "blocked"])
@pytest.mark.parametrize("window", [0, 1, 3, 8, 20])
def test_the_forward_pass_is_the_records(attention, window):
    model = fill(GPT(tiny(attention=attention)))
    tokens, _ = batch()
    expected = reference_hidden(model, tokens, max(window, 1)).float()
    with torch.no_grad():
        torch.testing.assert_close(model.hidden(tokens, window), expected, rtol=1e-4, atol=1e-5)
        by_tensor = model.hidden(tokens, torch.tensor(window, dtype=torch.int32))  # as a compiled model is called
        torch.testing.assert_close(by_tensor, expected, rtol=1e-4, atol=1e-5)


def test_the_future_and_other_documents_do_not_matter():
    model = fill(GPT(tiny()))
    tokens, _ = batch()
    tokens[1:] = torch.where(tokens[1:] == BOS, 0, tokens[1:])
    tokens[40] = BOS
    with torch.no_grad():
        before = model.logits(tokens, 8)
        changed = tokens.clone()
        changed[20] = 7
        after = model.logits(changed, 8)
    assert torch.equal(after[:20], before[:20]) and torch.equal(after[40:], before[40:])
    assert not torch.isclose(after[20:40], before[20:40]).all(-1).any()


def test_micro_batches_side_by_side_are_micro_batches_in_turn():
    """Each starts with a BOS on a block boundary, so documents keep them apart; positions matter only relatively."""
    model = fill(GPT(tiny()))
    parts = [batch(32, seed) for seed in range(3)]
    results = []
    for groups in ([[part] for part in parts], [parts]):
        model.zero_grad()
        loss = sum(model(torch.cat([x for x, _ in g]), torch.cat([y for _, y in g]), 3) for g in groups)
        loss.backward()
        results.append((loss, {name: p.grad.clone() for name, p in model.named_parameters()}))
    (loss, grads), (packed_loss, packed) = results
    torch.testing.assert_close(packed_loss, loss, rtol=1e-6, atol=0)
    for name, grad in grads.items():
        assert (packed[name] - grad).norm() <= 2e-5 * grad.norm(), name


# Details


def test_half_of_the_pairs_do_not_rotate_and_the_frequencies_include_both_ends():
    table = rotary_table(1025, 128, CPU)
    assert all(part.dtype == torch.float32 for part in table)
    cos, minus_sin = rotate(torch.tensor([1.0, 0.0]).repeat_interleave(64).expand(1025, 1, 128), table)[:, 0].chunk(
        2, -1
    )
    angle = torch.atan2(-minus_sin[1], cos[1])
    assert angle[0].item() == pytest.approx(1) and angle[31].item() == pytest.approx(1 / 1024)
    torch.testing.assert_close(angle[1:32] / angle[:31], torch.full((31,), 1024 ** (-1 / 31)), rtol=1e-5, atol=0)
    assert (cos[:, 32:] == 1).all() and not minus_sin[:, 32:].any()
    x = torch.randn(1025, 2, 128, generator=generator(0, "x"))
    y = rotate(x, table)
    still = [*range(32, 64), *range(96, 128)]
    assert torch.equal(y[..., still], x[..., still])
    moving = [c for c in range(128) if c not in still]
    assert (y[1:, :, moving] != x[1:, :, moving]).float().mean() > 0.99 and torch.equal(y[0], x[0])


def test_rotation_turns_each_pair_by_its_angle_and_its_gradient_back():
    x, grad = torch.randn(2, 9, 3, 16, generator=generator(0, "x"))
    x.requires_grad_()
    speed = torch.cat([(1 / 1024) ** torch.linspace(0, 1, 4, dtype=torch.float64), torch.zeros(4)])
    turn = torch.polar(torch.ones(1, dtype=torch.float64), -torch.arange(9)[:, None, None] * speed)

    def turned(pairs: Tensor, by: Tensor) -> Tensor:
        y = torch.complex(*pairs.double().chunk(2, -1)) * by
        return torch.cat([y.real, y.imag], -1).float()

    y = rotate(x, rotary_table(9, 16, CPU))
    torch.testing.assert_close(y, turned(x, turn))
    torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], turned(grad, turn.conj()))


@given(st.integers(0, 200), st.integers(0, 200), st.integers(0, 100))
@settings(deadline=None, max_examples=30)
def test_rotary_scores_depend_on_distance_only(q_at, k_at, shift):
    table = rotary_table(301, 16, CPU)
    q, k = torch.randn(2, 16, generator=generator(0, "qk"))

    def score(i: int, j: int) -> float:
        rows = torch.zeros(301, 2, 16)
        rows[i, 0], rows[j, 1] = q, k
        turned = rotate(rows, table)
        return (turned[i, 0] @ turned[j, 1]).item()

    assert score(q_at, k_at) == pytest.approx(score(q_at + shift, k_at + shift), abs=1e-4)


def test_rotation_is_computed_in_float32_and_returned_in_the_type_that_came():
    x = torch.randn(50, 1, 8, generator=generator(0, "x")).bfloat16()
    table = rotary_table(50, 8, CPU)
    assert torch.equal(rotate(x, table), rotate(x.float(), table).bfloat16())


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-4])  # at 1e-4 eps (1.2e-7) outweighs the mean square
def test_rms_norm_and_its_gradient_are_torchs_with_float32s_eps_in_every_type(dtype, tolerance, scale):
    x, grad = torch.randn(2, 4, 5, 64, generator=generator(0, "x"))
    x, grad = (x * scale).to(dtype).requires_grad_(), grad.to(dtype)
    y = rms_norm(x)
    got = torch.autograd.grad(y, x, grad)[0]
    exact = x.detach().float().requires_grad_()
    wanted = F.rms_norm(exact, (64,), eps=2**-23)
    wanted_grad = torch.autograd.grad(wanted, exact, grad.float())[0]
    assert y.dtype == got.dtype == dtype
    torch.testing.assert_close(y.float(), wanted, rtol=tolerance, atol=tolerance)
    assert (got.float() - wanted_grad).norm() <= tolerance * wanted_grad.norm()


def test_rms_norm_of_zero_is_zero():
    x = torch.zeros(2, 8, requires_grad=True)
    y = rms_norm(x)
    y.sum().backward()
    assert not y.any() and x.grad.isfinite().all()


def test_the_mlp_squares_its_relu():
    mlp = MLP(tiny())
    torch.nn.init.normal_(mlp.c_fc.weight, generator=generator(0, "fc"))
    torch.nn.init.normal_(mlp.c_proj.weight, generator=generator(0, "proj"))
    x = torch.randn(5, 32, generator=generator(0, "x"), requires_grad=True)
    inner = x @ mlp.c_fc.weight.T
    expected = torch.where(inner > 0, inner * inner, 0.0) @ mlp.c_proj.weight.T
    leaves = (x, mlp.c_fc.weight, mlp.c_proj.weight)
    grads = [torch.autograd.grad(out.square().sum(), leaves) for out in (mlp(x), expected)]
    torch.testing.assert_close(mlp(x), expected)
    torch.testing.assert_close(*grads)


def test_the_softcap_is_a_shifted_tanh():
    z = torch.linspace(-200, 200, 801)
    torch.testing.assert_close(
        softcap(z, 1 / 7.5), 15 * (torch.tanh(z.double() / 15) + 1).float(), rtol=1e-6, atol=1e-5
    )
    torch.testing.assert_close(softcap(z, 1 / 7.5), 30 * torch.sigmoid(z / 7.5))
    assert softcap(z.bfloat16(), 1.0).dtype == torch.float32


# The chunked loss


def loss_inputs(dtype: torch.dtype, weight_dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    rng = generator(0, "loss")
    x = rms_norm(torch.randn(37, 16, generator=rng)).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=rng).to(weight_dtype).requires_grad_()
    return x, weight, torch.randint(0, 50, (37,), generator=rng)


@pytest.mark.parametrize("rows", [1, 2, 7, 36, 37, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_chunked_loss_is_the_reference(rows, dtype):
    x, weight, targets = loss_inputs(dtype)
    scale = 1 / (7.5 * 4)
    expected = softcap_cross_entropy(x, weight, targets, scale)
    expected_grads = torch.autograd.grad(expected * 0.25, (x, weight))
    loss = SoftcapCrossEntropy.apply(x, weight, targets, scale, rows * 50)
    grads = torch.autograd.grad(loss * 0.25, (x, weight))
    assert loss.dtype == torch.float32 and loss.shape == ()
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    for grad, wanted in zip(grads, expected_grads, strict=True):
        assert grad.dtype == wanted.dtype
        # bf16: the reference rounds its gradient at other places
        assert (grad - wanted).float().norm() <= (1e-6 if dtype == torch.float32 else 8e-3) * wanted.float().norm()


def exact_loss(x: Tensor, weight: Tensor, targets: Tensor, scale: float) -> Tensor:
    """The definition, in float64."""
    logits = 30 / (1 + (-scale * x.double() @ weight.double().T).exp())
    return (logits.exp().sum(-1).log() - logits[torch.arange(len(x)), targets]).sum()


@pytest.mark.parametrize("weight_scale", [1.0, 30.0])  # at 30 most logits are at the cap
def test_the_losss_gradients_are_finite_differences_of_the_definition(weight_scale):
    x, weight, targets = loss_inputs(torch.float32)
    weight = (weight.detach() * weight_scale).requires_grad_()
    loss = SoftcapCrossEntropy.apply(x, weight, targets, 1 / 30, 7 * 50)
    with torch.no_grad():
        assert loss.item() == pytest.approx(exact_loss(x, weight, targets, 1 / 30).item(), rel=1e-6)
        for tensor, grad in zip((x, weight), torch.autograd.grad(loss, (x, weight)), strict=True):
            for trial in range(5):
                along = torch.randn(tensor.shape, generator=generator(trial, "along"), dtype=torch.float64)
                step = 1e-6 * along
                ahead, behind = (
                    exact_loss(x + s if tensor is x else x, weight + s if tensor is weight else weight, targets, 1 / 30)
                    for s in (step, -step)
                )
                slope = ((ahead - behind) / 2e-6).item()
                assert (grad.double() * along).sum().item() == pytest.approx(slope, abs=1e-5 * grad.norm().item() * 10)


def test_the_loss_of_bfloat16_weights_has_bfloat16_gradients():
    x, weight, targets = loss_inputs(torch.bfloat16, torch.bfloat16)
    SoftcapCrossEntropy.apply(x, weight, targets, 1 / 30, 7 * 50).backward()
    assert x.grad.dtype == weight.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("frozen", ["x", "weight"])
def test_the_loss_leaves_out_a_gradient_that_nobody_wants(frozen):
    x, weight, targets = loss_inputs(torch.float32)
    full = torch.autograd.grad(softcap_cross_entropy(x, weight, targets, 1 / 30), (x, weight))
    {"x": x, "weight": weight}[frozen].requires_grad_(False)
    SoftcapCrossEntropy.apply(x, weight, targets, 1 / 30, 7 * 50).backward()
    assert (x.grad is None) == (frozen == "x") and (weight.grad is None) == (frozen == "weight")
    torch.testing.assert_close(x.grad if frozen == "weight" else weight.grad, full[frozen == "x"])


class PeakBytes(TorchDispatchMode):
    """The most bytes alive at once in tensors that operators made, backward pass included."""

    def __init__(self) -> None:
        super().__init__()
        self.alive = self.peak = 0
        self.known: set[int] = set()

    def _freed(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.alive -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor) and func.is_view is False and x.untyped_storage()._cdata not in self.known:
                storage = x.untyped_storage()
                self.known.add(storage._cdata)
                self.alive += storage.nbytes()
                weakref.finalize(storage, self._freed, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.alive)
        return out


def peak_bytes(work: Callable[[], object]) -> int:
    with PeakBytes() as memory:
        work()
    return memory.peak


def test_the_chunked_loss_never_holds_all_logits():
    T, D, V = 512, 8, 1024
    rng = generator(0, "memory")
    x, weight = (torch.randn(n, D, generator=rng).requires_grad_() for n in (T, V))
    targets = torch.randint(0, V, (T,), generator=rng)
    logits = 4 * T * V
    reference = peak_bytes(lambda: softcap_cross_entropy(x, weight, targets, 0.1).backward())
    loss = SoftcapCrossEntropy.apply
    whole = peak_bytes(lambda: loss(x, weight, targets, 0.1, T * V).backward())
    chunked = peak_bytes(lambda: loss(x, weight, targets, 0.1, T * V // 16).backward())
    assert reference > 2 * logits and whole > 2 * logits
    assert chunked < logits / 2 and chunked < whole / 5


class Products(TorchDispatchMode):
    """Counts matrix products."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        aten = torch.ops.aten
        self.count += func.overloadpacket in (aten.mm, aten.addmm, aten.matmul, aten.linear)
        return func(*args, **(kwargs or {}))


def test_evaluation_does_not_compute_the_heads_gradients():
    """In training they are two products beside the loss. no_grad alone does not tell a Function to leave them out."""
    model = fill(GPT(tiny()))
    losses, counts = [], []
    for mode in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with mode(), Products() as products:
            losses.append(model(*batch(), 3).item())
        counts.append(products.count)
    assert len(set(losses)) == 1
    assert counts == [counts[0], counts[0] - 2, counts[0] - 2]


def test_a_model_that_predicts_first_trains_all_the_same():
    """What is made in inference mode and kept must not be of that mode."""
    model = fill(GPT(tiny()))
    rotary_table.cache_clear()
    with torch.inference_mode():
        model(*batch(), 3)
    model(*batch(), 3).backward()


def test_the_models_loss_is_that_of_its_logits_for_any_budget(monkeypatch):
    model = fill(GPT(tiny()))
    tokens, targets = batch()
    with torch.no_grad():
        expected = F.cross_entropy(model.logits(tokens, 3), targets, reduction="sum")
        for budget in (1, 10 * 384, 2**24):
            monkeypatch.setattr(head_module, "LOGIT_BUDGET", budget)
            torch.testing.assert_close(model(tokens, targets, 3), expected)


# muP in the model


@pytest.mark.slow
@pytest.mark.parametrize("hidden", ["muon", "adam"])
def test_at_base_width_all_parametrizations_are_the_record_bit_for_bit(hidden):
    """Logits, gradients and parameters after three updates; torch.equal, not close."""
    results = {}
    for name in PARAMETRIZATIONS:
        model = fill(GPT(tiny(parametrization=name, width=48, base_width=48), seed=5))
        train(model, 3, hidden)
        with torch.no_grad():
            logits = model.logits(batch(seed=9)[0], 3)
        state = {name: (p.detach(), p.grad) for name, p in model.named_parameters()}
        results[name] = (logits, state, model.logit_scale)
    logits, state, scale = results["record26"]
    assert scale == 1 / (7.5 * math.sqrt(48))
    for name, (other_logits, other_state, other_scale) in results.items():
        assert other_scale == scale and torch.equal(other_logits, logits), name
        for parameter, pair in state.items():
            assert all(map(torch.equal, pair, other_state[parameter])), (name, parameter)


def test_at_another_width_they_differ():
    scales = {name: GPT(tiny(parametrization=name, width=128)).logit_scale for name in ("mup", "record26", "sp")}
    assert len(set(scales.values())) == 3


@pytest.mark.parametrize(
    ("name", "divisor"),
    [
        ("mup", 7.5 * math.sqrt(32) * 4),
        ("muon-over-m", 7.5 * math.sqrt(32) * 4),
        ("record26", 7.5 * math.sqrt(128)),  # what it was published with: sqrt of its own width
        ("head-sqrt", 7.5 * math.sqrt(128)),
        ("sp", 7.5 * math.sqrt(32)),
    ],
)
def test_the_divisor_of_the_head_at_four_times_the_base_width(name, divisor):
    """In both code paths: the one that trains and the one that predicts."""
    model = fill(GPT(tiny(width=128, parametrization=name)))
    tokens, targets = batch()
    with torch.no_grad():
        z = model.hidden(tokens, 3) @ model.lm_head.weight.T
        expected = 30 * torch.sigmoid(z / divisor)
        torch.testing.assert_close(model.logits(tokens, 3), expected)
        torch.testing.assert_close(model(tokens, targets, 3), F.cross_entropy(expected, targets, reduction="sum"))


@pytest.mark.parametrize("name", ["mup", "sp", "record26"])
def test_hidden_init_falls_with_the_root_of_width_and_embeddings_do_not(name):
    narrow, wide = (dict(GPT(tiny(parametrization=name, width=w)).named_parameters()) for w in (32, 128))
    for key in ("blocks.0.attn.qkv_w", "blocks.0.mlp.c_fc.weight"):
        assert (wide[key].std() / narrow[key].std()).item() == pytest.approx(0.5, rel=0.05)
    assert (wide["embed.weight"].std() / narrow["embed.weight"].std()).item() == pytest.approx(1, rel=0.03)


def test_every_parameter_has_a_role_and_multipliers():
    model = GPT(tiny(width=128))
    for name, _, spec in mup.named_specs(model):
        role = Role.HIDDEN if name.startswith("blocks.") else Role.OUTPUT if name == "lm_head.weight" else Role.INPUT
        role = Role.SCALAR if name in SCALARS else role
        assert spec.role is role, name
        assert (spec.m_in, spec.m_out) == (
            4 if role in (Role.HIDDEN, Role.OUTPUT) else 1,
            4 if role in (Role.HIDDEN, Role.INPUT) else 1,
        ), name


# The head in 8 bits, and fused


@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("grad_s", [None, 1 / 448])
def test_the_two_ways_to_a_chunks_loss_and_gradient_agree(wanted, grad_s):
    z = 40 * torch.randn(37, 50, generator=generator(0, "z"))
    targets = torch.randint(0, 50, (37,), generator=generator(0, "targets"))
    results = [
        way(z.clone(), targets, 1 / 7.5, wanted, grad_s) for way in (loss_and_gradient, loss_and_gradient_in_place)
    ]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-5)
    if not wanted:
        assert results[0][1] is results[1][1] is None
    elif grad_s is None:
        torch.testing.assert_close(results[0][1], results[1][1], rtol=1e-5, atol=1e-6)
    else:
        assert results[0][1].dtype == results[1][1].dtype == torch.float8_e5m2
        torch.testing.assert_close(results[0][1].float(), results[1][1].float(), rtol=0.25, atol=0)  # one unit at most


@pytest.mark.parametrize("rows", [16, 32, 64])
def test_the_loss_in_8_bits_is_the_reference_within_rounding(rows):
    """0.1 % of the loss, 10 % of a gradient's length: that is what 3 and 2 bits of mantissa do to it."""
    rng = generator(0, "loss8")
    x = rms_norm(torch.randn(64, 128, generator=rng)).bfloat16().requires_grad_()
    weight = torch.randn(384, 128, generator=rng).requires_grad_()
    targets = torch.randint(0, 384, (64,), generator=rng)
    scale = 1 / (7.5 * math.sqrt(128))
    expected = softcap_cross_entropy(x.float(), weight, targets, scale)
    wanted = torch.autograd.grad(expected, (x, weight))
    loss = SoftcapCrossEntropy.apply(x, weight, targets, scale, rows * 384, head_scales(128, 1.0))
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3) and loss.item() != expected.item()
    for grad, exact in zip(torch.autograd.grad(loss, (x, weight)), wanted, strict=True):
        assert grad.dtype == exact.dtype
        assert (grad - exact).float().norm() < 0.1 * exact.float().norm()


@pytest.mark.slow
def test_a_model_with_an_8_bit_head_trains_like_one_without_and_validates_without():
    losses = {}
    for fp8 in (False, True):
        model = GPT(tiny(fp8=fp8))
        train(model, 4)
        with torch.no_grad():
            losses[fp8] = model(*batch(seed=9), 3).item()
            expected = F.cross_entropy(model.logits(batch(seed=9)[0], 3), batch(seed=9)[1], reduction="sum")
            assert losses[fp8] == pytest.approx(expected.item(), rel=1e-6)
    assert losses[True] != losses[False]
    assert losses[True] == pytest.approx(losses[False], rel=0.02)


@pytest.mark.parametrize("width", [32, 128])
def test_the_scale_of_8_bit_gradients_follows_the_parametrization(width):
    m = width / 32
    for name, factor in (("mup", 1 / m), ("record26", m**-0.5), ("sp", 1.0)):
        assert GPT(tiny(width=width, parametrization=name, fp8=True)).lm_head.fp8_scales.grad == pytest.approx(
            factor / 448
        )


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 3])
def test_all_that_is_fast_on_a_gpu_at_once_is_the_dense_model_in_float32(window):
    """FlexAttention, bfloat16, 8-bit head, compiler: the loss within 1 %, gradients within 10 % of their length, scalars 30."""
    cfg = tiny(width=256, base_width=256, head_dim=64, block_size=128, attention="dense")
    tokens, targets = (x.cuda() for x in batch(1024))
    exact = fill(GPT(cfg)).cuda()
    fast = GPT(dataclasses.replace(cfg, attention="flex", embed_dtype=torch.bfloat16, fp8=True)).cuda()
    fast.load_state_dict(exact.state_dict())
    fast.compile()
    losses = [exact(tokens, targets, window), fast(tokens, targets, torch.full((), window, dtype=torch.int32).cuda())]
    assert losses[1].item() == pytest.approx(losses[0].item(), rel=0.01)
    for loss in losses:
        loss.backward()
    for (name, p), q in zip(exact.named_parameters(), fast.parameters(), strict=True):
        assert (q.grad.float() - p.grad).norm() < (0.3 if name in SCALARS else 0.1) * p.grad.norm(), name
    with torch.no_grad():
        validated = fast(tokens, targets, torch.full((), window, dtype=torch.int32).cuda())
    assert validated.item() == pytest.approx(losses[0].item(), rel=0.01)


@pytest.mark.parametrize("backend", ["blocked", "dense"])
@pytest.mark.parametrize("window", [1, 2, 5])
@torch.no_grad()
def test_logits_take_any_length_and_see_nothing_beyond_it(backend, window):
    """A prediction depends on what comes before it only, so a shorter sequence gives the beginning of a longer one's."""
    model = fill(GPT(tiny(attention=backend)))
    tokens = batch(24, seed=5)[0]
    whole = model.logits(tokens, window)
    for length in range(25):
        part = model.logits(tokens[:length], window)
        assert part.shape == (length, 384)
        torch.testing.assert_close(part, whole[:length])
