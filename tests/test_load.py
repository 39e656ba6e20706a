"""A run's folder as a model to use, and the commands that use it."""

import dataclasses
import gzip
import hashlib
import io
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import TINY
from helpers.small_corpus import BOS, documents, make_corpus

import speedrun_mup
from speedrun_mup.cli import main
from speedrun_mup.commands import demo
from speedrun_mup.config import make_config
from speedrun_mup.core.errors import ConfigError, NonFiniteError, UserError
from speedrun_mup.data.corpus import embedded_corpus, find_corpus
from speedrun_mup.data.validation import ValBatches
from speedrun_mup.files import without_escapes
from speedrun_mup.sample import writer as sample
from speedrun_mup.sample.sampling import Sampling
from speedrun_mup.training import load, train
from speedrun_mup.training.checkpoint_manifest import json_with_digest
from speedrun_mup.training.load import load_run
from speedrun_mup.training.tracking import read_metrics


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A run on bytes with two checkpoints."""
    changes = {
        "data": "embedded",
        "out": str(tmp_path_factory.mktemp("runs")),
        "name": "a",
        "save_every": 3,
        "width": 32,
    }
    return train(make_config("laptop", TINY | changes)).folder


@pytest.fixture
def copied(folder, tmp_path) -> Path:
    """The same run, for this test to damage."""
    return Path(shutil.copytree(folder, tmp_path / "a"))


@pytest.mark.slow
def test_the_model_is_the_runs(folder, tiny):
    """Its evaluation is the run's last validation; --checkpoint takes another step, with the window of that step."""
    run = load_run(folder, device="cpu")
    model, tokenizer, config = run
    assert (run.step, tokenizer.name, config.width, run.window) == (6, "byte", 32, 3) and model is run.model
    values = {r["step"]: r for r in read_metrics(folder) if r["kind"] == "val"}
    found = run.evaluate(tokens=1024)
    assert found.loss_with_special == pytest.approx(values[6]["loss"], abs=0.03)  # its context slides
    middle = load_run(folder / "checkpoints" / "step-00000003", device="cpu")
    assert (middle.step, middle.window) == (3, 2) and load_run(folder, step=3, device="cpu").step == 3
    assert middle.evaluate(tokens=1024).loss_with_special == pytest.approx(values[3]["loss"], abs=0.03)


@pytest.mark.slow
def test_its_own_validation_is_trainings_also_where_that_leaves_some_out(tiny):
    """Training validates on whole chunks; here on all that the split has of them."""
    done = train(
        tiny(name="all", data="embedded", width=32, n_layer=2, iterations=1, val_tokens=10**7, val_chunk_tokens=29_984)
    )
    run = load_run(done.folder, device="cpu")
    batches = ValBatches(run.corpus, 10**7, 29_984)
    assert 0 < len(batches) * 29_984 < sum(map(run.corpus.tokens_in, run.corpus.val)) - 1
    found = run.evaluate()
    assert found.tokens == sum(int((batches[i][1] != 256).sum()) for i in range(len(batches)))
    assert found.loss_with_special == pytest.approx(done.val_loss, abs=0.03)


@pytest.mark.slow
def test_the_python_of_the_page_runs(folder, tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder, "runs/notes")
    with gzip.open("books.jsonl.gz", "wt") as file:
        file.write('{"text": "def main"}')
    page, names = (Path(__file__).parent.parent / "docs" / "use.md").read_text(), {}
    exec(re.search(r"```python\n(import speedrun_mup.*?)```", page, re.S)[1], names)
    assert names["model"].logits(names["tokens"], names["run"].window).shape == (5, 384)


def test_a_run_says_in_a_line_what_it_is(folder):
    run = load_run(folder, device="cpu")
    size = sum(parameter.numel() for parameter in run.model.parameters())
    assert repr(run) == f"<run {folder}: step 6 of 6, width 32, {size:,} parameters, byte tokens, on cpu>"


