"""lm-evaluation-harness on a run, through the adapter and through the export, offline, on task files made here."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY

from speedrun_mup.cli import main
from speedrun_mup.config import make_config
from speedrun_mup.core.errors import ConfigError
from speedrun_mup.evaluate import token_losses
from speedrun_mup.sample.sampling import Sampling
from speedrun_mup.training import train
from speedrun_mup.training.load import LoadedRun, load_run

lm_eval = pytest.importorskip("lm_eval")
adapter = pytest.importorskip("speedrun_mup.export.lm_eval")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]  # of the harness and what it imports

CHOICE = """
task: mine_choice
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}, {{metric: acc_norm}}, {{metric: brier_score}}]
"""
ROLLING = """
task: mine_rolling
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list: [{{metric: bits_per_byte}}, {{metric: byte_perplexity}}]
"""
WRITING = """
task: mine_writing
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_text: "{{{{question}}}}"
doc_to_target: "{{{{written}}}}"
generation_kwargs: {{until: ["\\n", "e"], max_gen_toks: 12, do_sample: false}}
metric_list: [{{metric: exact_match}}]
"""
QUESTIONS = [
    "def ",
    "import os\nimport ",
    "x = [1, 2, ",
    "class Ä(",
    "return self.value if self.value is not None else ",
]
TEXTS = ["def área(x):\n    return x\n", "spam and eggs " * 5, "x"]
LONG = "".join(f"def f{i}(x):\n    return x ** {i}\n" for i in range(30))  # longer than three training sequences


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> LoadedRun:
    """A model of bytes that has learned a little, so that its choices differ."""
    changes = {
        "data": "embedded",
        "out": str(tmp_path_factory.mktemp("runs")),
        "name": "a",
        "width": 32,
        "iterations": 12,
    }
    return load_run(train(make_config("laptop", TINY | changes)).folder, device="cpu")


@pytest.fixture(scope="module")
def tasks(run, tmp_path_factory) -> Path:
    """A folder of three tasks. Three of the five texts to write are those that the model writes."""
    folder = tmp_path_factory.mktemp("tasks")
    stopped = {"until": ["\n", "e"], "max_gen_toks": 12}
    written = adapter.HarnessModel(run).generate_until([asked(question, stopped) for question in QUESTIONS])
    rows = [
        {
            "question": q,
            "choices": ["self", " ", "e" * 40, "\n    return"],
            "answer": i % 4,
            "text": [*TEXTS, LONG][i % 4],
        }
        for i, q in enumerate(QUESTIONS)
    ]
    rows = [row | {"written": text + "!" * (i > 2)} for i, (row, text) in enumerate(zip(rows, written, strict=True))]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in (("choice", CHOICE), ("rolling", ROLLING), ("writing", WRITING)):
        (folder / f"{name}.yaml").write_text(text.format(data=folder / "data.jsonl"))
    return folder


@pytest.fixture(autouse=True)
def caches(tmp_path_factory, monkeypatch):
    """Nothing is written outside this session's folder, nothing is asked of a hub."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.getbasetemp() / "datasets")


def asked(*args):
    return SimpleNamespace(args=args)


def alone(run: LoadedRun, context: str, ending: str) -> tuple[float, bool]:
    """The reference: all logits of one text. The harness gives spaces at the end of a context to the ending."""
    stripped = context.rstrip()
    before, ids = [256, *stripped.encode()], [*(context[len(stripped) :] + ending).encode()]
    with torch.no_grad():
        logits = run.model.logits(torch.tensor([*before, *ids][:-1], dtype=torch.int32), run.window)[len(before) - 1 :]
    scores = logits.double().log_softmax(dim=-1)[range(len(ids)), ids]
    return scores.sum().item(), logits.argmax(dim=-1).tolist() == ids


def test_endings_are_scored_as_alone(run, monkeypatch):
    """Whatever else is in the pass; an ending that greedy text has is found out."""
    model = adapter.HarnessModel(run)
    greedy = run.generate("class Ä(", max_new_tokens=5, temperature=0)
    pairs = [(q, e) for q in [*QUESTIONS, ""] for e in ("self", "é" * 30, "x")] + [("class Ä(", greedy)]
    for most in (adapter.PASS_TOKENS, 64):
        monkeypatch.setattr(adapter, "PASS_TOKENS", most)
        found = model.loglikelihood([asked(*pair) for pair in pairs], disable_tqdm=True)
        for (score, right), expected in zip(found, (alone(run, *pair) for pair in pairs), strict=True):
            assert score == pytest.approx(expected[0], abs=1e-4) and right == expected[1]
    assert found[-1][1] and not all(right for _, right in found)


