"""The roles of a model's parameters, where neither shapes nor torch's classes show them: by place, by tie and by name.

set_base_shapes knows what torch's own layers do. What it has to ask about is a side that does not grow: is a layer from
width to a finite size the model's readout, or does it stay inside? Here that is answered from where the layer is, and
what no rule answers is refused with the line that declares it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.modules.conv import _ConvNd

from speedrun_mup.core.mup.anymodel.depth import WORDS
from speedrun_mup.core.mup.anymodel.forward import stores_in_out
from speedrun_mup.core.mup.compat.infshape import BaseShapeError, InfShape
from speedrun_mup.core.mup.compat.layer import MuReadout
from speedrun_mup.core.mup.compat.layers import layout_of, sources
from speedrun_mup.core.mup.rules import PARAMETRIZATIONS, Role
from speedrun_mup.core.mup.spec import Place, declare, places

Roles = Mapping[str, str]  # {name or pattern of names: "role" or "role: layout"}

# What parameters are called that are no layer of torch's: a pattern of "Class path.name", and the layout.
# "grows" stands for the dimension that grows with width.
_NAMES: tuple[tuple[str, Role, str], ...] = (
    (
        r"rout(er|ing)|gate\b|gating|gate\.weight$",
        Role.HIDDEN,
        "in",
    ),  # reads the stream, writes a number for each expert
    (r"lora_A", Role.HIDDEN, "in"),
    (r"lora_(embedding_)?B", Role.INPUT, "out"),
    (
        r"pos(ition)?s?(_|\b|ed|emb|enc)|wpe|(cls|class|mask|dist|register|query)_?(tokens?|emb)|latents",
        Role.INPUT,
        "out",
    ),
    (
        r"(^|[\s._])(A_log|D|dt_bias)$",
        Role.INPUT,
        "out",
    ),  # numbers of each channel: Mamba (Gu and Dao, arXiv 2312.00752)
    (r"bias\w*$", Role.INPUT, "out"),  # of each expert
)
_INNER = r"rout(er|ing)|(^|\.)gate$|gating|lora_A|lora_down|(^|\.)(kv_a|q_a)\w*|down_proj_lora"


def declare_roles(model: nn.Module, infshapes: Mapping[str, InfShape], roles: Roles) -> list[Place]:
    """Declare what set_base_shapes could not know, make readouts MuReadouts, and return other readouts (convolutions).

    Args:
        infshapes: of every parameter of `model`.
        roles: what the user says; it wins.

    Raises:
        BaseShapeError: for a pattern that fits nothing, and for what stays open.
    """
    by_name = dict(model.named_parameters())
    found, made = places(model), sources(model)
    _declare_by_user(found, infshapes, roles, by_name)
    open_places: list[tuple[Place, InfShape]] = []
    for name, p in by_name.items():
        for place in found[id(p)]:
            if (place.spec is not None and not place.spec.inferred) or (id(place.module), place.local) in made:
                continue
            words = _layout(place, p.ndim)
            grown = [i for i, dim in enumerate(infshapes[name]) if dim.isinf()]
            if words is None and len(grown) == 1 and p.ndim > 1:
                _declare_by_name(place, infshapes[name], grown[0])
            elif words is not None and {words[i] for i in grown} == {"in"}:
                open_places.append((place, infshapes[name]))
            elif words is not None and stores_in_out(place.module) and grown:
                _declare(place, infshapes[name], Role.HIDDEN if len(grown) == 2 else Role.INPUT, words)
    return list(_sort_open(model, open_places, found))


def _layout(place: Place, ndim: int) -> list[str] | None:
    """One word per dimension where the class shows it: torch's, and Hugging Face's Conv1D, which stores (in, out)."""
    if stores_in_out(place.module) and place.local == "weight":
        return ["in", "out"]
    return layout_of(place.module, place.local, ndim)


def _declare(place: Place, infshape: InfShape, role: Role, words: Iterable[str]) -> None:
    base: Any = tuple(dim.base_dim or dim.dim for dim in infshape)
    declare(place.module, place.local, role, base, " ".join(words))


def _declare_by_user(
    found: Mapping[int, list[Place]],
    infshapes: Mapping[str, InfShape],
    roles: Roles,
    by_name: Mapping[str, nn.Parameter],
) -> None:
    for pattern, said in roles.items():
        if said in WORDS:  # of depth
            continue
        word, _, layout = (part.strip() for part in said.partition(":"))
        fits = [name for name in by_name if fnmatchcase(name, pattern)]
        if not fits or word not in {role.value for role in Role}:
            what = f"no parameter is called {pattern!r}" if not fits else f"{said!r} is no role"
            raise BaseShapeError(
                f'roles={{"{pattern}": "{said}"}}: {what}; write {{"name or pattern": "input", "hidden", "output" or '
                '"scalar"}, with the layout behind it where the shape leaves it open: "hidden: out in"'
            )
        for name in fits:
            for place in found[id(by_name[name])]:
                if Role(word) is Role.OUTPUT and _is_linear(place):
                    _make_readout(place.module)  # type: ignore[arg-type]
                    vars(place.module).get("mup_specs", {}).pop(place.local, None)
                else:
                    words = layout.split() or _words(Role(word), infshapes[name], _layout(place, len(infshapes[name])))
                    if len(words) != len(infshapes[name]):
                        raise BaseShapeError(
                            f'roles={{"{pattern}": "{said}"}}: {name} has {len(infshapes[name])} dimensions: a word for each'
                        )
                    _declare(place, infshapes[name], Role(word), words)


def _words(role: Role, infshape: InfShape, known: list[str] | None) -> list[str]:
    """The layout that goes with a role that the user gave without one."""
    if known is not None:
        return known
    sides = {Role.INPUT: ("out", "-"), Role.OUTPUT: ("in", "out"), Role.HIDDEN: ("in", "out"), Role.SCALAR: ("-", "-")}
    grown = [i for i, dim in enumerate(infshape) if dim.isinf()]
    if role is Role.HIDDEN and len(grown) == 2:
        words = ["-"] * len(infshape)
        words[grown[0]], words[grown[1]] = "out", "in"
        return words
    return [sides[role][i not in grown] for i in range(len(infshape))]


def _declare_by_name(place: Place, infshape: InfShape, grown: int) -> None:
    """Declare a parameter of a module of the user's own of which one dimension grows, if its name says what it is."""
    if infshape[0].dim == 1 or all(dim.dim == 1 for dim in infshape if not dim.isinf()):
        return  # added to every example: known by its shape
    known = f"{type(place.module).__name__} {place.name}"
    stack = len(infshape) == 3 and re.search("expert", known, re.IGNORECASE)
    if stack and grown and not place.local.endswith("bias"):  # of matrices (out, in)
        words = ["-", "out", "in"]
        _declare(place, infshape, Role.HIDDEN if words[grown] == "in" else Role.INPUT, words)
        return
    for pattern, role, word in _NAMES:
        if re.search(pattern, known, re.IGNORECASE if role is Role.HIDDEN else 0):
            other = "out" if word == "in" else "-"
            _declare(place, infshape, role, [word if i == grown else other for i in range(len(infshape))])
            return
    raise BaseShapeError(
        f"{place.name} {tuple(infshape.shape())}: one dimension grows with width, and nothing shows what for: say "
        f'roles={{"{place.name}": "hidden"}} if activations are multiplied with it (a router, a projection), or "input" if '
        "it is a table whose rows are added or looked up (positions), or holds numbers of each channel"
    )