@pytest.mark.slow
def test_text_and_corpora_are_evaluated(folder, tmp_path):
    run = load_run(folder, device="cpu")
    (tmp_path / "a.txt").write_text("def main():\n    pass\n" * 40)
    found = run.evaluate(tmp_path / "a.txt")
    assert (found.tokens, found.bytes) == (840, 840) and run.evaluate(str(tmp_path)).loss == found.loss
    corpus = embedded_corpus()
    assert run.evaluate(corpus, tokens=500).loss == run.evaluate("embedded", tokens=500).loss
    assert run.evaluate(corpus.directory, tokens=500).loss == run.evaluate(tokens=500).loss
    with pytest.raises(ConfigError, match=r"tokens of another tokenizer \(synthetic\) than the run's \(byte\)"):
        run.evaluate("synthetic")


@pytest.mark.slow
def test_text_goes_on_from_one_prompt_or_several(folder):
    run = speedrun_mup.load_run(str(folder), device="cpu")
    one = run.generate("def ", max_new_tokens=20, seed=1)
    assert isinstance(one, str) and run.generate(["def ", "x"], max_new_tokens=20, seed=1)[0] == one
    with pytest.raises(
        ConfigError, match="unknown setting top; choose from max_new_tokens, temperature, top_k, top_p, seed"
    ):
        run.generate("", top=3)
    with pytest.raises(ConfigError, match="top_p=3 must be"):
        run.generate("", top_p=3)


def test_metrics_are_a_table(folder, monkeypatch):
    pandas = pytest.importorskip("pandas")
    run = load_run(folder, device="cpu")
    table = run.metrics
    assert isinstance(table, pandas.DataFrame) and len(table) == len(read_metrics(folder))
    assert table[table.kind == "val"].step.tolist() == [0, 3, 6]
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ConfigError, match="needs pandas; pip install pandas"):
        _ = run.metrics


@pytest.mark.slow
def test_a_chat_keeps_what_was_said(folder):
    """Two lines are the text of both with the answer between; after the end of a document, another begins."""
    writer, sampling = load_run(folder, device="cpu").writer, Sampling(max_new_tokens=7, temperature=0)
    first, second = ("".join(answer) for answer in writer.chat(["def ", "class "], sampling))
    assert first == writer.generate(["def "], sampling)[0] and len(first) == 7
    assert second == writer.generate(["def " + first + "class "], sampling)[0]


@pytest.mark.slow
def test_after_the_end_of_a_document_a_line_opens_another(folder, monkeypatch):
    script, begun = iter([65, 66, 256, 67, 68, 69, 70, 256]), []
    monkeypatch.setattr(sample, "draw", lambda *_: torch.tensor([next(script)]))

    class Counted(sample.Decoder):
        def __call__(self, tokens):
            begun.append(tokens.tolist()) if not self.lengths.any() else None
            return super().__call__(tokens)

    monkeypatch.setattr(sample, "Decoder", Counted)
    answers = load_run(folder, device="cpu").writer.chat(["a", "b", "c"], Sampling(max_new_tokens=4))
    assert ["".join(answer) for answer in answers] == ["AB", "CDEF", ""]
    assert begun == [[[256, 97]], [[256, 98]]]


@pytest.mark.slow
def test_training_shows_samples_and_stays_what_it_is(tiny):
    """From the weights and the window of their step; without text to show, the run does not begin."""
    changes = {"data": "embedded", "width": 32, "iterations": 5, "seed": 4}
    plain, shown = (train(tiny(name=f"every-{n}", sample_every=n, **changes)).folder for n in (0, 2))
    losses = [[r["loss"] for r in read_metrics(each)] for each in (plain, shown)]
    assert losses[0] == losses[1] and "sample" not in (plain / "log.txt").read_text()
    text = (shown / "log.txt").read_text()
    assert [text.count(f"step {step}/5  sample:") for step in range(6)] == [0, 0, 1, 0, 1, 1]
    last = load_run(shown, device="cpu").generate("", max_new_tokens=120, seed=4)
    assert last.split() and last.split() == without_escapes(text.rpartition("sample:")[2]).split()[: len(last.split())]
    with pytest.raises(ConfigError, match="cannot be turned into text"):
        train(tiny(name="none", sample_every=2))
    assert not (Path(tiny().out) / "none").exists()


