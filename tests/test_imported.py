"""A run's folder from a .pt file: of modded-nanogpt's own kind, of ours, and of kinds that are refused."""

import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY
from torch import Tensor

from speedrun_mup import load_run
from speedrun_mup.cli import main
from speedrun_mup.config import make_config
from speedrun_mup.core.model import GPT, GPTConfig
from speedrun_mup.core.model.record import strip_compiled
from speedrun_mup.data.tokenizers import BpeTokenizer
from speedrun_mup.export.dcp import import_dcp
from speedrun_mup.export.record import NAMES
from speedrun_mup.training import train
from speedrun_mup.training.checkpoint import CheckpointError
from speedrun_mup.training.checkpoint_manifest import json_with_digest

WIDTH, LAYERS, ROWS = 32, 12, 384
SHAPE = ["--head-dim", "16", "--block-size", "16", "--window-tokens", "48"]


def of_upstream(width: int = WIDTH, layers: int = LAYERS, rows: int = ROWS, scalars: int = 64) -> dict[str, Tensor]:
    """A state dict as the record's 8 ranks save it: compiled names, embeddings in bfloat16, 64 scalars."""
    random = torch.Generator().manual_seed(0)
    shapes = {
        name: (rows, width)
        for name in ("embed.weight", "lm_head.weight", *(f"value_embeds.{i}.weight" for i in range(3)))
    }
    for i in range(layers):
        shapes |= {
            f"blocks.{i}.mlp.c_fc.weight": (4 * width, width),
            f"blocks.{i}.mlp.c_proj.weight": (width, 4 * width),
        }
        if i != layers // 2 + 1:
            shapes |= {f"blocks.{i}.attn.qkv_w": (3, width, width), f"blocks.{i}.attn.c_proj.weight": (width, width)}
    shapes["scalars"] = (scalars,)
    numbers = {name: torch.randn(shape, generator=random) * 0.3 for name, shape in shapes.items()}
    return {f"_orig_mod.{name}": x.bfloat16() if "embed" in name else x for name, x in numbers.items()}


@pytest.fixture(scope="module")
def upstream(tmp_path_factory) -> Path:
    """Its file, with what else it has."""
    path = tmp_path_factory.mktemp("upstream") / "state_step001750.pt"
    optimizers = [
        {"state": {0: {"exp_avg": torch.ones(3), "step": 4}}, "param_groups": [{"lr": 0.1, "betas": (0.8, 0.95)}]}
    ]
    torch.save({"step": 1750, "code": "import os", "model": of_upstream(), "optimizers": optimizers}, path)
    return path


@pytest.fixture(scope="module")
def imported(upstream) -> Path:
    """A run that it was made."""
    folder = upstream.parent / "runs" / "a"
    assert main(["import", str(upstream), "--out", str(folder), *SHAPE]) == 0
    return folder


def exported(folder: Path, out: Path) -> dict[str, Tensor]:
    assert main(["export", str(folder), "--to", "pt", str(out)]) == 0
    return torch.load(out, weights_only=True)["model"]


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    """Names, types and every bit."""
    kinds = [{name: (x.dtype, x.shape) for name, x in each.items()} for each in (found, expected)]
    return kinds[0] == kinds[1] and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.slow
def test_a_file_of_upstream_is_a_run_and_comes_back_bit_for_bit(upstream, imported, tmp_path):
    state = strip_compiled(of_upstream())
    assert all(NAMES.fullmatch(name) for name in state)
    assert same(exported(imported, tmp_path / "b.pt"), state)
    assert main(["import", str(tmp_path / "b.pt"), "--out", str(tmp_path / "b")]) == 0  # which says its settings
    assert same(exported(tmp_path / "b", tmp_path / "c.pt"), state)
    run = load_run(imported, device="cpu")
    assert (run.step, run.window, run.config.iterations, run.tokenizer.name) == (1750, 3, 1750, "byte")
    model = GPT(GPTConfig(257, 256, n_layer=12, width=32, base_width=32, head_dim=16, block_size=16))
    model.load_state_dict(state)
    tokens = torch.arange(100, dtype=torch.int32) % 257
    assert torch.equal(model.logits(tokens, 3), run.model.logits(tokens, 3))


