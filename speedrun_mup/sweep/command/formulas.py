"""Numbers that follow from others, as a user writes them: n_head=width//64, params=12*n_layer*width**2."""

from __future__ import annotations

import ast
import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping

from speedrun_mup.core.errors import ConfigError
from speedrun_mup.files import printable

Number = int | float
NAME = re.compile(r"[A-Za-z_]\w*")
MOST_DEPTH, MOST_CHARACTERS, LARGEST = 50, 1000, 1e300
_OPERATORS: dict[type[ast.AST], Callable[..., Number]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
    ast.USub: operator.neg,
    ast.UAdd: operator.pos,
}
_FUNCTIONS: dict[str, Callable[..., Number]] = {
    "min": min,
    "max": max,
    "round": round,
    "int": int,
    "float": float,
    "sqrt": math.sqrt,
    "log2": math.log2,
    "ceil": math.ceil,
}


class Formulas:
    """Named formulas over named numbers, each of which may use the others.

    A formula is arithmetic: + - * / // % **, parentheses, numbers, names, and min, max, round, int, float, sqrt, log2, ceil.

    Args:
        texts: Name -> formula.
        what: The flag that they come from, for messages.

    Raises:
        ConfigError: For a name or a formula that is none.
    """

    def __init__(self, texts: Mapping[str, str], what: str = "--set"):
        self._what = what
        self.trees = {name: self._parsed(name, text) for name, text in texts.items()}

    def _parsed(self, name: str, text: str) -> ast.expr:
        shown = f"{self._what} {printable(name, 60)}={printable(text, 100)}"
        if not NAME.fullmatch(name):
            raise ConfigError(f"{shown}: give NAME=NUMBER or NAME=FORMULA, with a name of letters, digits and _")
        try:
            tree = ast.parse(text.strip()[:MOST_CHARACTERS], mode="eval").body
            uses = list(_names(tree))
        except (SyntaxError, ValueError, RecursionError, MemoryError):
            told = "give a number or a formula such as width//64; text that all runs share belongs into the command"
            raise ConfigError(f"{shown}: {told}") from None
        if name in uses:
            raise ConfigError(f"{shown}: it uses itself")
        return tree

    def uses(self, name: str, seen: tuple[str, ...] = ()) -> set[str]:
        """The numbers that `name` needs which are no formulas themselves; itself if it is none. ConfigError for a circle."""
        if name in seen:
            raise ConfigError(f"{self._what} {printable(name, 60)}: it uses itself, through {' and '.join(seen[1:])}")
        if name not in self.trees:
            return {name}
        return {leaf for used in _names(self.trees[name]) for leaf in self.uses(used, (*seen, name))}

    def all_used(self, name: str) -> set[str]:
        """Every name that `name` needs, formulas too."""
        self.uses(name)  # raises for a circle
        direct = set(_names(self.trees[name])) if name in self.trees else set()
        return direct | {used for one in direct for used in self.all_used(one)}

    def value(self, name: str, given: Mapping[str, Number]) -> Number:
        """What `name` is where these numbers are given. ConfigError where it is nothing."""
        if name in given:
            return given[name]
        self.uses(name)  # raises for a circle
        try:
            found = self._evaluated(self.trees[name], given)
            if isinstance(found, complex) or not abs(found) <= LARGEST:
                raise OverflowError
        except KeyError as missing:
            have = ", ".join((*given, *self.trees))
            told = f"{printable(missing.args[0], 60)} is not known; there are {have}"
            raise ConfigError(f"{self._what} {printable(name, 60)}: {told}") from None
        except (ArithmeticError, ValueError, TypeError):
            at = ", ".join(f"{key} {value:g}" for key, value in given.items() if key in self.uses(name))
            raise ConfigError(f"{self._what} {printable(name, 60)}: it has no value at {at}") from None
        return found

    def _evaluated(self, tree: ast.expr, given: Mapping[str, Number]) -> Number:
        if isinstance(tree, ast.Constant):
            return tree.value  # type: ignore[return-value]  # _names let no other constant through
        if isinstance(tree, ast.Name):
            return given[tree.id] if tree.id in given else self._evaluated(self.trees[tree.id], given)
        if isinstance(tree, ast.UnaryOp):
            return _OPERATORS[type(tree.op)](self._evaluated(tree.operand, given))
        if isinstance(tree, ast.BinOp):
            left, right = self._evaluated(tree.left, given), self._evaluated(tree.right, given)
            if isinstance(tree.op, ast.Pow):
                left = float(left) if abs(right) > 64 or abs(left) > 2**53 else left  # a whole power may have no end
            return _OPERATORS[type(tree.op)](left, right)
        if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name):
            return _FUNCTIONS[tree.func.id](*(self._evaluated(part, given) for part in tree.args))
        raise TypeError


def _names(tree: ast.expr, depth: int = 0) -> Iterator[str]:
    """The names that a formula uses. Raises ValueError for what is no formula."""
    if depth > MOST_DEPTH:
        raise ValueError
    if isinstance(tree, ast.Name):
        yield tree.id
    elif isinstance(tree, ast.BinOp) and type(tree.op) in _OPERATORS:
        yield from _names(tree.left, depth + 1)
        yield from _names(tree.right, depth + 1)
    elif isinstance(tree, ast.UnaryOp) and type(tree.op) in _OPERATORS:
        yield from _names(tree.operand, depth + 1)
    elif isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name) and tree.func.id in _FUNCTIONS:
        if tree.keywords:
            raise ValueError
        for part in tree.args:
            yield from _names(part, depth + 1)
    elif not (isinstance(tree, ast.Constant) and type(tree.value) in (int, float)):
        raise ValueError