def test_a_context_is_cut_from_the_left_and_an_ending_never(run):
    model = adapter.HarnessModel(run, max_length=20)
    for text, ending in (("abcdefghij" * 5, "self"), ("a", "b" * 50)):
        ids, count = [256, *text.encode(), *ending.encode()], len(ending)
        (found,) = model.loglikelihood([asked(text, ending)], disable_tqdm=True)
        kept = ids[-max(20, count) - 1 :]
        with torch.no_grad():
            logits = run.model.logits(torch.tensor(kept[:-1], dtype=torch.int32), run.window)[-count:]
        expected = logits.log_softmax(dim=-1)[range(count), ids[-count:]].sum().item()
        assert found[0] == pytest.approx(expected, abs=1e-4) and abs(found[0] - alone(run, text, ending)[0]) > 1e-3
    assert model.loglikelihood([asked("a", "")], disable_tqdm=True) == [(0.0, True)]


def test_a_whole_text_is_what_eval_makes_of_it(run, tmp_path):
    text = "def main():\n    pass\n" * 30
    (tmp_path / "a.txt").write_text(text)
    (found,) = adapter.HarnessModel(run, max_length=len(text)).loglikelihood_rolling([asked(text)])
    assert -found / len(text) / math.log(2) == pytest.approx(run.evaluate(tmp_path / "a.txt").bits_per_byte, rel=1e-6)
    assert found == pytest.approx(-token_losses(run.model, run.window, np.array([256, *text.encode()])).sum(), rel=1e-6)


def test_a_longer_text_is_cut_into_windows(run):
    """The first begins with BOS, others with the last token of the one before; the last one is as long as the others."""
    ids, most = [256, *LONG.encode()], 200
    edges = [*range(0, len(ids) - 1, most), len(ids) - 1]
    expected = 0.0
    for begin, end in itertools.pairwise(edges):
        seen = ids[max(end - most, 0) : end + 1]
        with torch.no_grad():
            logits = run.model.logits(torch.tensor(seen[:-1], dtype=torch.int32), run.window)[begin - end :]
        expected += logits.double().log_softmax(dim=-1)[range(end - begin), ids[begin + 1 : end + 1]].sum().item()
    model = adapter.HarnessModel(run, max_length=most)
    assert (len(ids) - 1) % most and len(edges) > 4
    found = model.loglikelihood_rolling([asked("x"), asked(LONG), asked("")])
    assert found == pytest.approx([alone(run, "", "x")[0], expected, 0.0], abs=1e-3)
    assert abs(expected - alone(run, "", LONG)[0]) > 0.1


def test_answers_are_the_models_greedy_text_up_to_a_stop(run):
    model = adapter.HarnessModel(run, max_length=4096, batch_size="2")
    whole = run.generate(QUESTIONS, max_new_tokens=20, temperature=0)
    stop = whole[0][3]
    found = model.generate_until([asked(q, {"until": [stop, ""], "max_gen_toks": 20}) for q in QUESTIONS])
    assert found == [text.partition(stop)[0] for text in whole] and found[0] == whole[0][: whole[0].index(stop)]
    mixed = model.generate_until(
        [asked("def ", {"max_new_tokens": 20}), asked("def ", {"until": stop, "max_tokens": 20})]
    )
    assert mixed == [whole[0], found[0]]
    drawn = {"do_sample": True, "temperature": 0.7, "top_k": 5, "max_gen_toks": 20}
    expected = run.generate("def ", max_new_tokens=20, temperature=0.7, top_k=5, top_p=1.0)
    assert model.generate_until([asked("def ", drawn)]) == [expected]
    model = adapter.HarnessModel(run, max_length=40)
    short = model.generate_until([asked("abcdefghij" * 9, {"max_gen_toks": 5})])  # without BOS, which was cut
    cut = run.writer.tokens([[*(("abcdefghij" * 9)[-35:]).encode()]], Sampling(max_new_tokens=5, temperature=0))
    assert short == ["".join(chr(tokens[0]) for tokens in cut)]


@pytest.mark.parametrize(
    ("wanted", "says"),
    [
        ({"max_gen_toks": "many"}, "generation_kwargs are none \\(ValueError: invalid literal"),
        ({"do_sample": True, "temperature": [1]}, "generation_kwargs are none \\(TypeError"),
        ({"max_gen_toks": 0}, "max_new_tokens=0 must be at least 1"),
        ({"until": 3}, "until: 3 is no list of texts; repair the task file"),
        ({"until": [3]}, "is no list of texts"),
    ],
)
def test_what_a_task_asks_for_in_vain_is_one_line(wanted, says, run):
    with pytest.raises(ConfigError, match=says):
        adapter.HarnessModel(run).generate_until([asked("def ", wanted)])