@pytest.mark.slow
def test_the_demos_text(folder, capsys):
    assert main(["sample", str(folder), *demo.TEXT]) == 0
    assert capsys.readouterr().out.startswith("def read(")


# ---------------------------------------------------------------------------------------------------------------------
# Commands


@pytest.mark.slow
def test_sample_streams_the_samples_one_after_the_other(folder, capsys):
    arguments = ["sample", str(folder), "--prompt", "def ", "--max-new-tokens", "9", "--device", "cpu"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    run = load_run(folder, device="cpu")
    expected = run.generate(["def "] * 3, max_new_tokens=9)
    assert text == f"def {expected[0]}\n"
    assert main([*arguments, "--n", "3"]) == 0
    parts = "\n".join(f"--- sample {i + 1} ---\ndef {each}" for i, each in enumerate(expected))
    assert capsys.readouterr().out == f"{parts}\n"


@pytest.mark.slow
def test_a_prompt_comes_from_standard_input(folder, capsys, monkeypatch):
    """To its end, without the line break that ends it; of any alphabet, whatever the terminal's."""
    arguments = ["sample", str(folder), "--max-new-tokens", "5", "--device", "cpu", "--prompt"]
    assert main([*arguments, "def é(\n    x\n"]) == 0
    expected = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO("def é(\n    x\n\n"))
    assert main([*arguments, "-"]) == 0
    assert capsys.readouterr().out == expected and expected.startswith("def é(\n    x\n")
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\udcff"))
    assert "is not UTF-8" in fails([*arguments, "-"], capsys) and "a" not in capsys.readouterr().out
    monkeypatch.setattr("speedrun_mup.commands.sample.SMALL", 5)
    monkeypatch.setattr(sys, "stdin", io.StringIO("123456"))
    assert "the prompt has more than 5 characters" in fails([*arguments, "-"], capsys)
    monkeypatch.setattr(sys, "stdin", None)
    assert "--prompt - needs standard input, which is closed" in fails([*arguments, "-"], capsys)


@pytest.mark.slow
def test_chat_reads_lines(folder, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("def \nclass \n"))
    assert (
        main(["sample", str(folder), "--chat", "--max-new-tokens", "5", "--temperature", "0", "--device", "cpu"]) == 0
    )
    writer = load_run(folder, device="cpu").writer
    answers = ["".join(a) for a in writer.chat(["def ", "class "], Sampling(max_new_tokens=5, temperature=0))]
    assert capsys.readouterr().out == "".join(f"{answer}\n" for answer in answers)


