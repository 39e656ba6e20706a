"""A run that is there, to be used: its model, its tokenizer and its settings, from its folder."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from speedrun_mup.config import TrainConfig
from speedrun_mup.core.device import pick_device
from speedrun_mup.core.distributed import World
from speedrun_mup.core.errors import ConfigError, UserError
from speedrun_mup.core.model import GPT, declarations
from speedrun_mup.core.model.shape import VOCAB_MULTIPLE
from speedrun_mup.data.corpus import find_corpus
from speedrun_mup.data.manifest import MANIFEST
from speedrun_mup.data.shards import Corpus
from speedrun_mup.data.tokenizers import Tokenizer, byte_lengths, bytes_of_tokens, load_tokenizer
from speedrun_mup.evaluate import Evaluation, evaluate, text_rows, validation_rows
from speedrun_mup.files import printable
from speedrun_mup.sample.sampling import Sampling
from speedrun_mup.sample.writer import Writer
from speedrun_mup.training.checkpoint import CheckpointError, Checkpoints, DamagedCheckpoint, Loaded
from speedrun_mup.training.hardware import pick_dtype
from speedrun_mup.training.model_config import Vocabulary, model_config
from speedrun_mup.training.resume import DEFAULTS_FOR_OLD_CHECKPOINTS, checked_state
from speedrun_mup.training.run_folder import saved_config
from speedrun_mup.training.schedules import Schedule
from speedrun_mup.training.tracking import read_metrics

if TYPE_CHECKING:
    import pandas

VOCABULARY = "vocabulary"  # in the state of an imported checkpoint, which has no corpus: what its ids stand for


@dataclass(frozen=True)
class LoadedRun:
    """A trained model and what belongs to it; unpacks into (model, tokenizer, config).

    step: of the checkpoint that it is from. corpus: what its data setting names now; without text for an imported run.
    window: the long attention window at that step, in blocks. trained_on: fingerprint of the corpus that it was trained on,
    "" if that is not known.
    """

    folder: Path
    step: int
    model: GPT
    config: TrainConfig
    corpus: Corpus
    window: int
    trained_on: str

    def __repr__(self) -> str:
        size = sum(parameter.numel() for parameter in self.model.parameters())
        return (
            f"<run {printable(self.folder)}: step {self.step:,} of {self.config.iterations:,}, width {self.config.width}, "
            f"{size:,} parameters, {printable(self.corpus.tokenizer)} tokens, on {self.model.embed.weight.device}>"
        )

    def __iter__(self) -> Any:
        yield from (self.model, self.tokenizer, self.config)

    @functools.cached_property
    def tokenizer(self) -> Tokenizer:
        """Of the run's tokens. ConfigError if they stand for no text."""
        return load_tokenizer(self.corpus)

    @functools.cached_property
    def writer(self) -> Writer:
        """What draws text from the model."""
        return Writer(self.model, self.tokenizer, self.window)

    def generate(self, prompt: str | Sequence[str] = "", **sampling: Any) -> Any:
        """The text that follows a prompt, or each of several; without a prompt, a new document.

        Args:
            prompt: a text, or a list of them, which are gone on with side by side.
            **sampling: of `Sampling`: max_new_tokens, temperature, top_k, top_p, seed.

        Returns:
            A text, or a list of texts, without the prompts.
        """
        known = Sampling.__dataclass_fields__
        if unknown := sampling.keys() - known.keys():
            raise ConfigError(f"unknown setting {min(unknown)}; choose from {', '.join(known)}")
        found = self.writer.generate([prompt] if isinstance(prompt, str) else prompt, Sampling(**sampling))
        return found[0] if isinstance(prompt, str) else found

    def evaluate(
        self, data: str | Path | Corpus | None = None, tokens: int | None = None, suffixes: Sequence[str] = ()
    ) -> Evaluation:
        """Loss, perplexity and bits per byte on some text.

        Args:
            data: a corpus, its folder, or a text file or folder of them; default: the run's own validation.
            tokens: as many at most; default: all, and of the run's own validation what it used.
            suffixes: of files in a folder that are read as plain text too, such as (".py",).

        Raises:
            ConfigError: for data of another tokenizer, or if the run's own have changed.
        """
        chunk = None
        if data is None:
            self._check_own_data()
            data, tokens = self.corpus, tokens or self.config.val_tokens
            chunk = self.config.val_chunk_tokens if tokens == self.config.val_tokens else None
        elif not isinstance(data, Corpus):
            found = _corpus_at(str(data))
            data = str(data) if found is None else found
        if isinstance(data, str):
            rows, lengths = text_rows([data], self.tokenizer, tokens, suffixes), byte_lengths(self.tokenizer)
        else:
            self._check_tokens(data)
            rows, lengths = validation_rows(data, tokens, chunk), bytes_of_tokens(self.corpus)
        return evaluate(self.model, self.window, rows, lengths)

    def _check_own_data(self) -> None:
        """ConfigError unless the corpus is the one that the run was trained on."""
        if not self.trained_on:
            raise ConfigError(
                f"{printable(self.folder)} was imported without data; give --data and what to evaluate on"
            )
        if not self.corpus.is_known_as(self.trained_on):
            raise ConfigError(
                f"{printable(self.corpus.directory)} is not the data that the run was trained on, so it may have trained on "
                "text that this validates on; restore the run's own, or give --data and what to evaluate on"
            )

    def _check_tokens(self, other: Corpus) -> None:
        """ConfigError unless the other corpus has the same ids for the same text."""
        mine, theirs = ((c.tokenizer, c.vocab_size, c.bos_token, c.tokenizer_sha256) for c in (self.corpus, other))
        if mine != theirs:
            raise ConfigError(
                f"{printable(other.directory)} holds tokens of another tokenizer ({printable(other.tokenizer)}) than the run's "
                f"({printable(self.corpus.tokenizer)}); give the text itself, or tokenize it with "
                f"--tokenizer {printable(self.corpus.directory)}"
            )

    @property
    def metrics(self) -> pandas.DataFrame:
        """All records of metrics.jsonl, a row each. Needs pandas; `read_metrics` gives them as dictionaries."""
        try:
            import pandas
        except ImportError:
            raise ConfigError("a table of metrics needs pandas; pip install pandas") from None
        return pandas.DataFrame(read_metrics(self.folder))