@pytest.mark.slow
def test_an_imported_run_is_used_like_any_other(imported, tmp_path, capsys):
    run = load_run(imported, device="cpu")
    (tmp_path / "a.txt").write_text("def main():\n    pass\n" * 20)
    assert run.evaluate(tmp_path / "a.txt").bytes == 420 and len(run.metrics) == 0
    own = [str(imported), "--device", "cpu"]
    capsys.readouterr()
    assert main(["sample", *own, "--prompt", "def ", "--max-new-tokens", "9"]) == 0
    assert capsys.readouterr().out == f"def {run.generate('def ', max_new_tokens=9)}\n"
    assert main(["eval", *own, "--data", str(tmp_path / "a.txt")]) == 0
    assert "420 tokens, 420 bytes" in capsys.readouterr().out
    assert main(["export", str(imported), "--to", "dcp", str(tmp_path / "dcp")]) == 0
    weights = import_dcp(tmp_path / "dcp", trusted=True)
    assert all(torch.equal(weights[name].float(), x.float()) for name, x in run.model.state_dict().items())
    assert main(["doctor", str(imported)]) == 0
    begun = train(make_config("laptop", shape_of_training(tmp_path) | {"init_from": str(imported)}))
    assert begun.steps == 1 and "with the weights of" in (begun.folder / "log.txt").read_text()


def shape_of_training(tmp_path: Path) -> dict[str, object]:
    small = {"data": "embedded", "width": 32, "n_layer": 12, "head_dim": 16, "block_size": 16, "window_tokens": 48}
    changes = small | {"parametrization": "record26", "base_width": None, "iterations": 1, "micro_batch_tokens": 64}
    return TINY | changes | {"out": str(tmp_path / "runs"), "val_every": 0, "name": "b"}


@pytest.mark.slow
def test_a_run_with_mup_predicts_the_same_with_its_multiplier_in_the_head_and_in_its_settings(tiny, tmp_path, capsys):
    folder = train(tiny(name="a", data="embedded", width=64)).folder
    own = load_run(folder, device="cpu")
    tokens = torch.arange(100, dtype=torch.int32)
    expected = own.model.logits(tokens, own.window)
    assert (expected[:, 32] - expected[:, 97]).abs().max() > 0.1
    for how, rules in (("fold", "record26"), ("keep", "mup")):
        out = tmp_path / f"{how}.pt"
        assert main(["export", str(folder), "--to", "pt", str(out), "--multipliers", how]) == 0
        said = capsys.readouterr().out
        assert ("the head is multiplied by 0.707107" in said) == (how == "fold") and "rounded to bfloat16" in said
        assert main(["import", str(out), "--out", str(tmp_path / "runs" / how)]) == 0
        back = load_run(tmp_path / "runs" / how, device="cpu")
        assert back.config.parametrization == rules and back.step == own.step and back.window == own.window
        torch.testing.assert_close(back.model.logits(tokens, back.window), expected, atol=0.05, rtol=0)
        exact = own.model.state_dict()["lm_head.weight"] * own.model.logit_scale
        assert torch.allclose(back.model.state_dict()["lm_head.weight"] * back.model.logit_scale, exact, rtol=1e-6)


@pytest.mark.slow
def test_a_technique_goes_there_and_back_and_is_no_part_of_the_record(tiny, tmp_path, capsys):
    folder, out = train(tiny(name="a", data="embedded", width=32, attention_gate=4)).folder, tmp_path / "a.pt"
    assert main(["export", str(folder), "--to", "pt", str(out)]) == 0
    said = capsys.readouterr().out
    assert "blocks.0.attn.options.0.weight is not in record 26" in said and "multiplied" not in said
    assert main(["import", str(out), "--out", str(tmp_path / "b")]) == 0
    own, back = load_run(folder, device="cpu"), load_run(tmp_path / "b", device="cpu")
    assert back.config.attention_gate == 4
    tokens = torch.arange(70, dtype=torch.int32)
    torch.testing.assert_close(
        back.model.logits(tokens, 3), own.model.logits(tokens, 3), atol=0.05, rtol=0
    )  # embeddings were rounded


