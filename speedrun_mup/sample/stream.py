"""Text from tokens while they are being drawn: a piece is shown as soon as it cannot change any more."""

from __future__ import annotations

import codecs

from speedrun_mup.data.tokenizers import Tokenizer


class TextStream:
    """Tokens to text as they come: bytes that are part of a character wait for the rest of it.

    What is no character in the end reads U+FFFD, as in Tokenizer.decode.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer, self._bytes = tokenizer, tokenizer.token_bytes()
        self._utf8 = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._ids: list[int] = []  # where ids do not stand for bytes: what the text shown last was made of, and since
        self._shown = 0

    def add(self, token: int) -> str:
        """The text that is complete with one more token, maybe none."""
        if self._bytes is not None:
            return self._utf8.decode(self._bytes[token])
        self._ids.append(token)
        return self._new_text(final=False)

    def end(self) -> str:
        """What is left when no more tokens come."""
        return self._utf8.decode(b"", final=True) if self._bytes is not None else self._new_text(final=True)

    def _new_text(self, final: bool) -> str:
        """By decoding the last piece again together with what came since: its first space may depend on what is before."""
        before, now = (self._tokenizer.decode(ids) for ids in (self._ids[: self._shown], self._ids))
        if len(now) <= len(before) or (now.endswith("\ufffd") and not final):
            return ""
        self._ids, self._shown = self._ids[self._shown :], len(self._ids) - self._shown
        return now[len(before) :]
