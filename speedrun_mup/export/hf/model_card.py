"""The README.md of an exported model: what it is, how it was trained, how to use it."""

from __future__ import annotations

import json
import re
from typing import Any

import speedrun_mup
from speedrun_mup.config import computed_settings
from speedrun_mup.files import printable
from speedrun_mup.training.load import LoadedRun
from speedrun_mup.training.schedules import Schedule
from speedrun_mup.training.tracking import METRICS, read_metrics

_PAGE = """\
---
{header}
---

# {name}

A GPT of {parameters:,} parameters, {origin}.
Its architecture is record 26 of [modded-nanogpt](https://github.com/KellerJordan/modded-nanogpt), by Keller Jordan and
contributors.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

name = {name_in_code}  # this folder; from a hub also give revision="<commit>", since the code that you trust may change
tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
prompts = tokenizer(["The "], return_tensors="pt", padding=True)
print(tokenizer.batch_decode(model.generate(**prompts, max_new_tokens=50), skip_special_tokens=True)[0])
```

The code is in this folder and needs PyTorch and transformers only, 4.57 or newer.

## Numbers

| | |
|---|---|
{numbers}

The loss is in nats per token, on the validation split of the data, special tokens counted.

## How it was trained

{training}

## What to know

- It continues text; it was not trained on conversations or instructions.
- A text begins with the special token {bos}, which the tokenizer writes. The same token ends a text, and it fills up the
  shorter texts of a batch, on the left.
- Attention is local: a token sees {window} tokens back in the layers with the long window, counted in blocks of {block}. A cache
  keeps no more than that.
- {padding} rows of the embeddings and of the head stand for no token. They take part in the softmax, as in training;
  `generate` leaves them out.
- The scale of the logits, with muP's factor in it, is {scale}.
"""


_TRAINING = """\
{steps}. Parametrization {table}, hyperparameters tuned at width {tuned}, used at width {width}.

<details><summary>All settings that decide what the run computed</summary>

```json
{settings}
```

</details>
"""


def model_card(run: LoadedRun, name: str, settings: dict[str, Any], bos: str) -> str:
    """The page.

    Args:
        run: the model and its settings.
        name: of the folder.
        settings: what config.json holds.
        bos: how the tokenizer spells the token that opens a document.
    """
    cfg, found = run.config, _validation(run)
    tokens = f"{Schedule.of(cfg).tokens_before(run.step):,}"
    version, source = f"speedrun-mup {speedrun_mup.__version__}", _plain(run.corpus.source, 300)
    numbers = {
        "validation loss": _number(found.get("loss")),
        "bits per byte": _number(found.get("bits_per_byte")),
        "tokens seen": tokens if run.trained_on else "not known",
        "step": f"{run.step:,} of {cfg.iterations:,}",
        "parameters": f"{_parameters(run):,}",
        "width, layers, heads": f"{cfg.width}, {cfg.n_layer}, {settings['num_attention_heads']}",
        "tokenizer": f"{_plain(run.corpus.tokenizer, 60)}, {run.corpus.vocab_size:,} tokens",
    }
    return _PAGE.format(
        header=_header(name, run, found),
        name=_plain(name, 200),
        name_in_code=json.dumps(printable(name), ensure_ascii=False),
        parameters=_parameters(run),
        origin=f"trained by {version} on {tokens} tokens of {source}"
        if run.trained_on
        else f"written by {version}, which imported it from another program's file",
        numbers="\n".join(f"| {what} | {number} |" for what, number in numbers.items()),
        training=_training(run) if run.trained_on else "That is not known here.\n",
        scale="in the head's weights" if settings["logit_scale"] == 1 else "in config.json, as `logit_scale`",
        bos=_plain(bos, 60),
        window=f"up to {run.window * cfg.block_size:,}",
        block=f"{cfg.block_size:,}",
        padding=settings["vocab_size"] - run.corpus.vocab_size,
    )


def _training(run: LoadedRun) -> str:
    cfg = run.config
    return _TRAINING.format(
        steps=Schedule.of(cfg).describe().capitalize(),
        table=cfg.parametrization,
        tuned=cfg.tuned_width,
        width=cfg.width,
        settings=json.dumps(computed_settings(cfg), indent=1),
    )


def _validation(run: LoadedRun) -> dict[str, Any]:
    """The validation at the step of the checkpoint; nothing without one."""
    if not (run.folder / METRICS).exists():  # of an imported run
        return {}
    records = [r for r in read_metrics(run.folder) if r["kind"] == "val" and r["step"] == run.step]
    return records[-1] if records else {}


def _plain(text: str, most: int) -> str:
    """Text that may come from anybody, without a meaning in Markdown or HTML."""
    return re.sub(r"([\\`*_~:\[\]<>|#&!])", r"\\\1", printable(text, most))


def _parameters(run: LoadedRun) -> int:
    return sum(parameter.numel() for parameter in run.model.parameters())


def _number(value: Any) -> str:
    return f"{value:.4f}" if isinstance(value, int | float) else "not measured"


def _header(name: str, run: LoadedRun, found: dict[str, Any]) -> str:
    """The YAML that a hub reads; JSON is YAML. No licence: who publishes the model chooses one."""
    results = [
        {"type": kind, "value": round(float(found[kind]), 6)}
        for kind in ("loss", "bits_per_byte")
        if isinstance(found.get(kind), int | float)
    ]
    data = {"name": printable(run.corpus.source, 100), "type": printable(run.corpus.tokenizer)}
    index = {
        "name": printable(name),
        "results": [{"task": {"type": "text-generation"}, "dataset": data, "metrics": results}],
    }
    lines = {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["speedrun-mup", "modded-nanogpt", "muon", "mup", "custom_code"],
        "metrics": [each["type"] for each in results],
        "model-index": [index] if results else [],
    }
    return "\n".join(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in lines.items() if value)
