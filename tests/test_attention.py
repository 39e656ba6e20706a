"""One mask rule, checked pair by pair in plain Python; every backend then has to agree with it."""

from __future__ import annotations

import warnings
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from speedrun_mup.core.model.attention import (
    BACKENDS,
    Blocked,
    Dense,
    Flex,
    block_lists,
    document_numbers,
    may_attend,
)

BOS = 3
SCALE = 0.12


class Case(NamedTuple):
    """Where documents open in a sequence of whole blocks, and the window in blocks."""

    opens: list[bool]
    block_size: int
    window: int

    @property
    def doc(self) -> Tensor:
        return document_numbers(torch.where(torch.tensor(self.opens), BOS, 0).int(), BOS)


@st.composite
def cases(draw, most_blocks: int = 8) -> Case:
    """Any documents (one-token ones and tokens before the first BOS included) and windows from 0 to past the end."""
    block_size, blocks = draw(st.sampled_from([1, 2, 3, 4, 8])), draw(st.integers(1, most_blocks))
    length = block_size * blocks
    dense = st.lists(st.booleans(), min_size=length, max_size=length)
    sparse = st.sets(st.integers(0, length - 1), max_size=3).map(lambda at: [t in at for t in range(length)])
    return Case(draw(dense | sparse), block_size, draw(st.integers(0, blocks + 2)))


def brute_force(case: Case) -> Tensor:
    """(T, T) bool: the rule of record 26, one pair at a time, from the tokens themselves."""
    length = len(case.opens)
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(q + 1):
            same_document = True
            for t in range(k + 1, q + 1):
                same_document &= not case.opens[t]
            blocks_apart = q // case.block_size - k // case.block_size
            allowed[q, k] = same_document and blocks_apart < max(case.window, 1)
    return allowed


def dense_mask(case: Case) -> Tensor:
    return Dense().build_mask(case.doc, case.window, case.block_size)