def _is_linear(place: Place) -> bool:
    return isinstance(place.module, nn.Linear) and place.local == "weight"


def _make_readout(linear: nn.Linear) -> None:
    """Give nn.Linear muP's multiplier: the same object, of the class MuReadout."""
    if isinstance(linear, MuReadout):
        return
    if type(linear).forward is not nn.Linear.forward:
        raise BaseShapeError(
            f"the readout is a {type(linear).__name__} with a forward of its own: make it an nn.Linear, or multiply what it "
            'reads by base width / width there, and say roles={"...weight": "output: out in"}'
        )
    linear.__class__ = MuReadout
    vars(linear).update(readout_zero_init=False, output_mult=1.0, parametrization=PARAMETRIZATIONS["mup"])


def _sort_open(
    model: nn.Module, open_places: list[tuple[Place, InfShape]], found: Mapping[int, list[Place]]
) -> Iterator[Place]:
    """Each layer from width to a finite size is the readout, or stays inside; or nobody can tell."""
    last = _last_readers(model, [place for place, _ in open_places])
    output = getattr(model, "get_output_embeddings", lambda: None)()
    unknown = []
    for place, infshape in open_places:
        where = found[id(place.module._parameters[place.local])]
        tied = any(isinstance(other.module, nn.Embedding) for other in where)
        if isinstance(place.module, MuReadout):
            continue
        if place.module is output or (tied and _is_linear(place)):
            _make_readout(place.module)  # type: ignore[arg-type]
        elif _stays_inside(model, place):
            _declare(place, infshape, Role.HIDDEN, _layout(place, len(infshape)) or ())
        elif place.module in last and output is None:
            if _is_linear(place):
                _make_readout(place.module)  # type: ignore[arg-type]
            elif isinstance(place.module, _ConvNd):
                _declare(place, infshape, Role.OUTPUT, _layout(place, len(infshape)) or ())
                yield place
            else:
                unknown.append(place)
        else:
            unknown.append(place)
    if unknown:
        names = ", ".join(place.name for place in unknown[:4])
        raise BaseShapeError(
            f"{names}{' and more' * (len(unknown) > 4)} read from width and write to a finite size, in a place that does not "
            f'show what for: say roles={{"{unknown[0].name}": "output"}} if that is an output of the model, "hidden" if it '
            "stays inside (a router, keys and values, a low-rank pair)"
        )


def _stays_inside(model: nn.Module, place: Place) -> bool:
    """Whether a layer belongs to a block of which the model has a list, to a recurrent layer, or has such a name."""
    if isinstance(place.module, nn.RNNBase | nn.RNNCellBase | nn.MultiheadAttention) or re.search(_INNER, place.path):
        return True
    owners = place.path.split(".")[:-1]
    for depth in range(1, len(owners)):
        container = model.get_submodule(".".join(owners[:depth]))
        in_a_list = isinstance(container, nn.ModuleList) or (
            isinstance(container, nn.Sequential) and _repeats(container)
        )
        if in_a_list and owners[depth].isdigit():
            return True
    return False


def _repeats(container: nn.Sequential) -> bool:
    """Whether a Sequential is a stack of blocks: two or more children, all of one class."""
    return len(container) > 1 and len({type(child) for child in container}) == 1


def _last_readers(model: nn.Module, open_places: Iterable[Place]) -> list[nn.Module]:
    """The modules behind which no other matrix is registered: side by side, from width to finite sizes."""
    by_id = {id(place.module): place for place in open_places}
    owners = [
        module
        for module in model.modules()
        if any(p is not None and p.ndim > 1 for p in module._parameters.values())
        and not isinstance(module, nn.Embedding)
    ]
    last: list[nn.Module] = []
    parents = set()
    for module in reversed(owners):
        if id(module) not in by_id:
            break
        parents.add(by_id[id(module)].path.rpartition(".")[0])
        if len(parents) > 1:
            break
        last.append(module)
    return last