def load_run(
    folder: str | Path,
    step: int | None = None,
    device: str = "auto",
    data: str | None = None,
    dtype: torch.dtype | None = None,
) -> LoadedRun:
    """A run's model, as its newest intact checkpoint has it, to be used. The run may be unfinished, or of an earlier edition.

    Args:
        folder: the run's, or that of one of its checkpoints.
        step: of another checkpoint.
        device: auto, cpu, cuda or mps.
        data: the corpus that it was trained on, if it has moved.
        dtype: of embeddings and activations; default: as the run's settings and the device have it.

    Raises:
        ConfigError: there is no run, its data is missing, or it has changed and its ids may mean something else. Changed data
            whose ids mean the same is an error only where the model is evaluated on it.
        CheckpointError: it has no such checkpoint, or none that is intact.
    """
    folder, path = find_checkpoint(Path(folder), step)
    loaded = Loaded(path)
    state = checked_state(DEFAULTS_FOR_OLD_CHECKPOINTS | loaded.state, path)
    cfg = loaded.cfg
    if VOCABULARY in state:
        if data is not None:
            raise ConfigError(
                f"{printable(folder)} was imported, with its tokenizer; leave out --run-data {printable(data)}"
            )
        corpus = _vocabulary_of(folder, state, path)
    else:
        corpus = _corpus_of(cfg, data, state["corpus"])
    place = pick_device(device)
    with torch.device("meta"):
        model = GPT(model_config(cfg, corpus, "blocked", dtype or pick_dtype(cfg, place)))
    _take_weights(model, loaded)
    window = Schedule.of(cfg).at(loaded.step).window
    return LoadedRun(folder, loaded.step, model.to(place), cfg, corpus, window, state["corpus"])


