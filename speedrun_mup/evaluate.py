"""How well a model predicts text: loss, perplexity and bits per byte, with a standard error."""

# T tokens of a row, B tokens per block, U units: what counts as one observation for the standard error

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from speedrun_mup.core.errors import ConfigError, NonFiniteError
from speedrun_mup.core.model import GPT
from speedrun_mup.core.model.layers import rotary
from speedrun_mup.data.documents import Document, DocumentReader
from speedrun_mup.data.shards import MIXTURE_PERIOD, Corpus, Mixture
from speedrun_mup.data.sources import SourceError, find_sources, without_flags
from speedrun_mup.data.tokenizers import Tokenizer
from speedrun_mup.data.validation import ValBatches

PIECE = 1024  # tokens of a unit, where there are too few documents
ENOUGH_DOCUMENTS = 30
_ROW_CHARS = 2**21  # of documents that are put into one row
_SCORED = 1024  # tokens whose logits over the whole vocabulary exist at a time


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of some text. Losses are nats per token.

    tokens, bytes: those of the text that were predicted; special tokens, which open documents, are left out. loss: their
    mean. loss_with_special: the mean over all tokens, as training's validation has it. The errors are standard errors over
    `units` documents, or pieces of documents, of 1,024 tokens at most, where there are fewer than 30 documents; unit says
    which. They are None for one unit. bits_per_byte and bytes are None where ids do not stand for bytes.
    """

    tokens: int
    bytes: int | None
    units: int
    unit: str
    loss: float
    loss_error: float | None
    loss_with_special: float
    perplexity: float
    bits_per_byte: float | None
    bits_per_byte_error: float | None

    def summary(self) -> str:
        """A few lines for a terminal."""

        def within(error: float | None) -> str:
            return "" if error is None else f" +- {error:.4f}"

        with_special = f"{self.loss_with_special:.4f} with document ends, as in training"
        lines = [
            f"loss           {self.loss:.4f}{within(self.loss_error)} nats per token ({with_special})",
            f"perplexity     {self.perplexity:.3f}",
        ]
        if self.bits_per_byte is not None:
            lines.append(f"bits per byte  {self.bits_per_byte:.4f}{within(self.bits_per_byte_error)}")
        size = "" if self.bytes is None else f", {self.bytes:,} bytes"
        units = "documents" if self.unit == "document" else f"pieces of up to {PIECE:,} tokens"
        over = f"standard errors over {self.units:,} {units}" if self.units > 1 else "too little for a standard error"
        return "\n".join([*lines, f"text           {self.tokens:,} tokens{size}; {over}"])


def evaluate(model: GPT, window: int, rows: Iterable[np.ndarray], byte_lengths: np.ndarray | None = None) -> Evaluation:
    """Predict every token of `rows` from all that its window sees.

    Args:
        model: its BOS opens documents, which do not see each other.
        window: the long attention window, in blocks.
        rows: token ids, (T,) each; the first of a row is not predicted.
        byte_lengths: bytes that each id stands for, 0 for special ones; None where they do not.

    Returns:
        The means and their errors. ConfigError if there is nothing to predict, NonFiniteError if the loss is no number.
    """
    bos, total, count = model.cfg.bos_token, 0.0, 0
    found = []
    for row in rows:
        losses = token_losses(model, window, row)
        total, count = total + losses.sum(), count + len(losses)
        is_text, targets = row[1:] != bos, row[1:]
        lengths = is_text if byte_lengths is None else np.where(is_text, byte_lengths[targets], 0)
        documents, pieces = units_of(row, bos)
        counted = [(losses * is_text), is_text, lengths]
        found.append([np.bincount(pieces, weights) for weights in counted] + [documents])
    if not count or not sum(part[1].sum() for part in found):
        raise ConfigError("there is no text to predict; give at least a few tokens of it")
    if not math.isfinite(total):
        raise NonFiniteError("the loss of this text is not finite; take another --checkpoint, or --device cpu")
    nats, tokens, size = (np.concatenate(part) for part in list(zip(*found))[:3])
    with_text = sum(len(np.unique(documents[part[1] > 0])) for *part, documents in found)
    if with_text >= ENOUGH_DOCUMENTS:
        # the documents of one row after those of another
        shifts = np.cumsum([0, *(documents[-1] + 1 for *_, documents in found[:-1])])
        number = np.concatenate([documents + shift for shift, (*_, documents) in zip(shifts, found)])
        nats, tokens, size = (np.bincount(number, weights) for weights in (nats, tokens, size))
    kept = tokens > 0
    nats, tokens, size = nats[kept], tokens[kept], size[kept]
    loss = nats.sum() / tokens.sum()
    in_bytes = byte_lengths is not None and size.sum() > 0
    return Evaluation(
        tokens=int(tokens.sum()),
        bytes=int(size.sum()) if in_bytes else None,
        units=len(tokens),
        unit="document" if with_text >= ENOUGH_DOCUMENTS else "piece",
        loss=float(loss),
        loss_error=_error_of_ratio(nats, tokens),
        loss_with_special=float(total / count),
        perplexity=math.exp(loss),
        bits_per_byte=float(nats.sum() / size.sum() / math.log(2)) if in_bytes else None,
        bits_per_byte_error=_error_of_ratio(nats / math.log(2), size) if in_bytes else None,
    )


@torch.inference_mode()
def token_losses(model: GPT, window: int, row: np.ndarray, stride: int | None = None) -> np.ndarray:
    """Nats of every token of a row (T,) but the first, (T - 1,) float64.

    A long row goes through the model in parts, each with the long window of tokens before it, so every prediction sees all
    keys that training would show it; what those keys were made of is cut off before that.

    Args:
        model: on any device.
        window: the long attention window, in blocks.
        row: token ids.
        stride: new tokens of a part, a multiple of B; default: 8 windows, at least 4,096 tokens.
    """
    block, device = model.cfg.block_size, model.embed.weight.device
    context = max(window, 1) * block
    stride = stride or max(8 * context, -(-4096 // block) * block)
    found = []
    for begin in range(0, len(row) - 1, stride):
        first, end = max(begin - context, 0), min(begin + stride, len(row) - 1)
        inputs = np.full(
            -(-(end - first) // block) * block, model.cfg.bos_token
        )  # what fills up the last block is ignored
        inputs[: end - first] = row[first:end]
        x = model.hidden(torch.from_numpy(inputs).to(device), window)[begin - first : end - first]
        targets = torch.from_numpy(row[begin + 1 : end + 1].astype(np.int64)).to(device)
        found.append(model.lm_head.losses(x, targets).double().cpu().numpy())
    return np.concatenate(found) if found else np.zeros(0)


@torch.inference_mode()
def ending_scores(model: GPT, window: int, texts: Sequence[tuple[Sequence[int], int]]) -> list[tuple[float, bool]]:
    """How likely the last tokens of each text are, side by side in one row: each text begins a block and sees itself only.

    Args:
        model: on any device.
        window: the long attention window, in blocks.
        texts: the ids of each, and how many of them, at the end, are scored.

    Returns:
        For each the sum of log probabilities, in nats, and whether every one of these tokens is the likeliest in its place.
    """
    block, device, bos = model.cfg.block_size, model.embed.weight.device, model.cfg.bos_token
    inputs = [[*ids[:-1], *[bos] * (-(len(ids) - 1) % block)] for ids, _ in texts]  # what fills up a block is ignored
    lengths = torch.tensor([len(ids) for ids in inputs])
    begins = (lengths.cumsum(0) - lengths).tolist()
    tokens = torch.tensor([id for ids in inputs for id in ids], device=device)
    document = torch.repeat_interleave(torch.arange(len(texts)), lengths).to(device)
    positions = torch.cat([torch.arange(len(ids), device=device) for ids in inputs])
    x = model.read(tokens, model.masks(document, window), rotary(positions, model.cfg.head_dim))
    ends = [begin + len(ids) - 1 for begin, (ids, _) in zip(begins, texts)]
    places = torch.cat([torch.arange(end - count, end) for end, (_, count) in zip(ends, texts)]).to(device)
    targets = torch.tensor([id for ids, count in texts for id in ids[len(ids) - count :]], device=device)
    scores, likeliest = [], []
    for rows, wanted in zip(x[places].split(_SCORED), targets.split(_SCORED)):
        logits = model.lm_head.logits(rows)
        scores.append(logits.log_softmax(dim=-1).gather(1, wanted[:, None])[:, 0].double())
        likeliest.append(logits.argmax(dim=-1) == wanted)
    counts = [count for _, count in texts]
    parts = zip(torch.cat(scores).cpu().split(counts), torch.cat(likeliest).cpu().split(counts))
    return [(float(score.sum()), bool(right.all())) for score, right in parts]


def units_of(row: np.ndarray, bos: int) -> tuple[np.ndarray, np.ndarray]:
    """Of a row (T,): the document of each piece, and the piece of each predicted token (T - 1,), both from 0 on."""
    at = np.arange(len(row) - 1)
    opens = row[:-1] == bos
    document = opens.cumsum()
    begin = np.maximum.accumulate(np.where(opens, at, 0))
    piece = np.cumsum((opens & (at > 0)) | ((at > begin) & ((at - begin) % PIECE == 0)))
    first = np.flatnonzero(np.diff(piece, prepend=-1))
    return document[first] - document[:1], piece


def _error_of_ratio(numerator: np.ndarray, denominator: np.ndarray) -> float | None:
    """Standard error of sum(numerator) / sum(denominator) over independent units (U,), to first order; None for one."""
    n, total = len(numerator), denominator.sum()
    if n < 2:
        return None
    residuals = numerator - numerator.sum() / total * denominator
    return math.sqrt(n / (n - 1) * (residuals**2).sum()) / float(total)


def validation_rows(corpus: Corpus, most: int | None = None, chunk: int | None = None) -> Iterator[np.ndarray]:
    """The tokens of a corpus's validation shards, `most` of them; of a mixture and with `chunk` those that training uses.

    Args:
        corpus: or a mixture, whose parts count by their weights, without documents that another part trains on.
        most: tokens, if not all.
        chunk: tokens of a chunk in training's validation, which leaves out what fills none, and in which the parts of a
            mixture take turns; default: everything, and of a mixture so few that each part has its turns.
    """
    if most is not None and chunk is not None:
        yield from ValBatches(corpus, most, chunk).rows()
        return
    if isinstance(corpus, Mixture):
        smallest = min(sum(map(part.tokens_in, part.val)) for part in corpus.parts)
        all_tokens = MIXTURE_PERIOD * sum(map(corpus.tokens_in, corpus.val))
        most = all_tokens if most is None else most
        yield from ValBatches(corpus, most, max(min(PIECE, smallest - 1, most // 100), 1)).rows()
        return
    for shard in map(corpus.open, corpus.val):
        end = len(shard) if most is None else min(len(shard), most + 1)
        if end > 1:
            yield shard.take_ids(0, end, corpus.vocab_size)
            most = None if most is None else most - (end - 1)


def text_rows(
    paths: Sequence[str], tokenizer: Tokenizer, most: int | None = None, suffixes: Sequence[str] = ()
) -> Iterator[np.ndarray]:
    """The tokens of text files, of folders of them, or of standard input ("-"), many documents a row, each after its BOS.

    Args:
        paths: as `data text` takes them.
        tokenizer: the model's.
        most: tokens, if not all.
        suffixes: of files in folders that are read too, as plain text.
    """
    try:
        sources = find_sources(paths, suffixes=suffixes).sources
        for row in map(tokenizer.encode_documents, _many(DocumentReader(sources, "text", 0))):
            yield row[: None if most is None else most + 1]
            most = None if most is None else most - (len(row) - 1)
            if most is not None and most <= 0:
                return
    except SourceError as fault:
        raise SourceError(without_flags(fault)) from None


def _many(documents: Iterable[Document]) -> Iterator[list[str]]:
    """The texts of documents, as many at a time as make a row."""
    texts, chars = [], 0
    for document in documents:
        texts.append(document.text)
        chars += len(document.text)
        if chars >= _ROW_CHARS:
            yield texts
            texts, chars = [], 0
    if texts:
        yield texts