def heads(length: int, count: int, head_dim: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """q, k, v (T, H, C) and the gradient of the output."""
    rng = torch.Generator().manual_seed(length + 31 * count + 977 * head_dim)
    return [torch.randn(length, count, head_dim, generator=rng).to(dtype) for _ in range(4)]


# The rule


@pytest.mark.slow
@given(cases())
@settings(deadline=None)
@example(Case([False] * 6, 2, 0))
@example(Case([False, True, True, True, False, True], 3, 1))
def test_the_rule_is_the_brute_force_one(case):
    assert torch.equal(dense_mask(case), brute_force(case))


def test_a_bos_belongs_to_the_document_that_it_opens():
    tokens = torch.tensor([0, 1, BOS, 2, BOS, BOS, 1], dtype=torch.int32)
    assert document_numbers(tokens, BOS).tolist() == [0, 0, 1, 1, 2, 3, 3]
    assert document_numbers(tokens, BOS).dtype == torch.int32


@pytest.mark.parametrize("window", [0, 1, 2, 3])
def test_the_window_counts_blocks_and_below_1_means_1(window):
    """A query at offset r in its block sees r + 1 + block_size * (window - 1) keys."""
    seen = dense_mask(Case([False] * 40, 8, window)).sum(1)[-8:]
    assert seen.tolist() == [r + 1 + 8 * (max(window, 1) - 1) for r in range(8)]


@given(cases())
@settings(deadline=None, max_examples=30)
def test_a_window_in_a_tensor_is_the_same_window(case):
    tensor = torch.tensor(case.window, dtype=torch.int32)
    assert torch.equal(Dense().build_mask(case.doc, tensor, case.block_size), dense_mask(case))
    for a, b in zip(*(block_lists(case.doc, window, case.block_size) for window in (case.window, tensor)), strict=True):
        assert torch.equal(a, b)
    t = torch.arange(len(case.opens))
    by_tensor = may_attend(t[:, None], t, case.doc[:, None], case.doc, tensor, case.block_size)
    assert torch.equal(by_tensor, dense_mask(case))


# Dense and blocked


def test_dense_is_softmax_over_the_allowed_keys_one_query_at_a_time():
    case = Case([t in (2, 3, 9) for t in range(16)], 4, 2)
    allowed = brute_force(case)
    q, k, v, _ = heads(16, 2, 8)
    out = Dense().attend(q, k, v, dense_mask(case), SCALE)
    for t in range(16):
        for h in range(2):
            keys = [s for s in range(16) if allowed[t, s]]
            expected = (SCALE * k[keys, h] @ q[t, h]).softmax(0) @ v[keys, h]
            torch.testing.assert_close(out[t, h], expected)


@pytest.mark.slow
@given(cases(), st.integers(1, 3), st.sampled_from([1, 4, 6, 16]))
@settings(deadline=None, max_examples=60)
@example(Case([False] * 8, 4, 0), 1, 4)
@example(Case([True] * 8, 4, 9), 2, 4)
@example(Case([t == 3 for t in range(24)], 8, 2), 2, 16)
def test_blocked_is_dense_forward_and_backward(case, count, head_dim):
    *inputs, grad = heads(len(case.opens), count, head_dim)
    results = []
    blocked, tensor = Blocked(), torch.tensor(case.window, dtype=torch.int32)
    for backend, mask in (
        (Dense(), dense_mask(case)),
        (blocked, blocked.build_mask(case.doc, case.window, case.block_size)),
        (blocked, blocked.build_mask(case.doc, tensor, case.block_size)),
        (blocked, blocked.build_mask(case.doc, tensor, case.block_size, widest=case.window + 1)),
    ):
        leaves = [x.clone().requires_grad_() for x in inputs]
        out = backend.attend(*leaves, mask, SCALE)
        results.append([out, *torch.autograd.grad(out, leaves, grad)])
    for result in results[1:]:
        for got, expected in zip(result, results[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_blocked_masks_reach_no_further_than_the_widest_window():
    doc = document_numbers(torch.ones(64, dtype=torch.int32), 0)
    tensor = torch.ones((), dtype=torch.int32)
    shapes = [tuple(Blocked().build_mask(doc, tensor, 8, widest).shape) for widest in (0, 3, 99, None)]
    assert shapes == [(8, 1, 8, 8), (8, 1, 8, 24), (8, 1, 8, 64), (8, 1, 8, 64)]


def test_blocked_is_dense_in_bfloat16():
    case = Case([t in (0, 5, 40) for t in range(64)], 16, 2)
    q, k, v, _ = heads(64, 2, 32, torch.bfloat16)
    outs = [b.attend(q, k, v, b.build_mask(case.doc, 2, 16), SCALE) for b in (Dense(), Blocked())]
    assert outs[1].dtype == torch.bfloat16
    torch.testing.assert_close(outs[1], outs[0], rtol=0.02, atol=0.02)


class Largest(TorchDispatchMode):
    """Remembers the size in elements of the largest tensor that any operator returns, backward pass included."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else [out]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return out


def test_blocked_never_holds_a_tensor_of_t_by_t():
    T, B, W, H, C = 1024, 32, 2, 1, 16
    q, k, v, grad = heads(T, H, C)
    doc = document_numbers(torch.arange(T) % 300, 0)
    largest = {}
    for name in ("dense", "blocked"):
        backend = BACKENDS[name]()
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        with Largest() as seen:
            out = backend.attend(*leaves, backend.build_mask(doc, W, B), SCALE)
            torch.autograd.backward(out, grad)
        largest[name] = seen.numel
    assert largest["dense"] >= T * T
    assert largest["blocked"] <= 2 * T * W * B


# Block lists and FlexAttention


def expand(case: Case) -> Tensor:
    """(T, T) bool that the block lists stand for: full blocks whole, partial ones causally within the document."""
    n_partial, partial, n_full, full = (x.tolist() for x in block_lists(case.doc, case.window, case.block_size))
    B, doc = case.block_size, case.doc
    t = torch.arange(len(doc))
    allowed = torch.zeros(len(doc), len(doc), dtype=torch.bool)
    same = (t[:, None] >= t) & (doc[:, None] == doc)
    for i in range(len(doc) // B):
        rows = slice(i * B, (i + 1) * B)
        for j in partial[i][: n_partial[i]]:
            allowed[rows, j * B : (j + 1) * B] = same[rows, j * B : (j + 1) * B]
        for j in full[i][: n_full[i]]:
            allowed[rows, j * B : (j + 1) * B] = True
    return allowed


@pytest.mark.slow
@given(cases())
@settings(deadline=None)
@example(Case([False] * 12, 4, 0))
@example(Case([t == 5 for t in range(24)], 4, 3))
def test_block_lists_stand_for_the_rule(case):
    """The window is in the counts alone, as in the record."""
    assert torch.equal(expand(case), brute_force(case))


@pytest.mark.slow
@given(cases())
@settings(deadline=None)
def test_block_lists_are_nearest_first_and_never_negative(case):
    lists = block_lists(case.doc, case.window, case.block_size)
    n_partial, partial, n_full, full = lists
    assert {x.dtype for x in lists} == {torch.int32}
    assert n_full.min() >= 0 and n_partial.min() >= 1  # the diagonal block at least
    for i in range(len(n_full)):
        assert partial[i, 0] == i
        for count, order in ((n_partial[i], partial[i]), (n_full[i], full[i])):
            assert sorted(order.tolist()) == list(range(len(order)))
            used = order[:count].tolist()
            assert used == sorted(used, reverse=True) and all(i - max(case.window, 1) < j <= i for j in used)
    # A wider window changes counts only, so a compiled graph need not notice.
    wider = block_lists(case.doc, case.window + 1, case.block_size)
    assert torch.equal(partial, wider[1]) and torch.equal(full, wider[3])


@given(cases(most_blocks=5))
@settings(deadline=None, max_examples=25)
def test_the_mask_of_flex_is_the_rule_both_in_blocks_and_in_its_function(case):
    B, allowed = case.block_size, brute_force(case)
    n = len(allowed) // B
    mask = Flex().build_mask(case.doc, case.window, B)
    assert mask.shape == (1, 1, n * B, n * B) and mask.BLOCK_SIZE == (B, B)
    t = torch.arange(n * B)
    zero = torch.zeros((), dtype=torch.int32)
    assert torch.equal(mask.mask_mod(zero, zero, t[:, None], t[None, :]), allowed)
    assert torch.equal(mask.to_dense()[0, 0].bool(), allowed.view(n, B, n, B).any(3).any(1))


@pytest.mark.slow
def test_flex_is_dense_as_far_as_a_cpu_can_run_it():
    """Run eagerly it has no backward on a CPU and evaluates the mask function only, so the window has to be there."""
    case = Case([t in (0, 5, 40) for t in range(64)], 16, 2)
    q, k, v, _ = heads(64, 2, 16)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "flex_attention called without torch.compile", UserWarning)
        out = Flex().attend(q, k, v, Flex().build_mask(case.doc, 2, 16), SCALE)
    torch.testing.assert_close(out, Dense().attend(q, k, v, dense_mask(case), SCALE), rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("window", [1, 2, 5])
def test_compiled_flex_is_dense_on_a_gpu(window):
    T, B, H, C = 1024, 128, 2, 64
    *inputs, grad = (x.cuda() for x in heads(T, H, C))
    doc = document_numbers(torch.arange(T).remainder(300), 0).cuda()
    attend = torch.compile(lambda q, k, v, reach: Flex().attend(q, k, v, Flex().build_mask(doc, reach, B), SCALE))
    leaves = [[x.clone().requires_grad_() for x in inputs] for _ in range(2)]
    outs = [
        Dense().attend(*leaves[0], Dense().build_mask(doc, window, B), SCALE),
        attend(*leaves[1], torch.tensor(window, dtype=torch.int32, device="cuda")),
    ]
    torch.testing.assert_close(outs[1], outs[0], rtol=1e-2, atol=1e-2)
    grads = [torch.autograd.grad(out, own, grad) for out, own in zip(outs, leaves, strict=True)]
    for dense, flex in zip(*grads, strict=True):
        torch.testing.assert_close(flex, dense, rtol=2e-2, atol=2e-2)
