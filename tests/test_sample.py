"""Drawing tokens, and text as it streams."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model import GPT, GPTConfig
from speedrun_mup.data.tokenizers import BpeTokenizer, ByteTokenizer, HfTokenizer
from speedrun_mup.sample.sampling import Sampling
from speedrun_mup.sample.stream import TextStream
from speedrun_mup.sample.writer import Writer, draw

TEXT = "def área(x):\n    return 'naïve 漢字 🎲', x\n👩‍👩‍👧 é"
GREEDY = Sampling(temperature=0.0, max_new_tokens=60)


def writer(seed: int = 0) -> Writer:
    model = GPT(GPTConfig(257, 256, n_layer=6, width=32, base_width=16, head_dim=16, block_size=16), seed)
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.2)
        model.lm_head.weight[256:] = 0  # BOS and the padding: unlikely
        model.lm_head.weight.mul_(5)
    return Writer(model, ByteTokenizer(), 3)


# ---------------------------------------------------------------------------------------------------------------------
# Drawing


def probabilities(logits: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """The reference: one token after the other, by the definitions of temperature, top-k and top-p."""
    order = sorted(range(len(logits)), key=lambda i: -logits[i].item())[: sampling.top_k or None]
    weights = [math.exp((logits[i] - logits.max()).item() / sampling.temperature) for i in order]
    kept, mass = [], 0.0
    for weight in weights:
        if mass >= sampling.top_p * sum(weights):
            break
        kept.append(weight)
        mass += weight
    found = torch.zeros(len(logits), dtype=torch.float64)
    for i, weight in zip(order, kept):
        found[i] = weight / mass
    return found


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1, 0, 1), (0.5, 0, 1), (1, 3, 1), (1, 0, 0.7), (2, 5, 0.6), (1, 99, 0.999), (4, 0, 0.7), (0.3, 0, 0.7)],
)
def test_tokens_are_drawn_with_their_probabilities(temperature, top_k, top_p):
    """A grid of uniform numbers gives each token its share of it, exactly to within the grid."""
    sampling, cells = Sampling(temperature=temperature, top_k=top_k, top_p=top_p), 20_000
    logits = torch.randn(12, generator=torch.Generator().manual_seed(1)) * 2
    uniform = (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
    drawn = draw(logits.expand(cells, 12), sampling, uniform)
    expected = probabilities(logits, sampling)
    torch.testing.assert_close(drawn.bincount(minlength=12) / cells, expected.float(), atol=2 / cells, rtol=0)


def test_temperature_zero_is_the_likeliest_and_so_is_one_of_one():
    logits = torch.randn(50, 9, generator=torch.Generator().manual_seed(2))
    uniform = torch.rand(50, dtype=torch.float64)
    for sampling in (Sampling(temperature=0), Sampling(top_k=1), Sampling(top_p=1e-9)):
        assert torch.equal(draw(logits, sampling, uniform), logits.argmax(dim=-1))


def test_the_smallest_random_number_draws_no_token_without_probability():
    logits, zero = torch.tensor([[-1e4, 0.0, 0.0]]), torch.zeros(1, dtype=torch.float64)
    assert draw(logits, Sampling(temperature=1, top_k=0, top_p=1), zero).tolist() == [1]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"temperature": -0.1}, "temperature=-0.1 must be finite and at least 0"),
        ({"temperature": float("nan")}, "temperature=nan must be"),
        ({"temperature": 1e-320}, "temperature=1e-320 must be 0 or at least 1e-6"),
        ({"top_p": 0.0}, r"top_p=0.0 must be in \(0, 1\]"),
        ({"top_p": 1.1}, r"top_p=1.1 must be in \(0, 1\]"),
        ({"top_k": -1}, "top_k=-1 must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0 must be at least 1"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
    ],
)
def test_settings_out_of_range_are_one_line(changes, says):
    with pytest.raises(ConfigError, match=says) as error:
        Sampling(**changes)
    assert "\n" not in str(error.value)


# ---------------------------------------------------------------------------------------------------------------------
# Writing


def greedy_by_whole_passes(own: Writer, prompt: str, count: int) -> list[int]:
    """The reference: the whole text through the model for every token."""
    ids = own.ids_of(prompt)
    for _ in range(count):
        with torch.no_grad():
            logits = own.model.logits(torch.tensor(ids, dtype=torch.int32), own.window)[-1, :257]
        ids.append(int(logits.argmax()))
    return ids[-count:]


@pytest.mark.slow
def test_greedy_tokens_are_those_of_whole_passes():
    own, prompts = writer(), ["def main", "x", "", "a longer beginning, over a block or two of sixteen"]
    found = list(own.tokens([own.ids_of(prompt) for prompt in prompts], GREEDY))
    assert len(found) == 60
    for number, prompt in enumerate(prompts):
        written = [tokens[number] for tokens in found]
        assert len(set(written)) > 3 and written == greedy_by_whole_passes(own, prompt, 60)


@pytest.mark.slow
def test_a_sample_depends_on_the_seed_and_its_number_only():
    own, sampling = writer(), Sampling(max_new_tokens=30, temperature=1.5, seed=5)
    four = own.generate(["ab"] * 4, sampling)
    assert len(set(four)) == 4 and own.generate(["ab"], sampling) == four[:1]
    assert own.generate(["ab", "other", "ab"], sampling)[2] == four[2]
    assert own.generate(["ab"], Sampling(max_new_tokens=30, temperature=1.5, seed=6)) != four[:1]


@pytest.mark.slow
def test_a_sample_ends_with_its_document():
    """BOS ends it and is not part of the text; the others go on as if nothing had been beside them."""
    own = writer()
    with torch.no_grad():
        own.model.lm_head.weight[256] = own.model.lm_head.weight[:256].mean(0) * 3
    sampling = Sampling(max_new_tokens=60, temperature=3.0, top_k=0, top_p=1.0, seed=3)
    prompts = [[256, 97, number] for number in range(12)]
    found = list(own.tokens(prompts, sampling))
    lengths = [sum(number in tokens for tokens in found) for number in range(12)]
    assert min(lengths) < 60 and len(set(lengths)) > 2 and 256 not in {t for tokens in found for t in tokens.values()}
    outlives = max(number for number in range(1, 12) if lengths[number] > min(lengths[:number]))  # one before it
    for number in {lengths.index(max(lengths)), lengths.index(min(lengths)), outlives}:
        alone = Writer(own.model, own.tokenizer, own.window)
        again = list(alone.tokens([prompts[number]] * (number + 1), sampling))
        assert [t[number] for t in again if number in t] == [t[number] for t in found if number in t]


@pytest.mark.slow
def test_the_padding_of_the_vocabulary_is_never_drawn():
    own = writer()
    with torch.no_grad():
        own.model.lm_head.weight[257:] = 2 * own.model.lm_head.weight[:127]
    for sampling in (GREEDY, Sampling(max_new_tokens=20, temperature=3, top_k=0, top_p=1)):
        assert all(token < 257 for tokens in own.tokens([[256, 97]], sampling) for token in tokens.values())


def test_a_chat_has_read_all_that_was_said():
    own, sampling = writer(), Sampling(temperature=0, max_new_tokens=7)
    with torch.no_grad():
        own.model.lm_head.weight[:32] = own.model.lm_head.weight[127:] = 0  # so that its text has its tokens
    first, second = ("".join(answer) for answer in own.chat(["def ", "class "], sampling))
    assert len(first) == len(second) == 7
    assert second == own.generate(["def " + first + "class "], sampling)[0]


def test_prompts_that_cannot_be_read_are_one_line():
    own = writer()
    with pytest.raises(ConfigError, match=r"'a\\udc80' is not UTF-8"):
        own.ids_of("a\udc80")
    for beyond in (300, 257):
        other = type("Wide", (ByteTokenizer,), {"encode": lambda self, text, id=beyond: [id]})()
        says = f"the prompt has token {beyond}, and the vocabulary of this model ends at 256"
        with pytest.raises(ConfigError, match=says):
            Writer(own.model, other, 3).ids_of("x")


# ---------------------------------------------------------------------------------------------------------------------
# Streaming


def hf_words() -> HfTokenizer:
    """A vocabulary with word starts and byte fallback: which text an id stands for depends on its place."""
    library = pytest.importorskip("tokenizers")
    vocab = {"<s>": 0, "<unk>": 1, **{f"<0x{byte:02X}>": 2 + byte for byte in range(256)}, "▁spam": 258, "▁": 259}
    inner = library.Tokenizer(library.models.BPE(vocab, [], byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = library.pre_tokenizers.Metaspace()
    inner.decoder = library.decoders.Sequence(
        [
            library.decoders.Replace("▁", " "),
            library.decoders.ByteFallback(),
            library.decoders.Fuse(),
            library.decoders.Strip(" ", 1, 0),
        ]
    )
    return HfTokenizer(inner.to_str(), "<s>")


def test_characters_that_are_cut_into_tokens_stream_whole(tmp_path: Path):
    pytest.importorskip("tiktoken")
    pytest.importorskip("rustbpe")
    bytelike = BpeTokenizer.train([TEXT * 3, "spam and eggs " * 30], 265)
    words = hf_words()
    spelled = [2 + byte for byte in " 漢字 🎲 é".encode()]
    for tokenizer, ids in ((ByteTokenizer(), None), (bytelike, None), (words, [258, 258, *spelled, 258])):
        ids = tokenizer.encode(TEXT) if ids is None else ids
        stream = TextStream(tokenizer)
        pieces = [stream.add(id) for id in ids] + [stream.end()]
        assert "".join(pieces) == tokenizer.decode(ids) and "\ufffd" not in "".join(pieces)
        assert "" in pieces[:-1]  # of a character's first bytes


@pytest.mark.parametrize("end", [1, 2, 3])
def test_a_character_that_never_ends_is_shown_as_broken(end):
    stream = TextStream(ByteTokenizer())
    assert "".join(map(stream.add, b"a" + "🎲".encode()[:end])) == "a" and stream.end() == "\ufffd"
    stream = TextStream(ByteTokenizer())
    assert "".join(map(stream.add, "🎲".encode()[:end] + b"b")) == "\ufffdb"
    words, stream = hf_words(), TextStream(hf_words())
    ids = [258, *(2 + byte for byte in "🎲".encode()[:end])]
    assert "".join(map(stream.add, ids)) + stream.end() == words.decode(ids)


def test_any_ids_stream_as_they_decode():
    random = np.random.default_rng(0)
    for _ in range(200):
        ids = random.integers(0, 256, random.integers(0, 12)).tolist()
        stream = TextStream(ByteTokenizer())
        assert "".join(map(stream.add, ids)) + stream.end() == ByteTokenizer().decode(ids), json.dumps(ids)