def test_the_command_prints_the_tasks_numbers(run, tasks, capsys):
    words = [
        "eval",
        str(run.folder),
        "--tasks",
        "mine_choice,mine_rolling",
        "--tasks-folder",
        str(tasks),
        "--device",
        "cpu",
    ]
    assert main([*words, "--limit", "3", "--json"]) == 0
    out = capsys.readouterr().out
    found = json.loads(out[out.index("{") :])
    right = [
        max(range(4), key=lambda i: alone(run, q, ["self", " ", "e" * 40, "\n    return"][i])[0]) for q in QUESTIONS[:3]
    ]
    assert found["mine_choice"]["acc,none"] == pytest.approx(sum(r == i % 4 for i, r in enumerate(right)) / 3)
    nats = -sum(alone(run, "", text)[0] for text in TEXTS)
    assert found["mine_rolling"]["bits_per_byte,none"] == pytest.approx(
        nats / math.log(2) / len("".join(TEXTS).encode()), rel=1e-5
    )
    assert main(words) == 0
    assert "|mine_choice" in capsys.readouterr().out


def test_through_the_export_the_numbers_are_the_same(run, tasks, tmp_path):
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    assert len(LONG) > 3 * run.config.micro_batch_tokens
    folder = tmp_path / "hf"
    assert main(["export", str(run.folder), "--to", "hf", str(folder)]) == 0
    names = ["mine_choice", "mine_writing"]
    ours = adapter.evaluate_tasks(run, [*names, "mine_rolling"], tasks)["results"]
    assert ours["mine_writing"]["exact_match,none"] == pytest.approx(0.6)

    def theirs(tasks_of: list[str], more: str) -> dict:
        manager = adapter.TaskManager(include_path=str(tasks), include_defaults=False)
        arguments = f"pretrained={folder},trust_remote_code=True,dtype=float32{more}"
        return lm_eval.simple_evaluate(
            "hf",
            model_args=arguments,
            tasks=tasks_of,
            task_manager=manager,
            device="cpu",
            batch_size=2,
            log_samples=False,
        )["results"]

    found = theirs(names, "") | theirs(["mine_rolling"], ",add_bos_token=False")
    for task, numbers in ours.items():
        numbers = {name: number for name, number in numbers.items() if isinstance(number, float)}
        assert numbers and numbers == pytest.approx({name: found[task][name] for name in numbers}, rel=1e-4), task


def test_what_the_harness_cannot_do_is_one_line(run, tasks, tmp_path, capsys):
    own = ["eval", str(run.folder), "--device", "cpu"]
    (tmp_path / "bad.yaml").write_text(CHOICE.format(data=tmp_path / "none.jsonl").replace("mine_choice", "mine_bad"))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "mine.yaml").write_text("task: mine_broken\ndoc_to_text: [!function a.b\n")
    for words, says in (
        (["--tasks", "mine_broken", "--tasks-folder", str(tmp_path / "broken")], "broken/mine.yaml is no YAML ("),
        (["--tasks", "mine_chioce", "--tasks-folder", str(tasks)], "lm-eval knows no task mine_chioce"),
        (["--tasks", "mine_choice", "--tasks-folder", str(tasks / "no")], "is no folder; give the one that holds"),
        (["--tasks", "mine_bad", "--tasks-folder", str(tmp_path)], "mine_bad cannot be loaded (FileNotFoundError"),
    ):
        capsys.readouterr()
        assert main([*own, *words]) == ConfigError.exit_code
        error = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(error) == 1 and says in error[0]


def test_a_script_names_the_adapter(run, tasks):
    """`import speedrun_mup.export.lm_eval` is all that another program needs."""
    code = (
        "import lm_eval, speedrun_mup.export.lm_eval as a\n"
        f"m = a.TaskManager(include_path={str(tasks)!r}, include_defaults=False)\n"
        f"r = lm_eval.simple_evaluate('speedrun-mup', model_args='run={run.folder}', tasks=['mine_choice'], task_manager=m, "
        "device='cpu', limit=2, log_samples=False)\nprint(r['results']['mine_choice']['brier_score,none'])\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    expected = adapter.evaluate_tasks(run, ["mine_choice"], tasks, limit=2)["results"]["mine_choice"]
    assert float(done.stdout.split()[-1]) == pytest.approx(expected["brier_score,none"], rel=1e-5)
