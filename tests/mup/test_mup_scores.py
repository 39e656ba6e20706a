"""What goes into the softmax of torch's attention must be seen, and seeing it must not change anything."""

import contextlib
import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right

from speedrun_mup import coord_check as cc
from speedrun_mup.coord_check.observe import CheckSetup, Observer
from speedrun_mup.core import mup
from speedrun_mup.core.mup.compat.coord_check import get_coord_data
from speedrun_mup.core.mup.compat.scores import AttentionScores

BASE, HEADS, VOCAB, TIME = 32, 2, 8, 4


def seen_in(model, forward):
    """[(name, scores)] of what is seen while `forward` runs."""
    seen = []
    with AttentionScores(model, lambda name, scores: seen.append((name, scores))):
        forward()
    return seen


def scores_of(*args, **kwargs):
    ((name, scores),) = seen_in(nn.Identity(), lambda: F.scaled_dot_product_attention(*args, **kwargs))
    assert name == "scores" and not scores.requires_grad
    return scores


def reference(q, k, scale):
    """Scores (B, H, L, S) of q (B, H, L, E) and k (B, H / groups, S, E), a head and a batch at a time."""
    groups = q.size(1) // k.size(1)
    heads = [[scale * q[b, h] @ k[b, h // groups].T for h in range(q.size(1))] for b in range(len(q))]
    return torch.stack([torch.stack(head) for head in heads])


@pytest.fixture
def qkv():
    torch.manual_seed(0)
    return (torch.randn(3, 4, length, 8, requires_grad=True) for length in (5, 7, 7))


def test_every_score_counts_without_a_mask(qkv):
    q, k, v = qkv
    torch.testing.assert_close(scores_of(q, k, v), reference(q, k, 8**-0.5).flatten())
    torch.testing.assert_close(scores_of(q, k, v, scale=0.3), reference(q, k, 0.3).flatten())
    torch.testing.assert_close(scores_of(q, k, v, scale=-0.3), reference(q, k, -0.3).flatten())
    torch.testing.assert_close(scores_of(value=v, key=k, query=q), reference(q, k, 8**-0.5).flatten())


def test_what_is_causal_counts_the_past_only(qkv):
    q, k, v = qkv
    scores = reference(q, k, 8**-0.5)
    past = torch.tensor([[j <= i for j in range(7)] for i in range(5)])
    torch.testing.assert_close(scores_of(q, k, v, is_causal=True), scores[:, :, past].flatten())
    torch.testing.assert_close(scores_of(q, k, v, None, 0.0, True), scores[:, :, past].flatten())
    lower_right = torch.tensor([[j <= i + 2 for j in range(7)] for i in range(5)])
    bias = causal_lower_right(5, 7)
    torch.testing.assert_close(scores_of(q, k, v, bias), scores[:, :, lower_right].flatten())


def test_masks_hide_where_they_are_false_or_minus_infinity_and_are_not_added(qkv):
    q, k, v = qkv
    scores = reference(q, k, 8**-0.5)
    one = torch.rand(5, 7) < 0.5
    each = torch.rand(3, 1, 5, 7) < 0.5
    added = torch.where(each, torch.randn(3, 1, 5, 7), -math.inf)
    torch.testing.assert_close(scores_of(q, k, v, one), scores[:, :, one].flatten())
    torch.testing.assert_close(scores_of(q, k, v, attn_mask=each), scores[each.expand_as(scores)])
    torch.testing.assert_close(scores_of(q, k, v, added), scores[each.expand_as(scores)])
    assert seen_in(nn.Identity(), lambda: F.scaled_dot_product_attention(q, k, v, one & False)) == []


def test_a_mask_of_lowest_numbers_hides_as_well(qkv):
    q, k, v = qkv
    seen = torch.rand(5, 7) < 0.5
    lowest = torch.zeros(5, 7).masked_fill(~seen, torch.finfo(torch.float32).min)
    torch.testing.assert_close(scores_of(q, k, v, lowest), reference(q, k, 8**-0.5)[:, :, seen].flatten())


def test_scores_are_in_float32_under_autocast(qkv):
    q, k, v = qkv
    with torch.autocast("cpu", torch.bfloat16):
        scores = scores_of(q, k, v)
    torch.testing.assert_close(scores, reference(q, k, 8**-0.5).flatten())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own look at it
@pytest.mark.parametrize("kind", ["sdpa", "mha"])
def test_scores_of_a_compiled_model_are_those_of_the_plain_one(qkv, kind):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2)

        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v) if kind == "sdpa" else self.inner(q[0], k[0], v[0])[0]

    model, (q, k, v) = Attends(), (x.detach() for x in qkv)
    x = (q[..., :5, :], k[..., :5, :], v[..., :5, :])
    ((_, plain),) = seen_in(model, lambda: model(*x))
    compiled = torch.compile(model, backend="eager")
    ((_, scores),) = seen_in(compiled, lambda: compiled(*x))
    torch.testing.assert_close(scores, plain)


def test_a_module_that_raises_gives_nobody_its_name(qkv):
    class Caught(nn.Module):
        def __init__(self):
            super().__init__()
            self.raises = nn.Identity()
            self.raises.forward = lambda x: 1 / 0

        def forward(self, q, k, v):
            with contextlib.suppress(ZeroDivisionError):
                self.raises(q)
            return F.scaled_dot_product_attention(q, k, v)

    model = Caught()
    assert [name for name, _ in seen_in(model, lambda: model(*qkv))] == ["scores"]


def test_queries_share_keys_in_grouped_attention(qkv):
    q, k, v = qkv
    k, v = k[:, :2], v[:, :2]
    torch.testing.assert_close(scores_of(q, k, v, enable_gqa=True), reference(q, k, 8**-0.5).flatten())


def test_half_precision_is_taken_in_float32(qkv):
    q, k, v = (x.bfloat16() for x in qkv)
    torch.testing.assert_close(scores_of(q, k, v), reference(q.float(), k.float(), 8**-0.5).flatten())


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("options", [{}, {"batch_first": True}, {"add_bias_kv": True, "add_zero_attn": True}])
def test_multi_head_attention_is_seen(need_weights, options):
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(8, 2, dropout=0.1, **options)
    x = torch.randn(5, 3, 8)
    q, k = F.linear(x, attention.in_proj_weight[:16], attention.in_proj_bias[:16]).chunk(2, dim=-1)
    layout = (0, 2, 1, 3) if options.get("batch_first") else (1, 2, 0, 3)
    q, k = (y.unflatten(-1, (2, 4)).permute(layout) for y in (q, k))
    scores = reference(q, k, 4**-0.5)
    hidden = torch.ones(scores.shape[2:], dtype=torch.bool).triu(1)
    for mask in (hidden, torch.randn(hidden.shape).masked_fill(hidden, -math.inf)):
        forward = partial(attention, x, x, x, need_weights=need_weights, attn_mask=mask)
        ((name, found),) = seen_in(nn.ModuleList([attention]), forward)
        assert name == "0.scores"
        torch.testing.assert_close(found, scores[:, :, ~hidden].flatten())
    if not options.get("add_bias_kv"):
        ((_, found),) = seen_in(attention, lambda: attention(x, x, x, need_weights=need_weights))
        torch.testing.assert_close(found, scores.flatten())


def test_a_boolean_mask_of_the_function_behind_it_hides_where_it_is_true():
    torch.manual_seed(0)
    a, x = nn.MultiheadAttention(8, 2), torch.randn(5, 3, 8)
    hidden = torch.ones(5, 5, dtype=torch.bool).triu(1)
    projections = a.in_proj_weight, a.in_proj_bias, None, None, False, 0.0, a.out_proj.weight, a.out_proj.bias
    found = [
        seen_in(a, partial(F.multi_head_attention_forward, x, x, x, 8, 2, *projections, attn_mask=mask))[0][1]
        for mask in (hidden, torch.zeros(5, 5).masked_fill(hidden, -math.inf))
    ]
    assert len(found[0]) == 6 * 15 and torch.equal(*found)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_left_alone():
    x = torch.nested.nested_tensor([torch.randn(4, 2, 8), torch.randn(6, 2, 8)], layout=torch.jagged).transpose(1, 2)
    assert seen_in(nn.Identity(), lambda: F.scaled_dot_product_attention(x, x, x)) == []


class Nested(nn.Module):
    """Attention in a layer of torch's, in a module twice, and in the model itself after the module has run."""

    class Twice(nn.Module):
        def forward(self, x):
            y = F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)
            return F.scaled_dot_product_attention(x, y, x)

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16), self.Twice()])

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return F.scaled_dot_product_attention(x, x, x)