@pytest.mark.slow
def test_the_tokenizer_comes_with_the_run(upstream, tmp_path, capsys):
    pytest.importorskip("rustbpe")
    pytest.importorskip("tiktoken")
    BpeTokenizer.train(["def main():\n    return 'spam'\n" * 9, "some more text, and some more"], 270).save(tmp_path)
    place, out = tmp_path / "tokenizer.json", tmp_path / "runs" / "a"
    assert main(["import", str(upstream), "--out", str(out), *SHAPE, "--tokenizer", str(place)]) == 0
    place.unlink()
    run = load_run(out, device="cpu")
    assert run.tokenizer.name == "bpe:270" and isinstance(run.generate("def ", max_new_tokens=2), str)
    (out / "tokenizer.json").write_text((out / "tokenizer.json").read_text().replace("bpe:270", "bpe:271"))
    assert "not what the manifest says" in fails(["sample", str(out), "--device", "cpu"], capsys)


@pytest.mark.slow
def test_rows_of_gpt2_are_taken_for_it(tmp_path):
    torch.save({"model": of_upstream(16, 6, 50304, 30)}, tmp_path / "a.pt")
    assert main(["import", str(tmp_path / "a.pt"), "--out", str(tmp_path / "a"), "--head-dim", "16"]) == 0
    run = load_run(tmp_path / "a", device="cpu")
    assert (run.corpus.tokenizer, run.model.cfg.vocab_size, run.model.cfg.bos_token) == ("gpt2", 50257, 50256)
    assert (run.step, run.window) == (1750, 14)
    assert len(exported(tmp_path / "a", tmp_path / "b.pt")["scalars"]) == 30


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def fails(arguments: list[str], capsys) -> str:
    """The one line that a command ends with."""
    capsys.readouterr()
    code, said = main(arguments), capsys.readouterr()
    assert code in (2, 3, 4) and said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    return said.err


def without(name: str) -> dict[str, Tensor]:
    return {key: x for key, x in of_upstream().items() if key != f"_orig_mod.{name}"}


def changed(name: str, tensor: Tensor) -> dict[str, Tensor]:
    return of_upstream() | {f"_orig_mod.{name}": tensor}


def doubling(levels: int = 60) -> list[Any]:
    """A list that holds the one before it twice, and so on: a file of a kilobyte, a text without end."""
    inner: list[Any] = [1]
    for _ in range(levels):
        inner = [inner, inner]
    return inner


