"""Where the parameters of any model stand to the residual stream: by the list of its layers, and by name."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from fnmatch import fnmatchcase

from torch import nn

from speedrun_mup.core.mup.compat.infshape import BaseShapeError
from speedrun_mup.core.mup.depth_rules import DepthRole
from speedrun_mup.core.mup.spec import ParamSpec, places

WORDS = {role.value for role in DepthRole}  # what roles= of adapt may say of it
# The matrix whose product is added to the stream, as families call it.
_WRITES = re.compile(
    r"(^|\.)(o_proj|out_proj|c_proj|down_proj|dense_4h_to_h|attention\.dense|fc2|fc_out|w2|wo|proj_out|to_out)(\.\d+)?$"
)
_LAST_NORMS = ("post_feedforward_layernorm", "post_mlp_layernorm")  # behind the matrix: of Gemma 2 and 3, OLMo 2


def set_depth_roles(model: nn.Module, layers: int, m_depth: float, roles: Mapping[str, str]) -> None:
    """Say of every parameter of a model with this many layers where it stands, and give it the depth multiplier.

    Raises:
        BaseShapeError: where the layers are no list, or nothing shows which matrix of a layer writes into the stream.
    """
    blocks = [path for path, module in model.named_modules() if _is_list(module, layers)]
    if not blocks:
        raise BaseShapeError(
            f"the model has no list of {layers} layers (nn.ModuleList), so what stands in them cannot be seen: leave the layers "
            "out of base=, and say depth by mup.declare or mup.set_depth"
        )
    writers: dict[str, int] = {}
    for name, place, spec in _declared(model):
        block = next((f"{path}." for path in blocks if name.startswith(f"{path}.")), None)
        role = _depth_role(name, roles, inside=block is not None)
        if role is DepthRole.WRITES and block is not None:
            number = name.removeprefix(block).partition(".")[0]
            writers[block + number] = writers.get(block + number, 0) + 1
        vars(place)["mup_specs"][name.rpartition(".")[2]] = replace(spec, m_depth=m_depth, depth=role)
    for path in blocks:
        for number, block_module in model.get_submodule(path).named_children():
            odd = next((norm for norm in _LAST_NORMS if norm in dict(block_module.named_children())), None)
            if odd or f"{path}.{number}" not in writers:
                why = (
                    f"has {odd} behind its last matrix"
                    if odd
                    else "has no matrix of a known name that writes into the stream"
                )
                raise BaseShapeError(
                    f'{path}.{number} ({type(block_module).__name__}) {why}: say roles={{"*.NAME.weight": "writes"}}, or leave '
                    "the layers out of base="
                )


def _is_list(module: nn.Module, layers: int) -> bool:
    return isinstance(module, nn.ModuleList) and len(module) == layers


def _declared(model: nn.Module) -> Iterator[tuple[str, nn.Module, ParamSpec]]:
    """(name, its module, its spec) of every place of a parameter that has a spec."""
    for where in places(model).values():
        for place in where:
            if place.spec is not None:
                yield place.name, place.module, place.spec


def _depth_role(name: str, roles: Mapping[str, str], inside: bool) -> DepthRole:
    said = [word for pattern, word in roles.items() if word in WORDS and fnmatchcase(name, pattern)]
    if said:
        return DepthRole(said[-1])
    if not inside:
        return DepthRole.OUTSIDE
    path = re.sub(r"\.(weight|bias)$", "", name)
    return DepthRole.WRITES if _WRITES.search(path) else DepthRole.BRANCH
