"""The names that a port needs, and the examples of docs/mup-library.md."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from speedrun_mup.coord_check import CheckVerdict, coord_check
from speedrun_mup.core import mup

DOC = Path(__file__).parents[2] / "docs" / "mup-library.md"

# what `from mup import *` gave at microsoft/mup, without torch's and the standard library's own names
UPSTREAM = (
    "InfDim InfShape zip_infshape get_shapes get_infshapes make_base_shapes set_base_shapes save_base_shapes "
    "load_base_shapes apply_infshapes zip_infshapes clear_dims assert_hidden_size_inf MuReadout MuSharedReadout "
    "rescale_linear_bias constant_std_init_ normal_ uniform_ trunc_normal_ ones_ eye_ xavier_uniform_ xavier_normal_ "
    "kaiming_uniform_ kaiming_normal_ calculate_gain process_param_groups MuAdam MuAdamW MuSGD infshape shape init "
    "layer optim"
)
SUBMODULES = {
    "infshape": "InfDim InfShape zip_infshape",
    "shape": "get_shapes get_infshapes make_base_shapes set_base_shapes save_base_shapes load_base_shapes clear_dims",
    "layer": "MuReadout MuSharedReadout rescale_linear_bias",
    "init": "normal_ uniform_ trunc_normal_ ones_ eye_ xavier_uniform_ xavier_normal_ kaiming_uniform_ kaiming_normal_",
    "optim": "process_param_groups MuAdam MuAdamW MuSGD",
    "coord_check": "cov covoffdiag FDICT convert_fdict get_coord_data plot_coord_data example_plot_coord_check",
}


def test_names_of_upstream():
    assert set(UPSTREAM.split()) <= set(mup.__all__) and all(hasattr(mup, name) for name in mup.__all__)
    for module, names in SUBMODULES.items():
        assert all(hasattr(getattr(mup, module), name) for name in names.split()), module
    assert callable(mup.mup)


def test_plain_torch_is_not_exported():
    """`from mup import *; Adam(...)` trained without muP."""
    assert not {"Adam", "AdamW", "SGD", "Muon", "Linear", "nn", "torch", "copy", "deepcopy", "math"} & set(mup.__all__)


def blocks():
    found = re.findall(r"^( *)```python\n(.*?)^ *```", DOC.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [re.sub(f"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


@pytest.mark.slow
def test_examples_run(capsys):
    torch.manual_seed(0)
    names: dict = {}
    for code in blocks():
        exec(code, names)
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 6
    assert "2.weight  hidden  Multipliers(init=0.5, forward=1.0, lr=0.25, eps=0.25, weight_decay=4.0)" in printed
    assert names["loss"] < 1.4 and [o.param_groups[0]["lr"] for o in names["optimizers"]] == [0.02, 1e-3]
    assert names["experts"].mup_specs["router"].factors(mup.mup(), "adam").lr == 1 / 4
    assert [len(o.param_groups[0]["params"]) for o in names["both"].optimizers] == [1, 4]
    assert names["gpt"].lm_head.weight is names["gpt"].wte.weight and names["gpt_loss"] < 3.5
    assert {p: group["lr"] for group in names["adam"].param_groups for p in group["params"]} == {
        names["gpt"].wte.weight: 1e-2,
        names["gpt"].c_attn.weight: 1e-2 / 4,
        names["gpt"].c_proj.weight: 1e-2 / 4,
    }


@pytest.mark.slow
@pytest.mark.parametrize(
    "ported, original, failed",
    [
        ("", "", []),
        (", scale=self.scale", "", ["scores activation"]),
        ("  mup.init.", "  nn.init.", ["c_attn.weight init", "c_proj.weight init"]),
    ],
)
def test_the_ported_model_passes_the_coordinate_check_and_lines_of_nanogpt_in_it_fail(ported, original, failed):
    first, port, *_ = blocks()
    assert ported in port
    names: dict = {}
    exec(first.split("\n\n\n")[0] + "\n" + port.split("learning_rate =")[0].replace(ported, original), names)
    result = coord_check(
        names["build_gpt"],
        [64, 128, 256],
        torch.randint(4, (9, 16, 17), generator=torch.Generator().manual_seed(0)).cumsum(dim=-1) % 65,
        lambda model, text: F.cross_entropy(model(text[:, :-1]).flatten(0, 1), text[:, 1:].flatten()),
        lambda model: mup.MuAdamW(model, lr=0.01),
        steps=8,
        seeds=2,
        progress=False,
    )
    assert (result.verdict is CheckVerdict.PASS) == (not failed), result.summary()
    found = [f"{row.kind} {row.quantity}" for row in result.arm.rows if row.verdict is CheckVerdict.FAIL]
    assert set(failed) <= set(found), result.summary()
    at_start = {row.kind: row.slope for row in result.arm.rows if row.quantity == "init"}
    assert at_start["c_attn.weight"] == pytest.approx(0.5 if "init" in original else 0.0, abs=0.1)


def test_every_numbered_row_has_a_test():
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_mup_*.py"))
    rows = re.findall(r"^\| ([\d, ]+) \|", DOC.read_text(), flags=re.MULTILINE)
    numbers = [number.strip() for row in rows for number in row.split(",")]
    missing = [n for n in numbers if not re.search(rf"[dD]efect[_ ]{n}\b|[dD]efect_{n}_", tests)]
    assert missing == ["14"]  # that row is the list of new features, each with tests of its own