def test_scores_are_named_by_the_innermost_module():
    model, x = Nested(), torch.randn(5, 3, 8)

    def forward():
        model(x)
        model.layers[1](x)
        F.scaled_dot_product_attention(x, x, x)

    expected = ["layers.0.self_attn.scores", "layers.1.scores", "layers.1.scores[1]", "scores"]
    assert [name for name, _ in seen_in(model, forward)] == [
        *expected,
        "layers.1.scores",
        "layers.1.scores[1]",
        "scores",
    ]


def test_outputs_gradients_and_random_numbers_are_those_without():
    model, x = Nested(), torch.randn(5, 3, 8)

    def run(watched):
        model.zero_grad()
        inputs = x.clone().requires_grad_()
        torch.manual_seed(1)
        with AttentionScores(model, lambda name, scores: None) if watched else contextlib.nullcontext():
            out = model(inputs)
        out.square().sum().backward()
        return [out, inputs.grad, torch.rand(1), *(p.grad for p in model.parameters())]

    assert all(torch.equal(one, other) for one, other in zip(run(False), run(True), strict=True))


# ---------------------------------------------------------------------------------------------------------------------
# In the coordinate checks


class Attention(nn.Module):
    """Two causal heads, wider in wider models. right: scores over the width of a head, else over its root."""

    def __init__(self, width, right):
        super().__init__()
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.scale = math.sqrt(BASE // HEADS) / (width // HEADS) if right else None

    def forward(self, x):
        """(B, T, D) -> (B, T, D)."""
        q, k, v = (y.unflatten(-1, (HEADS, -1)).transpose(1, 2) for y in self.qkv(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        return self.proj(y.transpose(1, 2).flatten(2))


class Model(nn.Module):
    def __init__(self, width, right):
        super().__init__()
        self.embed, self.place = nn.Embedding(VOCAB, width), nn.Embedding(TIME, width)
        self.attn = Attention(width, right)
        self.readout = mup.MuReadout(width, VOCAB, bias=False, readout_zero_init=True)

    def forward(self, tokens):
        """(B, T) -> (B, T, V)."""
        x = self.embed(tokens) + self.place(torch.arange(tokens.size(1)))
        return self.readout(x + self.attn(x))


def build(width, right):
    """In muP, with queries that start at zero."""
    model = mup.set_base_shapes(Model(width, right), Model(BASE, right), delta=Model(2 * BASE, right))
    for p in model.attn.parameters():
        mup.init.normal_(p, std=BASE**-0.5)
    with torch.no_grad():
        model.attn.qkv.weight[:width] = 0
    return model


def batches(number):
    """Tokens (B, T) at random; the one before is to be predicted."""
    return torch.randint(0, VOCAB, (number, 32, TIME), generator=torch.Generator().manual_seed(0))


def loss(model, tokens):
    return F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(1, dims=1).flatten())


@pytest.mark.slow
@pytest.mark.parametrize("right", [True, False])
def test_heads_that_widen_need_another_scale_than_the_default(right):
    result = cc.coord_check(
        partial(build, right=right),
        [32, 64, 128, 256],
        batches(9),
        loss,
        lambda model: mup.MuAdam(model, lr=0.01),
        steps=8,
        seeds=2,
        progress=False,
    )
    failed = [row.kind for row in result.arm.rows if row.verdict is cc.CheckVerdict.FAIL]
    assert failed == ([] if right else ["attn.scores"]), result.summary()
    assert result.verdict is (cc.CheckVerdict.PASS if right else cc.CheckVerdict.FAIL), result.summary()
    assert ("attn.scores: if heads widen with the model, scale scores by 1 / head_dim" in result.summary()) == (
        not right
    )
    (scores,) = (row for row in result.arm.rows if row.kind == "attn.scores")
    assert scores.quantity == "activation" and scores.slope == pytest.approx(0.0 if right else 0.5, abs=0.15)


def test_get_coord_data_has_scores_too():
    pytest.importorskip("pandas")

    def make():
        torch.manual_seed(0)
        return build(64, right=True)

    (tokens,) = batches(1)
    options = {"nsteps": 2, "lossfn": lambda out, target: out.square().mean(), "show_progress": False}
    check = partial(get_coord_data, {64: make}, [(tokens, tokens)], "adam", **options)
    model = make()
    ((name, scores),) = seen_in(model.attn, lambda: model.attn(model.embed(tokens) + model.place(torch.arange(TIME))))
    df = check(output_fdict={"size": "l2"})
    found = df[df["module"] == f"attn.{name}"]
    assert list(found["t"]) == [1, 2] and found["size"].iloc[0] == pytest.approx(scores.square().mean().sqrt().item())
    assert set(check(filter_module_by_name=lambda name: name == "embed")["module"]) == {"embed"}


class Prompted(nn.Module):
    """Keys that are a parameter, and torch's own attention."""

    def __init__(self, mask, dropout):
        super().__init__()
        self.mask = mask
        self.keys = nn.Parameter(torch.randn(5, 8))
        self.attention = nn.MultiheadAttention(8, 2, dropout=dropout)
        mup.declare(self, "keys", mup.Role.INPUT, (5, 8), "n out")
        for name, p in list(self.attention.named_parameters()):
            owner, _, local = name.rpartition(".")
            role, layout = (mup.Role.HIDDEN, "out in") if p.ndim == 2 else (mup.Role.INPUT, "out")
            mup.declare(self.attention.get_submodule(owner), local, role, tuple(p.shape), layout)

    def forward(self, x):
        x = F.scaled_dot_product_attention(x, self.keys, self.keys)
        return self.attention(x, x, x, attn_mask=self.mask)[0]


@pytest.mark.parametrize(
    ("mask", "dropout"), [(None, 0.0), (torch.ones(3, 3, dtype=torch.bool).triu(1), 0.0), (None, 0.5)]
)
def test_the_checks_own_products_are_not_taken_for_the_models(mask, dropout):
    def effects(watched):
        torch.manual_seed(0)
        model, x = Prompted(mask, dropout), torch.randn(3, 8)
        no_taps = lambda model, record: None  # noqa: E731
        observer = Observer(model, CheckSetup(None, [[]], no_taps, lambda model: {}, cc.SlopeThresholds()))
        observer.scores = observer.scores if watched else contextlib.nullcontext()
        observer.look(0, lambda: model(x))
        return {key: at[0] for key, at in observer.found.values.items() if key[0] == "effect"}

    assert effects(True) == effects(False)
