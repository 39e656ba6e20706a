"""Text from a model: tokens drawn one after another, for several samples at a time."""

# n samples, V vocabulary, k tokens that may be drawn

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from speedrun_mup.core.errors import ConfigError, NonFiniteError
from speedrun_mup.core.model import GPT
from speedrun_mup.core.model.cache import Decoder
from speedrun_mup.core.seeds import generator
from speedrun_mup.data.tokenizers import Tokenizer
from speedrun_mup.files import printable
from speedrun_mup.sample.sampling import Sampling
from speedrun_mup.sample.stream import TextStream


class Writer:
    """A model that can write: the model, its tokenizer and its window, which belong together.

    Args:
        model: stays as it is.
        tokenizer: whose ids the model was trained on.
        window: the long attention window, in blocks.
    """

    def __init__(self, model: GPT, tokenizer: Tokenizer, window: int):
        self.model, self.tokenizer, self.window = model, tokenizer, window

    def ids_of(self, prompt: str) -> list[int]:
        """BOS and the ids of `prompt`. ConfigError for what the tokenizer or the model cannot take."""
        try:
            ids = [self.tokenizer.bos_token, *self.tokenizer.encode(prompt)]
        except UnicodeEncodeError:
            raise ConfigError(f"the prompt {printable(ascii(prompt), 60)} is not UTF-8; write it as UTF-8") from None
        beyond = [id for id in ids if id >= self.model.cfg.vocab_size]
        if beyond:
            raise ConfigError(
                f"the prompt has token {beyond[0]}, and the vocabulary of this model ends at "
                f"{self.model.cfg.vocab_size - 1}; use the tokenizer that it was trained with"
            )
        return ids

    def read(self, prompts: Sequence[Sequence[int]]) -> tuple[Decoder, Tensor]:
        """A decoder that has read `prompts`, (n) of any lengths, and the logits of what comes next, (n, V)."""
        different = list(dict.fromkeys(map(tuple, prompts)))
        decoders = [Decoder(self.model, self.window) for _ in different]
        logits = torch.cat([decoder(torch.tensor([ids])) for decoder, ids in zip(decoders, different, strict=True)])
        rows = [different.index(tuple(ids)) for ids in prompts]
        decoders[0].join(decoders[1:])
        decoders[0].take(rows)
        return decoders[0], logits[rows]

    def tokens(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Iterator[dict[int, int]]:
        """The tokens that follow `prompts`: at each step, the sample's number -> its token, without those that have ended.

        A sample ends before the BOS that would open another document. Each has random numbers of its own: it is the same
        whatever else is drawn.
        """
        randoms = [generator(sampling.seed, "sample", number) for number in range(len(prompts))]
        yield from self._go_on(*self.read(prompts), sampling, randoms)

    def _go_on(
        self, decoder: Decoder, logits: Tensor, sampling: Sampling, randoms: Sequence[torch.Generator]
    ) -> Iterator[dict[int, int]]:
        """The tokens that follow what `decoder` has read; it does not read the last one of all."""
        going = list(range(len(randoms)))
        for step in range(sampling.max_new_tokens):
            uniform = torch.cat([torch.rand(1, generator=randoms[number], dtype=torch.float64) for number in going])
            logits = logits[:, : self.tokenizer.vocab_size].cpu()
            if not logits.isfinite().all():
                raise NonFiniteError("the model's logits are not finite; take another --checkpoint, or --device cpu")
            drawn = draw(logits, sampling, uniform).tolist()
            kept = [row for row, token in enumerate(drawn) if token != self.tokenizer.bos_token]
            if len(kept) < len(going):
                decoder.take(kept)
                going, drawn = [going[row] for row in kept], [drawn[row] for row in kept]
            if not going:
                return
            yield dict(zip(going, drawn, strict=True))
            if step + 1 < sampling.max_new_tokens:
                logits = decoder(torch.tensor(drawn)[:, None])

    def chat(self, lines: Iterable[str], sampling: Sampling) -> Iterator[Iterator[str]]:
        """For each line, the text that follows it and all that was said before, piece by piece.

        A line is part of the text, just where that had come to. Where the model ends its document, the next line opens
        another. What was said is not read again, and only the long window of it is kept.
        """
        decoder, unread = Decoder(self.model, self.window), [self.tokenizer.bos_token]
        for turn, line in enumerate(lines):
            logits = decoder(torch.tensor([[*unread, *self.ids_of(line)[1:]]]))
            said: list[int] = []
            yield self._answer(self._go_on(decoder, logits, sampling, [generator(sampling.seed, "chat", turn)]), said)
            unread = said[-1:]
            if len(said) < sampling.max_new_tokens:
                decoder, unread = Decoder(self.model, self.window), [self.tokenizer.bos_token]

    def _answer(self, tokens: Iterator[dict[int, int]], said: list[int]) -> Iterator[str]:
        """The text of one sample's tokens, which are added to `said`."""
        text = TextStream(self.tokenizer)
        for token in (drawn[0] for drawn in tokens):
            said.append(token)
            yield text.add(token)
        yield text.end()

    def stream(self, prompts: Sequence[str], sampling: Sampling) -> Iterator[tuple[int, str]]:
        """The texts that follow `prompts`, piece by piece: (the sample's number, more of its text)."""
        texts = [TextStream(self.tokenizer) for _ in prompts]
        for tokens in self.tokens([self.ids_of(prompt) for prompt in prompts], sampling):
            for number, token in tokens.items():
                if piece := texts[number].add(token):
                    yield number, piece
        for number, text in enumerate(texts):
            if piece := text.end():
                yield number, piece

    def generate(self, prompts: Sequence[str], sampling: Sampling) -> list[str]:
        """The whole text that follows each prompt."""
        found = [""] * len(prompts)
        for number, piece in self.stream(prompts, sampling):
            found[number] += piece
        return found


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor) -> Tensor:
    """One token for each row of logits (n, V), by a uniform number in [0, 1) for each (n,) -> (n,).

    Temperature first, then the top_k likeliest, of which the fewest that together have the probability top_p.
    """
    if sampling.temperature == 0:
        return logits.argmax(dim=-1)
    if sampling.top_k == 0 and sampling.top_p == 1:
        ids, probs = None, (logits.double() / sampling.temperature).softmax(dim=-1)
    else:
        k = min(sampling.top_k or logits.size(-1), logits.size(-1))
        values, ids = logits.topk(k)  # the likeliest first; in double precision only these few
        probs = (values.double() / sampling.temperature).softmax(dim=-1)
        probs = probs.masked_fill(probs.cumsum(dim=-1) - probs >= sampling.top_p, 0.0)  # never the first
    total = probs.cumsum(dim=-1)
    chosen = torch.searchsorted(total, uniform[:, None] * total[:, -1:], right=True).clamp(max=total.size(-1) - 1)
    return (chosen if ids is None else ids.gather(1, chosen))[:, 0]
