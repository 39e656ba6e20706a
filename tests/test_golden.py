"""Against numbers that the record's own program gave: losses, every gradient norm, every parameter after four updates.

Its inputs can be rebuilt from parameter names and seeds; data/README.md says how the numbers were made.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from speedrun_mup.core.model import GPT, GPTConfig
from speedrun_mup.core.model.record import to_record
from speedrun_mup.core.optimizers import DistAdam, Muon, Tuned, param_groups
from speedrun_mup.training.schedules import muon_momentum

GOLDEN = {
    key.removeprefix("d128/"): value
    for key, value in json.loads((Path(__file__).parent / "data" / "record26_d128.json").read_text()).items()
}
T, WINDOW, BOS = 1024, 3, 50256
ADAM_LR = {"embed": 0.008 * 75, "value_embed": 0.008 * 75, "head": 0.008 * 27.5, "scalar": 0.008 * 5}
TUNED = {group: Tuned("adam", lr, eps=1e-10) for group, lr in ADAM_LR.items()} | {"matrix": Tuned("muon", 0.05)}


def named(name: str, shape: torch.Size, scale: float) -> Tensor:
    """A parameter's values, from its name."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    return torch.from_numpy((np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """T inputs of nine documents or so, and targets."""
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, 50256, T + 1)
    tokens[np.sort(rng.choice(T, 8, replace=False))] = BOS
    tokens[0] = BOS
    return torch.tensor(tokens[:-1], dtype=torch.int32), torch.tensor(tokens[1:])


@pytest.fixture(scope="module")
def golden_values() -> dict[str, Tensor]:
    """The golden parameters, under the record's names."""
    values = {}
    for name, p in to_record(GPT(GPTConfig(width=128, base_width=128)).state_dict()).items():
        scale = 0.1 if name == "scalars" else 1.0 if "embed" in name else 0.5 * p.size(-1) ** -0.5
        values[name] = named(name, p.shape, scale)
        if name == "scalars":
            values[name] += p
    return values


@pytest.fixture
def golden_model(golden_values) -> Callable[[str], GPT]:
    """golden_model(backend): a model with the golden parameters."""

    def make(backend: str) -> GPT:
        model = GPT(GPTConfig(width=128, base_width=128, attention=backend))
        model.load_state_dict(golden_values)
        return model

    return make


@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_loss_and_gradient_norms(golden_model, backend):
    model = golden_model(backend)
    loss = model(*batch(128), WINDOW)
    assert loss.item() == pytest.approx(GOLDEN["train_loss_sum"], rel=1e-5)
    assert loss.item() / T == pytest.approx(GOLDEN["eval_loss"], rel=1e-5)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    norms = {name: gradient.norm().item() for name, gradient in to_record(gradients, unused=0.0).items()}
    assert norms == {name: pytest.approx(GOLDEN[f"gradnorm/{name}"], rel=1e-5) for name in norms}
    assert len(norms) == sum(key.startswith("gradnorm/") for key in GOLDEN)


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["dense", "blocked"])
def test_four_updates(golden_model, golden_values, backend):
    model = golden_model(backend)
    groups = param_groups(model, model.cfg.rules, TUNED)
    adam, muon = DistAdam(groups["adam"]), Muon(groups["muon"])
    losses = []
    for step in range(4):
        loss = model(*batch(1000 + step), WINDOW)
        losses.append(loss.item() / T)
        loss.backward()
        for group in muon.param_groups:
            group["momentum"] = muon_momentum(step, 300, 0.85, 0.95)
        adam.step()
        muon.step()
        model.zero_grad()
    assert losses == pytest.approx(GOLDEN["losses"], rel=1e-5)
    for name, parameter in to_record(model.state_dict(), unused=golden_values["scalars"]).items():
        total, norm = GOLDEN[f"after/{name}"]
        values = parameter.double()
        assert values.norm().item() == pytest.approx(norm, rel=1e-3), name
        # A sum of many signs mostly cancels, so its error is measured against the largest that it could be.
        assert abs(values.sum().item() - total) <= 1e-3 * norm * values.numel() ** 0.5, name