@pytest.mark.parametrize(
    ("content", "flags", "says"),
    [
        (lambda: {"model": without("lm_head.weight")}, [], "another model than record 26: it lacks lm_head.weight"),
        (
            lambda: {"model": changed("blocks.0.attn.ve_gate", torch.ones(1))},
            [],
            "has blocks.0.attn.ve_gate, which is unknown",
        ),
        (
            lambda: {"model": changed("blocks.3.mlp.c_fc.weight", torch.ones(64, 32))},
            [],
            "of shape (64, 32), not (128, 32)",
        ),
        (lambda: {"model": changed("scalars", torch.ones(59))}, [], "has scalars of shape (59,), not (60,)"),
        (lambda: {"model": changed("scalars", torch.ones(60, dtype=torch.int32))}, [], "has scalars as torch.int32"),
        (
            lambda: {"model": changed("scalars", torch.full((60,), torch.nan))},
            [],
            "scalars has numbers that are not finite",
        ),
        (lambda: {"model": without("embed.weight")}, [], "it has no embed.weight (V, D), or no blocks.N.*"),
        (lambda: {"model": changed("blocks.9999.mlp.c_fc.weight", torch.ones(1))}, [], "n_layer=10000 must be"),
        (
            lambda: {"model": {"embed.weight": torch.ones(1).expand(384, 2**40), "blocks.0.x": torch.ones(1)}},
            [],
            "views",
        ),
        (lambda: {"weights": of_upstream()}, [], 'has no state dict under "model"'),
        (lambda: {"model": of_upstream(), "step": "many"}, [], "its step is of type str, not a count"),
        (lambda: {"model": of_upstream(), "step": doubling()}, [], "its step is of type list, not a count"),
        (lambda: {"model": of_upstream(), "step": -1}, [], "its step is negative or too large, not a count"),
        (
            lambda: {"model": of_upstream() | {"scalars": torch.ones(64)}},
            [],
            "has a tensor twice, with and without _orig",
        ),
        (lambda: {"model": of_upstream(), "settings": {"width": doubling()}}, [], "its settings are none"),
        (lambda: {"model": of_upstream(), "step": 9}, ["--iterations", "8"], "is of step 9, after --iterations 8"),
        (lambda: {"model": of_upstream(), "settings": {"width": "wide"}}, [], "is not a valid config"),
        (lambda: {"model": of_upstream(), "settings": {3: torch.ones(1)}}, [], "its settings are none"),
        (
            lambda: {"model": of_upstream()},
            ["--tokenizer", "gpt2"],
            "has 384 rows of tokens, and tokenizer gpt2 has 50,257",
        ),
        (lambda: {"model": of_upstream()}, ["--tokenizer", "cl100k"], "choose gpt2, byte"),
        (lambda: {"model": of_upstream(rows=512)}, [], "has 512 rows of tokens; give the --tokenizer"),
        (lambda: {"model": of_upstream()}, ["--head-dim", "24"], "has width 32; give the --head-dim"),
        (lambda: {"model": of_upstream()}, ["--width", "64"], "unknown argument --width"),
    ],
)
def test_what_is_no_model_of_the_record_is_one_line(content, flags, says, tmp_path, capsys):
    torch.save(content(), tmp_path / "a.pt")
    assert says in fails(["import", str(tmp_path / "a.pt"), "--out", str(tmp_path / "a"), *SHAPE, *flags], capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_damage_is_one_line(upstream, tmp_path, capsys):
    path, out = tmp_path / "a.pt", ["--out", str(tmp_path / "a")]
    whole = upstream.read_bytes()
    for content in (whole[:-5000], b"", b"PK\x03\x04", whole[:3000], b"import os"):
        path.write_bytes(content)
        assert "is not a .pt file of plain tensors" in fails(["import", str(path), *out], capsys)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("archive/data.pkl", bytes(10**7))
    assert "it is compressed" in fails(["import", str(path), *out], capsys)
    assert "No such file" in fails(["import", str(tmp_path / "b.pt"), *out], capsys)
    assert "a folder, not a regular file" in fails(["import", str(tmp_path), *out], capsys)
    assert "exists; name a new folder" in fails(["import", str(upstream), "--out", str(tmp_path)], capsys)


@pytest.mark.parametrize("place", ["checkpoint.Checkpoints.save", "run_folder.FolderLock"])
def test_a_disk_that_is_full_leaves_no_folder(place, upstream, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise CheckpointError("not written: ENOSPC")

    monkeypatch.setattr(f"speedrun_mup.training.{place}", full)
    assert "ENOSPC" in fails(["import", str(upstream), "--out", str(tmp_path / "runs" / "a"), *SHAPE], capsys)
    assert not (tmp_path / "runs" / "a").exists()


@pytest.mark.slow
def test_what_an_imported_run_has_not_is_one_line(imported, tmp_path, capsys):
    own = [str(imported), "--device", "cpu"]
    assert "was imported without data; give --data" in fails(["eval", *own], capsys)
    assert "was imported, with its tokenizer; leave out" in fails(["sample", *own, "--data", "embedded"], capsys)
    assert "begin a run with --init-from" in fails(["train", "--resume", str(imported), "--device", "cpu"], capsys)
    copied = Path(shutil.copytree(imported, tmp_path / "a"))
    state = copied / "checkpoints" / "step-00001750" / "state.json"
    for part, says in (
        ("vocabulary", "its vocabulary is not one"),
        ("record_scalars", "its record_scalars are not a vector"),
    ):
        reseal(state, json.loads((imported / state.relative_to(copied)).read_text()) | {part: ["x"]})
        words = ["sample"] if part == "vocabulary" else ["export", "--to", "pt", str(tmp_path / "b.pt")]
        assert says in fails([words[0], str(copied), *words[1:]], capsys)


def reseal(path: Path, content: dict[str, object]) -> None:
    """Write a checkpoint's state, and what its manifest says of it."""
    import hashlib

    path.write_text(json.dumps(content))
    manifest = path.with_name("manifest.json")
    body = json.loads(manifest.read_text())
    del body["sha256"]
    body["files"]["state.json"] = {"size": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    manifest.write_bytes(json_with_digest(body))