def test_a_stdout_that_is_closed_is_no_traceback(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert main(["sample", str(folder), "--max-new-tokens", "2", "--device", "cpu"]) == 1


@pytest.mark.slow
def test_eval_prints_the_numbers(folder, capsys, tmp_path):
    (tmp_path / "a.txt").write_text("def main():\n    pass\n" * 40)
    assert main(["eval", str(folder), "--data", str(tmp_path / "a.txt"), "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "bits per byte" in said and "perplexity" in said and "840 tokens, 840 bytes" in said
    assert main(["eval", str(folder), "--tokens", "100", "--json", "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["loss"] / found["bits_per_byte"] == pytest.approx(0.6931471805599453, rel=1e-12)


@pytest.mark.slow
def test_eval_reads_a_folder_of_code(folder, capsys, tmp_path):
    (tmp_path / "a.py").write_text("def main():\n    pass\n" * 40)
    words = ["eval", str(folder), "--data", str(tmp_path), "--device", "cpu"]
    assert "left out: 1 *.py; --suffix reads more as plain text" in fails(words, capsys)
    assert main([*words, "--suffix", ".py"]) == 0
    assert "840 tokens, 840 bytes" in capsys.readouterr().out
    assert "--suffix is about a folder of text; give --data" in fails(["eval", str(folder), "--suffix", ".py"], capsys)


def test_standard_errors_say_over_what(folder, tmp_path):
    run = load_run(folder, device="cpu")
    for count, says in ((29, "pieces of up to 1,024 tokens"), (30, "documents")):
        (tmp_path / "a.jsonl").write_text('{"text": "def main"}\n' * count)
        assert run.evaluate(tmp_path / "a.jsonl").summary().endswith(f"standard errors over {count} {says}")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("sample RUNS", "holds no run (no config.json); did you mean {runs}/first or {runs}/second?"),
        ("eval RUNS/secnd", "did you mean {runs}/second?"),
        ("export RUNS/zzz --to pt x", "holds no run (no config.json); give a run's folder"),
        ("sample RUNS/first text", "unknown argument text; give a prompt as --prompt, see --help"),
        ("eval RUNS/first a.txt", "unknown argument a.txt; give text or a corpus as --data, see --help"),
    ],
)
def test_what_was_meant_is_named(words, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("first", "second"):
        (tmp_path / name / "checkpoints").mkdir(parents=True)
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text("{}")
    assert says.format(runs=tmp_path) in fails(words.replace("RUNS", str(tmp_path)).split(), capsys)


def test_a_name_alone_is_looked_for_in_runs(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "mine" / "checkpoints").mkdir(parents=True)
    assert "mine holds no run (no config.json); did you mean runs/mine?" in fails(["sample", "mine"], capsys)


@pytest.mark.parametrize("name", ["sample", "eval"])
def test_help_needs_no_torch(name):
    code = f"import sys\nfrom speedrun_mup.commands.{name} import run\ntry: run(['--help'])\nexcept SystemExit: pass\n"
    code += "sys.exit('torch' in sys.modules)"
    assert "RUN" in subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def fails(arguments: list[str], capsys) -> str:
    """The one line that a command ends with."""
    code, said = main(arguments), capsys.readouterr()
    assert code in (2, 3, 4) and said.err.startswith("error: ") and said.err.count("\n") == 1, said.err
    return said.err


@pytest.mark.parametrize("command", ["sample", "eval", "export --to pt", "export --to dcp", "export --to hf"])
def test_runs_that_cannot_be_used_are_one_line(command, copied, tiny, tmp_path, capsys):
    name, *more = command.split()
    more = [*more, str(tmp_path / "out")] if more else ["--device", "cpu"]
    own = [name, str(copied), *more]
    assert "holds no run" in fails([name, str(tmp_path / "no"), *more], capsys)
    assert "has no checkpoint of step 4; it has 3, 6" in fails([*own, "--checkpoint", "4"], capsys)
    newest = copied / "checkpoints" / "step-00000006"
    whole = (newest / "model.safetensors").read_bytes()
    (newest / "model.safetensors").write_bytes(whole[:100])
    assert "has 100 bytes instead of" in fails([*own, "--checkpoint", "6"], capsys)
    assert load_run(copied, device="cpu").step == 3  # the newest that is intact
    shutil.rmtree(copied / "checkpoints" / "step-00000003")
    assert "is intact (the newest: " in (said := fails(own, capsys)) and "has 100 bytes instead of" in said
    shutil.rmtree(newest)
    (copied / "checkpoints" / ".tmp-step-00000009").mkdir()
    assert "has no checkpoint yet" in fails(own, capsys)
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"setting_of_tomorrow": 1}))
    assert "is not a valid config" in fails(own, capsys)
    (copied / "config.json").write_text(json.dumps(config)[:50])
    assert "is not a valid config" in fails(own, capsys)
    assert not (tmp_path / "out").exists()


def change_weights(checkpoint: Path, change) -> None:
    """Change a checkpoint's weights, as somebody who knows the format could."""
    path, manifest = checkpoint / "model.safetensors", checkpoint / "manifest.json"
    weights = safetensors.torch.load_file(path)
    change(weights)
    safetensors.torch.save_file(weights, path, {"format": "pt"})
    body = json.loads(manifest.read_text())
    del body["sha256"]
    content = path.read_bytes()
    body["files"][path.name] = {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    manifest.write_bytes(json_with_digest(body))


NOT_WEIGHTS = {
    "head with a NaN": (lambda w: w["lm_head.weight"][3].fill_(float("nan")), "lm_head.weight has what is no finite"),
    "embedding with an infinity": (
        lambda w: w["embed.weight"][0, 0].fill_(float("inf")),
        "embed.weight has what is no",
    ),
    "truths": (
        lambda w: w.update({"embed.weight": w["embed.weight"] > 0}),
        "embed.weight has what is no finite number",
    ),
    "one fewer": (
        lambda w: w.pop("lm_head.weight"),
        'is of another model: Missing key(s) in state_dict: "lm_head.weight"',
    ),
    "no embedding": (lambda w: w.pop("embed.weight"), "is of another model: Missing key(s)"),
    "one more": (lambda w: w.update(more=torch.ones(2)), 'Unexpected key(s) in state_dict: "more"'),
    "another shape": (lambda w: w.update({"lm_head.weight": torch.ones(9, 32)}), "size mismatch for lm_head.weight"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOT_WEIGHTS)
def test_weights_that_are_none_are_one_line(name, copied, tmp_path, capsys):
    change, says = NOT_WEIGHTS[name]
    change_weights(copied / "checkpoints" / "step-00000006", change)
    for command in ("sample", "eval", "export --to pt", "export --to dcp", "export --to hf"):
        verb, *more = command.split()
        assert says in fails([verb, str(copied), *more, *[str(tmp_path / "out")] * bool(more)], capsys), command
        assert not (tmp_path / "out").exists()


def test_numbers_that_are_not_finite_are_one_line(folder):
    """Of weights that are finite: what a type of few digits may make of them."""
    run = load_run(folder, device="cpu")
    with torch.no_grad():
        run.model.lm_head.weight[0] = float("nan")
    for use in (lambda: run.generate("a", max_new_tokens=2), lambda: run.evaluate(tokens=64)):
        with pytest.raises(NonFiniteError, match="not finite; take another --checkpoint"):
            use()


@pytest.mark.slow
def test_a_checkpoints_own_folder_is_enough_wherever_one_stands(folder, monkeypatch):
    checkpoint = folder / "checkpoints" / "step-00000003"
    for place, name in ((checkpoint, "."), (checkpoint.parent, "step-00000003"), (folder, "checkpoints/step-00000003")):
        monkeypatch.chdir(place)
        assert load_run(name, device="cpu").step == load_run(name, 3, device="cpu").step == 3
    with pytest.raises(ConfigError, match="is a checkpoint itself; give the run's folder with --checkpoint 6"):
        load_run(checkpoint, 6)


@pytest.mark.parametrize("command", ["sample", "eval", "export --to pt", "export --to hf"])
def test_a_checkpoint_of_a_newer_version_is_one_line(command, copied, tmp_path, capsys):
    path = copied / "checkpoints" / "step-00000006" / "manifest.json"
    body = json.loads(path.read_text())
    del body["sha256"]
    path.write_bytes(json_with_digest(body | {"schema": 99}))
    name, *more = command.split()
    assert "in schema 99" in fails([name, str(copied), *more, *[str(tmp_path / "out")] * bool(more)], capsys)


@pytest.mark.slow
def test_tokens_without_text_are_one_line(tiny, capsys):
    folder = train(tiny(name="b", width=32)).folder
    assert "cannot be turned into text" in fails(["sample", str(folder), "--device", "cpu"], capsys)
    found = load_run(folder, device="cpu").evaluate()
    assert found.bits_per_byte is None and found.tokens > 900
    with pytest.raises(UserError, match="cannot be turned into text"):
        load_run(folder, device="cpu").evaluate(__file__)


@pytest.mark.slow
def test_data_that_moved_or_changed_is_one_line(tiny, tmp_path, capsys):
    pytest.importorskip("rustbpe")
    pytest.importorskip("tiktoken")
    corpus = embedded_corpus("bpe:300")
    place = Path(shutil.copytree(corpus.directory, tmp_path / "data"))
    folder = train(tiny(name="c", data=str(place), width=32)).folder
    assert load_run(folder, device="cpu").tokenizer.name == "bpe:300"
    assert main(["export", str(folder), "--to", "pt", str(tmp_path / "c.pt")]) == 0
    back = capsys.readouterr().out.splitlines()[-1]
    assert back.endswith(f"speedrun-mup import {tmp_path / 'c.pt'} --out runs/NAME --tokenizer {place}")
    words = back[back.index("import ") :].replace("runs/NAME", str(tmp_path / "back")).split()
    assert main(words) == 0 and load_run(tmp_path / "back").tokenizer.name == "bpe:300"
    assert "has 384 rows of bpe:300 tokens; give the --tokenizer" in fails(
        [*words[:3], str(tmp_path / "other")], capsys
    )
    assert not (tmp_path / "other").exists()
    assert main(["export", str(tmp_path / "back"), "--to", "pt", str(tmp_path / "d.pt")]) == 0
    assert capsys.readouterr().out.rstrip().endswith(f"--tokenizer {tmp_path / 'back' / 'tokenizer.json'}")
    place.rename(tmp_path / "moved")
    assert "give their new place with --run-data" in fails(["sample", str(folder)], capsys)
    moved = ["sample", str(folder), "--data", str(tmp_path / "moved"), "--max-new-tokens", "2", "--device", "cpu"]
    assert main(moved) == 0  # the former name
    written = capsys.readouterr().out
    assert main([*moved[:2], "--run-data", *moved[3:]]) == 0 and capsys.readouterr().out == written
    assert main(["eval", str(folder), "--run-data", moved[3], "--device", "cpu"]) == 0
    for flag, out in (("--run-data", "new"), ("--data", "former")):
        assert main(["export", str(folder), "--to", "hf", str(tmp_path / out), flag, moved[3]]) == 0
    assert "--data and --run-data set the same thing" in fails([*moved, "--run-data", "x"], capsys)
    capsys.readouterr()
    other = find_corpus("embedded", "bpe:301")[0].directory
    assert "is not the data that the run was trained on" in fails([*moved[:3], str(other)], capsys)


@pytest.mark.slow
def test_evaluation_of_a_mixture_is_the_validation_of_training(tiny, tmp_path):
    """A document of the second part stands in the first one's training text, and the first one's validation is short."""
    val = documents(1200, 60, 5)
    cut = [*np.flatnonzero(val == BOS), len(val)]
    train_tokens = np.concatenate([documents(4000, 60, 1), val[: cut[3]]])
    first = make_corpus(tmp_path / "first", [train_tokens], val=[documents(300, 60, 3)])
    second = make_corpus(tmp_path / "second", [documents(4000, 60, 4)], val=[val])
    mixed = {"data": f"{first.data}:0.67,{second.data}:0.33", "val_tokens": 768, "val_chunk_tokens": 256, "width": 32}
    done = train(tiny(name="mixed", **mixed))
    run = load_run(done.folder, device="cpu")
    found = run.evaluate()
    assert found.loss_with_special == pytest.approx(done.val_loss, rel=1e-5)
    batches = ValBatches(run.corpus, 768, 256)
    assert len(batches.notes) == 2
    assert found.tokens == sum(int((batches[i][1] != BOS).sum()) for i in range(3))


@pytest.mark.slow
def test_changed_data_are_not_taken_for_the_runs_own_validation(tiny, tmp_path, capsys):
    """Byte tokens mean the same, so the model still writes, and is evaluated on what --data names."""
    place = Path(shutil.copytree(embedded_corpus().directory, tmp_path / "data"))
    folder = train(tiny(name="d", data=str(place), width=32)).folder
    whole = load_run(folder, device="cpu").evaluate().loss
    (tmp_path / "a.txt").write_text("def main():\n    pass\n" * 4000)
    shutil.rmtree(place)
    assert main(["data", "text", str(tmp_path / "a.txt"), "--out", str(place), "--tokenizer", "byte"]) == 0
    own = [str(folder), "--device", "cpu"]
    capsys.readouterr()
    said = fails(["eval", *own], capsys)
    assert f"{place} is not the data that the run was trained on" in said and "give --data" in said
    assert main(["sample", *own, "--max-new-tokens", "2"]) == 0
    assert main(["eval", *own, "--data", str(tmp_path / "a.txt"), "--tokens", "100"]) == 0
    found = load_run(folder, device="cpu", data=str(embedded_corpus().directory)).evaluate()
    assert found.loss == whole


def test_a_vocabulary_of_another_size_is_one_line(folder, capsys, monkeypatch):
    larger = dataclasses.replace(embedded_corpus(), vocab_size=900)
    monkeypatch.setattr(load, "find_corpus", lambda *_: (larger, ""))
    assert "step-00000006 is of another model" in fails(["sample", str(folder), "--device", "cpu"], capsys)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--temperature -1", "error: temperature=-1.0 must be finite and at least 0\n"),
        ("--top-p 1.5", r"top_p=1.5 must be in (0, 1]"),
        ("--top-k -3", "top_k=-3 must be at least 0"),
        ("--n 0", "argument --n: it must be at least 1, not 0"),
        ("--n 1e12", "--n 1000000000000 is more than one command writes; give at most 10,000"),
        ("--temperature 1e-320", "temperature=1e-320 must be 0 or at least 1e-6"),
        ("--chat --n 2", "leave out --prompt and --n"),
        ("--max-new-tokens 0", "max_new_tokens=0 must be at least 1"),
        ("--temp 1", "use --temperature"),
        ("--num-samples 4", "use --n"),
    ],
)
def test_flags_out_of_range_are_one_line_before_anything_is_loaded(flags, says, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "speedrun_mup.training.load", None)
    assert says in fails(["sample", "runs/none", *flags.split()], capsys)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ("--tokens 0", "argument --tokens: it must be at least 1, not 0"),
        ("--tasks arc_easy --limit 0", "argument --limit: it must be at least 1, not 0"),
        ("--tasks arc_easy --num-fewshot -1", "--num-fewshot -1 must be at least 0"),
        ("--tasks arc_easy --data embedded", "--tasks have their own text; leave out --data and --tokens"),
        ("--limit 3", "--limit is about tasks; give --tasks"),
        ("--tasks-folder here", "--tasks-folder is about tasks; give --tasks"),
        ("--tasks arc_easy", "--tasks needs lm_eval, which is not installed; pip install 'speedrun-mup[lm-eval]'"),
    ],
)
def test_flags_of_eval_are_judged_before_anything_is_loaded(flags, says, capsys, monkeypatch):
    for name in ("speedrun_mup.training.load", "lm_eval"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr("speedrun_mup.packages._place", lambda package: None)
    assert says in fails(["eval", "runs/none", *flags.split()], capsys)


def test_a_run_is_only_read(folder):
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    load_run(folder, device="cpu").generate("a", max_new_tokens=3)
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == before
