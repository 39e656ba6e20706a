"""Reading with a cache against the whole forward pass, which is its reference."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model import GPT, GPTConfig, TokenInputsConfig
from speedrun_mup.core.model.cache import Decoder
from speedrun_mup.core.model.options.gates import add_attention_gate
from speedrun_mup.techniques import TECHNIQUES
from speedrun_mup.training import train

BOS, BLOCK = 256, 16
# Both presets with every feature: the layer without attention, value embeddings, skips, long and short windows.
LAPTOP = {"n_layer": 6, "width": 64, "base_width": 32, "head_dim": 16}
RECORD = {"n_layer": 12, "width": 96, "base_width": 48, "head_dim": 48}
SHAPES = {
    "laptop": (LAPTOP | {"base_width": 64}, 4),
    "laptop, mup": (LAPTOP | {"parametrization": "mup"}, 4),
    "laptop, mup, narrow": (LAPTOP | {"parametrization": "mup", "width": 16, "base_width": 32}, 3),
    "record": (RECORD, 14),
    "record, mup": (RECORD | {"parametrization": "mup"}, 14),
    "record, mup, wide": (RECORD | {"parametrization": "mup", "width": 192}, 5),
    "laptop, mup, gate": (LAPTOP | {"parametrization": "mup", "gate": 12}, 4),
    "record, gate": (RECORD | {"gate": 12}, 6),
    "one block": (LAPTOP, 1),
    "two blocks": (LAPTOP, 2),
}


def build(gate: int = 0, **shape) -> GPT:
    """A model whose every parameter matters, as after training: at first many are zero. gate: channels."""
    cfg = GPTConfig(vocab_size=257, bos_token=BOS, block_size=BLOCK, **shape)
    model = GPT(add_attention_gate(cfg, gate) if gate else cfg, seed=1)
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=random)
            is_scalar = parameter.ndim == 1 or parameter.size(-1) == 2
            parameter.add_(noise * (0.3 if is_scalar else model.cfg.base_width**-0.5 if "embed" not in name else 1.0))
        model.lm_head.weight.mul_(10)
    return model


def text(length: int, seed: int = 0) -> Tensor:
    tokens = torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed))
    tokens[0] = BOS
    return tokens


def whole(model: GPT, tokens: Tensor, window: int) -> Tensor:
    """The reference: logits after every token, (T, V), by the dense mask over all of them."""
    with torch.no_grad():
        return model.logits(tokens.int(), window)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
def test_token_by_token_is_the_whole_pass(name):
    """Over more blocks than the window has, so that every cache has wrapped around."""
    shape, window = SHAPES[name]
    model, length = build(attention="dense", **shape), BLOCK * (window + 3) + 5
    tokens = text(length)
    expected = whole(model, tokens, window)
    decoder = Decoder(model, window)
    found = torch.cat([decoder(token.view(1, 1)) for token in tokens])
    assert expected.std() > 0.5 and expected.amax(dim=-1).std() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("length", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 5 * BLOCK + 7, 18 * BLOCK])
def test_at_once_is_token_by_token(name, length):
    """And so is at once up to some token, then the rest, wherever that is in a block."""
    shape, window = SHAPES[name]
    model, tokens = build(**shape), text(length)
    expected = whole(model, tokens, window)[-1:]
    for first in {length, 1, (length + 1) // 2}:
        decoder = Decoder(model, window)
        found = decoder(tokens[None, :first])
        if first < length:
            found = decoder(tokens[None, first:])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_texts_of_different_lengths_side_by_side_are_as_one_by_one():
    shape, window = SHAPES["laptop, mup"]
    model = build(**shape)
    lengths = (3, BLOCK, 5 * BLOCK + 1, 1, 90)
    texts = [text(length + 40, seed) for seed, length in enumerate(lengths)]
    decoders = [Decoder(model, window) for _ in texts]
    for decoder, tokens, length in zip(decoders, texts, lengths):
        decoder(tokens[None, :length])
    together, going = decoders[0], [*range(5)]
    together.join(decoders[1:])
    for step in range(40):
        if step == 20:  # the second and the fourth end
            together.take([0, 2, 4])
            going = [0, 2, 4]
        found = together(torch.stack([texts[i][lengths[i] + step : lengths[i] + step + 1] for i in going]))
        expected = torch.cat([whole(model, texts[i][: lengths[i] + step + 1], window)[-1:] for i in going])
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_several_ways_to_go_on_from_one_text():
    shape, window = SHAPES["record, mup"]
    model, start = build(**shape), text(37)
    decoder = Decoder(model, window)
    decoder(start[None])
    decoder.take([0, 0, 0])
    more = torch.stack([text(60, seed) % 256 for seed in (7, 8, 9)])
    found = [decoder(more[:, :30]), decoder(more[:, 30:31]), decoder(more[:, 31:])][-1]
    expected = torch.cat([whole(model, torch.cat([start, rest]), window)[-1:] for rest in more])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_bfloat16_is_close_to_the_whole_pass_in_bfloat16():
    model = build(embed_dtype=torch.bfloat16, **LAPTOP)
    tokens = text(100)
    found = Decoder(model, 4)(tokens[None])
    assert (found - whole(model, tokens, 4)[-1:]).abs().mean() < 0.05


def test_the_model_stays_as_it_is_and_its_weights_are_shared():
    model, tokens = build(**LAPTOP), text(30)
    before = {name: (parameter.data_ptr(), parameter.clone()) for name, parameter in model.named_parameters()}
    decoder = Decoder(model, 3)
    decoder(tokens[None])
    for name, parameter in model.named_parameters():
        assert parameter.data_ptr() == before[name][0] and torch.equal(parameter, before[name][1])
    shared = {parameter.data_ptr() for parameter in decoder.model.parameters()}
    assert shared == {pointer for pointer, _ in before.values()}
    model.train()
    model(tokens[:16].int(), tokens[1:17], 1).backward()
    assert all(parameter.grad is not None for parameter in model.blocks.parameters())


class WithPrevious(nn.Module):
    """A technique from outside: an embedding also holds some of the token before it."""

    def build(self, shape):
        return self

    def forward(self, rows, tokens):
        return rows + 0.5 * F.pad(rows[:-1], (0, 0, 1, 0))


def test_techniques_of_token_inputs_are_refused_in_one_line():
    """They may need earlier tokens, which a cache of keys and values does not hold."""
    cfg = GPTConfig(vocab_size=257, bos_token=BOS, block_size=BLOCK, **LAPTOP)
    model = GPT(replace(cfg, inputs=TokenInputsConfig(options=(WithPrevious(),))))
    assert len(whole(model, text(2 * BLOCK), 2)) == 2 * BLOCK  # it is evaluated as ever
    with pytest.raises(ConfigError, match=r"cannot write text: WithPrevious of its token inputs") as error:
        Decoder(model, 2)
    assert "\n" not in str(error.value)


class Counting(TorchDispatchMode):
    """Operations and the elements that they put out."""

    def __init__(self):
        super().__init__()
        self.calls, self.elements = Counter(), 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.calls[str(func)] += 1
        self.elements += sum(
            x.numel() for x in (out if isinstance(out, (tuple, list)) else [out]) if isinstance(x, Tensor)
        )
        return out


@pytest.mark.slow
def test_a_token_costs_the_same_at_any_length():
    """The operations of a token, what they put out, and the memory of keys and values."""
    shape, window = SHAPES["laptop, mup"]
    model, found = build(**shape), []
    for length in (window * BLOCK, 10 * window * BLOCK, 40 * window * BLOCK):
        decoder = Decoder(model, window)
        decoder(text(length)[None])
        with Counting() as counting:
            decoder(torch.tensor([[1]]))
        found.append((counting.calls, counting.elements, decoder.memory))
    assert found[0] == found[1] == found[2]
    layers = [block.attn.has_long_window for block in model.blocks if block.attn is not None]
    blocks = sum(window if long else window // 2 for long in layers)
    assert found[0][2] == 2 * 4 * blocks * BLOCK * model.cfg.width


def test_training_that_shows_samples_of_such_a_model_does_not_begin(tiny, monkeypatch):
    def with_previous(cfg, wanted):
        return replace(cfg, inputs=TokenInputsConfig(options=(WithPrevious(),)))

    monkeypatch.setitem(TECHNIQUES, "attention_gate", replace(TECHNIQUES["attention_gate"], model=with_previous))
    changes = {"data": "embedded", "width": 32, "attention_gate": 12}
    with pytest.raises(ConfigError, match="train without --sample-every"):
        train(tiny(sample_every=2, **changes))
    assert not (Path(tiny().out)).exists()