def _take_weights(model: GPT, loaded: Loaded) -> None:
    """Give `model` the weights of a checkpoint. CheckpointError if they are another model's, or are no finite numbers."""
    own, shown = model.state_dict(), printable(loaded.path)
    for name, tensor in loaded.model.items():
        if not tensor.is_floating_point() or not tensor.isfinite().all():
            raise CheckpointError(f"{shown}: {printable(name)} has what is no finite number; take another --checkpoint")
    weights = {name: tensor.to(own[name].dtype) if name in own else tensor for name, tensor in loaded.model.items()}
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as fault:  # names or shapes of another edition's, or another vocabulary
        why = printable(str(fault).partition("\n")[2].strip())
        raise CheckpointError(f"{shown} is of another model: {why}; restore the run's own settings and data") from None


def check_weights(loaded: Loaded) -> None:
    """CheckpointError unless these are all weights of the model that the checkpoint's settings describe, of finite numbers."""
    embedding = loaded.model.get("embed.weight")
    rows = VOCAB_MULTIPLE if embedding is None or embedding.ndim != 2 else len(embedding)
    if "config" in loaded.state:
        _take_weights(declarations(model_config(loaded.cfg, Vocabulary(rows))), loaded)


def find_checkpoint(folder: Path, step: int | None = None) -> tuple[Path, Path]:
    """A run's folder, and that of one of its checkpoints: of `step`, the one that `folder` is, or the newest intact one."""
    here = Path(os.path.abspath(folder))  # `folder` may be short, such as "."
    if matched := re.fullmatch(r"step-(\d{8,})", here.name):
        if step not in (None, int(matched[1])):
            raise ConfigError(
                f"{printable(folder)} is a checkpoint itself; give the run's folder with --checkpoint {step}"
            )
        folder, step = here.parent.parent, int(matched[1])
    saved_config(folder)  # raises, if there is no run
    root = folder / "checkpoints"
    if step is not None:
        path = root / f"step-{step:08d}"
        if not path.is_dir():
            have = sorted(
                int(other.name.removeprefix("step-")) for other in root.glob("step-*") if other.name[5:].isdigit()
            )
            raise CheckpointError(
                f"{printable(folder)} has no checkpoint of step {step}; it has {', '.join(map(str, have)) or 'none'}"
            )
        return folder, path
    checkpoints = Checkpoints(root, World())
    try:
        found = checkpoints.newest(lambda line: None)
    finally:
        checkpoints.close()
    if found is None:
        raise CheckpointError(
            f"{printable(folder)} has no checkpoint yet; one is written at the end, and with --save-every N before"
        )
    return folder, found


def _vocabulary_of(folder: Path, state: Mapping[str, Any], path: Path) -> Corpus:
    """What the ids of an imported run stand for: a corpus without text. DamagedCheckpoint if that is not known."""
    told = state[VOCABULARY]
    kinds = {"tokenizer": str, "tokenizer_sha256": str, "vocab_size": int, "bos_token": int}
    if not isinstance(told, dict) or {name: type(value) for name, value in told.items()} != kinds:
        raise DamagedCheckpoint(f"{printable(path)}: its {VOCABULARY} is not one; import it again")
    return Corpus(folder, fingerprint="", train=(), val=(), source="none: the run was imported", **told)


def _corpus_of(cfg: TrainConfig, data: str | None, fingerprint: str) -> Corpus:
    """The corpus of a run. ConfigError if its ids may mean something else than those that the run was trained on."""
    try:
        corpus = find_corpus(cfg.data if data is None else data, cfg.tokenizer)[0]
    except UserError as fault:
        raise type(fault)(
            f"{fault}; if the run's data moved, give their new place with --run-data (in Python data=)"
        ) from None
    if not corpus.is_known_as(fingerprint) and corpus.tokenizer.startswith(("bpe:", "hf:", "synthetic")):
        raise ConfigError(
            f"{printable(corpus.directory)} is not the data that the run was trained on, and its {printable(corpus.tokenizer)} "
            "tokens may be others; give the place of the run's own with --run-data (in Python data=)"
        )
    return corpus


def _corpus_at(data: str) -> Corpus | None:
    """The corpus that `data` names; None for text."""
    folder = Path(data)
    named = data in ("auto", "embedded", "synthetic") or ("," in data and not os.path.exists(data))
    shards = folder.is_dir() and ((folder / MANIFEST).exists() or any(folder.glob("*.bin")))
    return find_corpus(data)[0] if named or shards else None
