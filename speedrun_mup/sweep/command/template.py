"""A command with placeholders: 'python train.py --n_embd={width}'. Values are put into its words and stay inside them."""

from __future__ import annotations

import re
import shlex
import string
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import printable
from speedrun_mup.sweep.command.formulas import NAME

_OF_A_SHELL = re.compile(r"[|&;<>()]+|\d?>+(&\d)?.*|<.*")  # unquoted, as a word of its own
_VARIABLE = re.compile(r"\$[A-Za-z_{(]")


@dataclass(frozen=True)
class Template:
    """A command with placeholders, as a user writes it for a shell.

    Without a shell it is split into words as one would split it, before any value is there; with one, values are quoted.

    Args:
        text: With {name}, or {name:FORMAT} as Python formats numbers; {{ and }} are braces.
        shell: Whether a shell runs it.
        what: The flag that it comes from, for messages.
    """

    text: str
    shell: bool = False
    what: str = "--run"

    def __post_init__(self) -> None:
        if not self.text.strip() or "\0" in self.text:
            raise ConfigError(f"{self.what}: give a command, such as 'python train.py --lr={{lr}} --width={{width}}'")
        for word in self.words:
            for _ in _parts(word, self.what):
                pass
        if not self.shell:
            self._check_words()

    def _check_words(self) -> None:
        """ConfigError for what only a shell understands."""
        advice = "only a shell understands that; add --shell"
        if re.match(r"[A-Za-z_]\w*=", self.words[0]):
            raise ConfigError(f"{self.what}: {printable(self.words[0])} is no program; write env {self.words[0]} ...")
        if self.words[0] in ("cd", "export", "source", "."):
            raise ConfigError(f"{self.what}: {self.words[0]}: {advice}")
        for raw in shlex.split(self.text, posix=False):
            if _OF_A_SHELL.fullmatch(raw) or raw.endswith(";"):
                raise ConfigError(f"{self.what}: {printable(raw)}: {advice}, or quote it")
            if _VARIABLE.search(raw) and not raw.startswith("'"):
                raise ConfigError(f"{self.what}: {printable(raw)}: {advice}")

    @cached_property
    def words(self) -> list[str]:
        """Its words with placeholders; one if a shell splits it."""
        if self.shell:
            return [self.text]
        try:
            return shlex.split(self.text)
        except ValueError as fault:
            raise ConfigError(f"{self.what}: {str(fault).lower()}; check its quotes") from None

    @cached_property
    def names(self) -> frozenset[str]:
        """Its placeholders."""
        return frozenset(name for word in self.words for _, name, _ in _parts(word, self.what) if name)

    def filled(self, values: Mapping[str, object]) -> list[str]:
        """The words to run. values: of all its placeholders. ConfigError for a FORMAT that a value does not take."""
        if self.shell:
            return ["sh", "-c", "".join(self._pieces(self.text, values))]
        return ["".join(self._pieces(word, values)) for word in self.words]

    def _pieces(self, word: str, values: Mapping[str, object]) -> Iterator[str]:
        for literal, name, how in _parts(word, self.what):
            yield literal
            if name:
                try:
                    shown = format(values[name], how)
                except (ValueError, TypeError):
                    raise ConfigError(
                        f"{self.what}: {{{name}:{printable(how, 40)}}} does not format {values[name]!r}"
                    ) from None
                yield shlex.quote(shown) if self.shell else shown


def filled_text(text: str, values: Mapping[str, object], what: str) -> str:
    """A text with placeholders, such as a path, with their values. what: the flag that it comes from."""
    return "".join(literal + (format(values[name], how) if name else "") for literal, name, how in _parts(text, what))


def names_in(text: str, what: str) -> frozenset[str]:
    """The placeholders of a text. Raises ConfigError for what is none."""
    return frozenset(name for _, name, _ in _parts(text, what) if name)


def _parts(word: str, what: str) -> Iterator[tuple[str, str, str]]:
    """(text, placeholder after it, its format) of a word; no placeholder at the end. Raises ConfigError."""
    try:
        parts = list(string.Formatter().parse(word))
    except ValueError:
        raise ConfigError(f"{what}: {printable(word, 80)}: a brace without its pair; write {{{{ or }}}}") from None
    for literal, name, how, conversion in parts:
        if name is not None and (not NAME.fullmatch(name) or conversion or "{" in (how or "")):
            told = "a placeholder is a name, such as {width}; write {{ and }} for braces"
            raise ConfigError(f"{what}: {{{printable(name, 60)}}} is none: {told}")
        yield literal, name or "", how or ""
