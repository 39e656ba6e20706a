"""An adapted model trains alike whatever is around it: copied, loaded, compiled, on two processes with DDP or FSDP2."""

import copy

import pytest
import torch
from helpers.dist import run_ranks
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from speedrun_mup.core import mup
from tests.helpers.foreign_models import GPT, GPTConfig, loss_of, tokens, wide_heads

OPTIMIZERS = {
    "adamw": {"lr": 1e-2},
    "muon+adamw": {"lr": 1e-2, "optimizer": "muon+adamw", "muon_lr": 0.05},
}
STEPS, SEQUENCES = 3, 4
CLOSE = 1e-8
SHARDED_MUON = 0.3  # torch's orthogonalizes in bfloat16, by parts here, which the small singular values feel


def fused(**options: int) -> nn.Module:
    """A tied readout, and a hook on the queries of fused projections."""
    torch.manual_seed(0)
    return mup.adapt(GPT(GPTConfig(n_embd=64, n_head=4, **options)), {"n_embd": 16, "n_head": 4})


def separate() -> nn.Module:
    """A readout of its own, and an attribute that scales scores."""
    torch.manual_seed(0)
    return mup.adapt(wide_heads(64), 16, build=wide_heads)


BUILDS = {"fused": fused, "separate": separate}


def louder(model: nn.Module) -> nn.Module:
    """In double, with weights large enough that scores count: a lost scale of attention then changes the loss."""
    model.double()
    with torch.no_grad():
        for p in model.parameters():
            if p.ndim > 1:
                p.mul_(8)
    return model


def whole(x: torch.Tensor) -> torch.Tensor:
    return x.full_tensor() if isinstance(x, DTensor) else x


def plain(name: str) -> str:
    return name.removeprefix("module.").removeprefix("_orig_mod.")


Trained = tuple[list[float], dict[str, torch.Tensor], dict[str, float]]


def train(model: nn.Module, name: str, part: slice = slice(None)) -> Trained:
    """Losses of three steps on this part of each batch, what was added to every parameter, and the rates."""
    optimizer = mup.optimizer(model, **OPTIMIZERS[name])
    names = {id(p): plain(key) for key, p in model.named_parameters()}
    rates = {names[id(p)]: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    before = {plain(key): whole(p.detach()).clone() for key, p in model.named_parameters()}
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        loss = loss_of(model, tokens(SEQUENCES, seed=step)[part])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, {plain(key): whole(p.detach()) - before[plain(key)] for key, p in model.named_parameters()}, rates


def assert_alike(found: Trained, expected: Trained, relative: float = CLOSE) -> None:
    (losses, updates, rates), (expected_losses, expected_updates, expected_rates) = found, expected
    assert rates == expected_rates and updates.keys() == expected_updates.keys()
    assert losses == pytest.approx(expected_losses, rel=min(relative, 1e-3))
    for key, update in updates.items():
        assert (update - expected_updates[key]).norm() <= relative * expected_updates[key].norm(), key


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS)
def test_the_comparison_sees_a_lost_factor(build):
    """Each of them changes the losses or the updates by more than any test here allows."""
    expected = train(louder(BUILDS[build]()), "adamw")
    no_readout = louder(BUILDS[build]())
    for module in no_readout.modules():
        if isinstance(module, mup.MuReadout):
            module.output_mult = module.width_mult()
    with pytest.raises(AssertionError):
        assert_alike(train(no_readout, "adamw"), expected, SHARDED_MUON)
    no_scale = louder(BUILDS[build]())
    for module in no_scale.modules():
        module._forward_hooks.clear()
        if "mup_scale" in vars(module):
            module.scaling = module.mup_scale[1]
    with pytest.raises(AssertionError):
        assert_alike(train(no_scale, "adamw"), expected, SHARDED_MUON)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("build", BUILDS)
def test_copies_and_loaded_models_train_alike_bit_for_bit(build, name):
    original = louder(BUILDS[build]())
    twin, loaded = copy.deepcopy(original), BUILDS[build]().double()
    tied = build == "fused"  # torch's assign=True gives each name of a tied weight a parameter of its own
    loaded.load_state_dict(copy.deepcopy(original.state_dict()), assign=not tied)
    expected = train(original, name)
    for other in (twin, loaded):
        assert_alike(train(other, name), expected, 0.0)


@pytest.mark.slow
@pytest.mark.parametrize("build", BUILDS)
def test_a_compiled_graph_holds_the_factors(build):
    """Traced whole, without a break. What the compiler makes of it takes seconds, and is below."""
    expected = train(louder(BUILDS[build]()), "adamw")
    compiled = torch.compile(louder(BUILDS[build]()), backend="eager", fullgraph=True)
    assert_alike(train(compiled, "adamw"), expected)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of the compiler itself
def test_inductor_holds_the_factors():
    expected = train(louder(fused(n_layer=1)), "muon+adamw")
    assert_alike(train(torch.compile(louder(fused(n_layer=1))), "muon+adamw"), expected)


def ddp(model: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(model)


def fsdp2(model: nn.Module) -> nn.Module:
    """Each block, then the rest, as torch's tutorial has it."""
    mesh = init_device_mesh("cpu", (2,))
    for block in model.h if isinstance(model, GPT) else [layer["attn"] for layer in model.layers]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert all(isinstance(p, DTensor) for p in model.parameters())
    return model


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize("wrap", [ddp, fsdp2])
@pytest.mark.parametrize("build", BUILDS)
def test_two_processes_train_as_one_does(build, wrap):
    """Each has half of every batch; the mean of their losses is the loss of the whole."""
    expected = {name: train(louder(BUILDS[build]()), name) for name in OPTIMIZERS}
    half = SEQUENCES // 2

    def work(world):
        part = slice(world.rank * half, (world.rank + 1) * half)
        return {name: train(wrap(louder(BUILDS[build]())), name, part) for name in OPTIMIZERS}

    first, second = run_ranks(2, work)
    for name, (_, *rest) in first.items():
        losses = [(one + two) / 2 for one, two in zip(first[name][0], second[name][0])]
        sharded_muon = wrap is fsdp2 and name == "muon+adamw"
        assert_alike((losses, *rest), expected[name], SHARDED_MUON if sharded_muon else CLOSE)
