"""EleutherAI's lm-evaluation-harness on a run: an adapter that it knows as "speedrun-mup", and the tasks of one call.

The adapter is the reference for the way through `export --to hf`: both cut what is too long alike, and give the same
numbers. Needs the extra `lm-eval`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lm_eval
import lm_eval.models  # registers the harness's own, which no longer happens once there is another
import yaml
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window, make_table

from speedrun_mup.core.errors import ConfigError, UserError, in_a_line
from speedrun_mup.evaluate import ending_scores
from speedrun_mup.files import printable, read_text
from speedrun_mup.sample.sampling import Sampling
from speedrun_mup.sample.stream import TextStream
from speedrun_mup.training.load import LoadedRun, load_run

PASS_TOKENS = 8192  # that go through the model at once
SIDE_BY_SIDE = 16  # texts that are written at once
MOST_NEW = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # one thing's names in task files
USUAL_NEW = 256  # tokens of an answer, where a task does not say


@register_model("speedrun-mup")
class HarnessModel(TemplateLM):
    """A run as lm-evaluation-harness asks for it. Every text begins with BOS; what is too long is cut from the left.

    Args:
        run: it, or its folder, as in `model_args="run=runs/NAME"`.
        max_length: tokens that are seen before a scored one; default: those of a training sequence.
        batch_size: texts that are written at once; scoring takes as many as fit.
        step: of another checkpoint than the newest.
        device: auto, cpu, cuda or mps.
        max_batch_size: no matter; the harness gives it to every model.
    """

    def __init__(
        self,
        run: LoadedRun | str | Path,
        max_length: int | None = None,
        batch_size: int | str | None = None,
        step: int | None = None,
        device: str | None = None,
        max_batch_size: int | None = None,
    ):
        super().__init__()
        self.run = run if isinstance(run, LoadedRun) else load_run(run, step, device or "auto")
        self.max_length = max_length or self.run.config.micro_batch_tokens
        self.side_by_side = int(batch_size) if batch_size and str(batch_size).isdigit() else SIDE_BY_SIDE
        self.was_asked = False

    @property
    def eot_token_id(self) -> int:
        """The token that ends a document: the one that opens the next."""
        return self.run.model.cfg.bos_token

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Ids of a text, after BOS unless `add_special_tokens` is False."""
        ids = self.run.writer.ids_of(string)
        return ids[1:] if add_special_tokens is False else ids

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """For (what was asked, context, ending) the log probability of the ending, and whether it is what greedy text has."""
        self.was_asked = True
        texts = [self._cut(context + ending, len(ending)) for _, context, ending in requests]
        found: list[tuple[float, bool]] = [(0.0, True)] * len(texts)
        for rows in self._passes(texts):
            scores = ending_scores(self.run.model, self.run.window, [texts[row] for row in rows])
            for row, score in zip(rows, scores, strict=True):
                found[row] = score
                if requests[row][0] is not None:  # None: a part of a whole text
                    self.cache_hook.add_partial("loglikelihood", requests[row][0], score)
        return found

    def _cut(self, ids: list[int], count: int) -> tuple[list[int], int]:
        """The end of a text, of which the last `count` tokens are scored, all of them."""
        return ids[-max(self.max_length, count) - 1 :], count

    def _passes(self, texts: Sequence[tuple[list[int], int]]) -> Iterator[list[int]]:
        """Numbers of texts that go through the model together, long ones first; those that end in nothing are left out."""
        order = sorted((row for row, (_, count) in enumerate(texts) if count), key=lambda row: -len(texts[row][0]))
        rows: list[int] = []
        held, block = 0, self.run.model.cfg.block_size
        for row in order:
            size = -(-len(texts[row][0]) // block) * block
            if rows and held + size > PASS_TOKENS:
                yield rows
                rows, held = [], 0
            rows.append(row)
            held += size
        if rows:
            yield rows

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """The log probability of each whole text, a window of `max_length` tokens after another, as the harness cuts them."""
        found = [0.0] * len(requests)
        windows = [(number, pair) for number, request in enumerate(requests) for pair in self._windows(request.args[0])]
        scores = self._loglikelihood_tokens([(None, *pair) for _, pair in windows])
        for (number, _), (score, _) in zip(windows, scores, strict=True):
            found[number] += score
        for request, score in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, score)
        return found

    def _windows(self, text: str) -> Iterator[tuple[list[int], list[int]]]:
        """The parts of a text: what is seen before each, and what is scored."""
        opening, *ids = self.tok_encode(text)
        yield from map(make_disjoint_window, get_rolling_token_windows(ids, opening, self.max_length, context_len=1))

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each prompt, up to the first of its stops or the end of the document."""
        self.was_asked = True
        found = [""] * len(requests)
        groups: dict[str, list[int]] = {}
        for row, request in enumerate(requests):
            groups.setdefault(json.dumps(request.args[1], sort_keys=True, default=str), []).append(row)
        for rows in groups.values():
            rows.sort(key=lambda row: -len(requests[row].args[0]))
            for begin in range(0, len(rows), self.side_by_side):
                together = rows[begin : begin + self.side_by_side]
                answers = self._answers([requests[row].args[0] for row in together], requests[together[0]].args[1])
                for row, answer in zip(together, answers, strict=True):
                    found[row] = answer
                    self.cache_hook.add_partial("generate_until", requests[row].args, answer)
        return found

    def _answers(self, prompts: Sequence[str], wanted: dict[str, Any]) -> list[str]:
        """The texts that follow `prompts`, side by side."""
        sampling, stops = _sampling(wanted), _stops(wanted.get("until"))
        room = max(self.max_length - sampling.max_new_tokens, self.run.model.cfg.block_size)
        streams = [TextStream(self.run.tokenizer) for _ in prompts]
        answers, done = [""] * len(prompts), [False] * len(prompts)
        for tokens in self.run.writer.tokens([self.tok_encode(prompt)[-room:] for prompt in prompts], sampling):
            for number, token in tokens.items():
                answers[number] += streams[number].add(token)
                done[number] = done[number] or any(stop in answers[number] for stop in stops)
            if all(done[number] for number in tokens):
                break
        return [_before(answer + stream.end(), stops) for answer, stream in zip(answers, streams, strict=True)]


def _sampling(wanted: dict[str, Any]) -> Sampling:
    """The settings that a task asks for; greedy unless it says `do_sample`. ConfigError for what are none."""
    try:
        return _read_sampling(wanted)
    except (TypeError, ValueError, OverflowError) as fault:
        raise ConfigError(f"the task's generation_kwargs are none ({in_a_line(fault)}); repair the task file") from None


def _read_sampling(wanted: dict[str, Any]) -> Sampling:
    most = next((int(wanted[name]) for name in MOST_NEW if wanted.get(name) is not None), USUAL_NEW)
    if not wanted.get("do_sample"):
        return Sampling(max_new_tokens=most, temperature=0.0)
    usual: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return Sampling(
        max_new_tokens=most,
        **{name: value if wanted.get(name) is None else type(value)(wanted[name]) for name, value in usual.items()},
    )


def _stops(value: Any) -> list[str]:
    """What ends an answer, of a text or a list of texts. ConfigError for anything else."""
    found = [value] if isinstance(value, str) else value or []
    if not isinstance(found, list | tuple) or not all(isinstance(stop, str) for stop in found):
        raise ConfigError(f"the task's until: {printable(value)} is no list of texts; repair the task file")
    return [stop for stop in found if stop]


def _before(text: str, stops: Iterable[str]) -> str:
    for stop in stops:
        text = text.partition(stop)[0]
    return text


def evaluate_tasks(
    run: LoadedRun,
    tasks: Sequence[str],
    folder: Path | None = None,
    limit: int | None = None,
    num_fewshot: int | None = None,
) -> dict[str, Any]:
    """What lm-evaluation-harness finds: its own dictionary, with the numbers of each task in "results".

    Args:
        run: the model.
        tasks: their names, or those of groups.
        folder: of task files of one's own, which may hold code.
        limit: questions of each task.
        num_fewshot: examples before each question; default: as the task says.

    Raises:
        ConfigError: a task is unknown, or its data cannot be had.
    """
    if folder is not None and not folder.is_dir():
        raise ConfigError(f"--tasks-folder {printable(folder)} is no folder; give the one that holds the task files")
    model = HarnessModel(run)
    try:
        manager = _manager(tasks, folder)
        if unknown := [name for name in tasks if name not in manager.all_tasks]:
            raise ConfigError(f"lm-eval knows no task {printable(unknown[0])}; `lm-eval ls tasks` lists them")
        found = lm_eval.simple_evaluate(
            model, tasks=list(tasks), task_manager=manager, limit=limit, num_fewshot=num_fewshot, log_samples=False
        )
    except UserError:
        raise
    except Exception as fault:  # of a task file, of a data set, of a hub
        if model.was_asked:
            raise
        raise ConfigError(
            f"{printable(', '.join(tasks))} cannot be loaded ({printable(in_a_line(fault))}); go online, or repair the task file"
        ) from fault
    return dict(found)


def _manager(tasks: Sequence[str], folder: Path | None) -> TaskManager:
    """What knows these tasks. The harness's own, of which there are thousands, are only read where they may be needed."""
    if folder is None:
        return TaskManager()
    own = TaskManager(include_path=str(folder), include_defaults=False)
    if {*tasks} <= {*own.all_subtasks}:
        return own
    _check_files(folder)
    return TaskManager(include_path=str(folder))


def _check_files(folder: Path) -> None:
    """ConfigError for the first task file that is not YAML: the harness passes over it, and then knows no such task."""
    for file in sorted(folder.rglob("*.y*ml")):
        try:
            list(yaml.parse(read_text(file)))  # without its tags, which are the harness's own
        except yaml.YAMLError as fault:
            raise ConfigError(
                f"{printable(file)} is no YAML ({printable(in_a_line(fault))}); repair the task file"
            ) from None


def table(found: dict[str, Any]) -> str:
    """The results for a terminal, as the harness prints them."""
    groups = [make_table(found, "groups")] if found.get("groups") else []
    return "\n".join([make_table(found), *groups]).rstrip("\n")
