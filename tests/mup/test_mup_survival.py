"""The scaling survives whatever torch does to a model: deepcopy, pickle, sharding, compiling, loading."""

import copy
import io

import pytest
import torch
import torch.distributed as dist
from helpers.mup_zoo import ADAM, SGD, Tiny, learning_rates, loss_of, tiny, tokens
from torch import nn

from speedrun_mup.core import mup


@pytest.fixture
def process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def check(model: nn.Module, expected: torch.Tensor) -> None:
    """The table's learning rates, the same logits as before, and one training step works."""
    assert learning_rates(mup.MuAdam(model, lr=1.0), model) == pytest.approx(ADAM)
    assert learning_rates(mup.MuSGD(model.parameters(), lr=1.0, model=model), model) == pytest.approx(SGD)
    optimizer = mup.MuAdamW(model, lr=1e-3)
    torch.testing.assert_close(model(tokens()).float(), expected)
    before = loss_of(model)
    before.backward()
    optimizer.step()
    assert loss_of(model) < before


def test_reference():
    model = tiny()
    check(model, model(tokens()).detach())


def test_forward_depends_on_the_multiplier():
    """So that a lost multiplier would show in every other test here."""
    model = tiny()
    expected = model(tokens())
    mup.set_base_shapes(model, None, rescale_params=False)
    assert not torch.allclose(model(tokens()), expected)


def test_deepcopy():
    model = tiny()
    check(copy.deepcopy(model), model(tokens()).detach())


def test_averaged_model():
    model = tiny()
    average = torch.optim.swa_utils.AveragedModel(model)
    torch.testing.assert_close(average(tokens()), model(tokens()))


def test_pickle():
    model = tiny()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert mup.get_infshapes(loaded) == mup.get_infshapes(model)
    check(loaded, model(tokens()).detach())


@pytest.mark.parametrize("assign", [False, True])
def test_state_dict(assign):
    model, other = tiny(), tiny()
    for parameter in model.parameters():
        parameter.data.mul_(1.1)
    other.load_state_dict(model.state_dict(), assign=assign)
    check(other, model(tokens()).detach())


def test_set_base_shapes_after_loading_does_not_rescale_a_trained_model():
    model = tiny()
    loaded = Tiny(32)
    loaded.load_state_dict(model.state_dict())
    mup.set_base_shapes(loaded, Tiny(8), delta=Tiny(16), rescale_params=False)
    check(loaded, model(tokens()).detach())


def test_to_empty_from_meta():
    model = tiny()
    with torch.device("meta"):
        empty = mup.set_base_shapes(Tiny(32), Tiny(8), delta=Tiny(16))
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    check(empty, model(tokens()).detach())


def test_initialising_after_meta():
    """On meta there is nothing to rescale; the second call does it, and init functions find their shapes again."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64), mup.MuReadout(64, 10))
        base, delta = (nn.Sequential(nn.Linear(16, w), nn.Linear(w, w), mup.MuReadout(w, 10)) for w in (16, 32))
        mup.set_base_shapes(model, base, delta=delta)
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    for layer in model:
        layer.reset_parameters()
    mup.set_base_shapes(model, base, delta=delta)
    mup.init.normal_(model[1].weight)

    torch.manual_seed(0)
    direct = nn.Sequential(nn.Linear(16, 64), nn.Linear(64, 64), mup.MuReadout(64, 10))
    mup.set_base_shapes(direct, base, delta=delta)
    mup.init.normal_(direct[1].weight)
    for (name, p), q in zip(model.named_parameters(), direct.parameters()):
        assert torch.equal(p, q), name


def test_swapped_tensors():
    model = tiny()
    expected = model(tokens()).detach()
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        model.double()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    check(model, expected)


def test_functional_call():
    model = tiny()
    plain = {name: p.detach().clone() for name, p in model.named_parameters()}
    torch.testing.assert_close(torch.func.functional_call(model, plain, (tokens(),)), model(tokens()))


@pytest.mark.slow
def test_compile():
    model = tiny()
    check(torch.compile(model, backend="eager", fullgraph=True), model(tokens()).detach())


@pytest.mark.slow
def test_export():
    model = tiny()
    torch.testing.assert_close(torch.export.export(model, (tokens(),)).module()(tokens()), model(tokens()))


def test_ddp(process_group):
    model = tiny()
    expected = model(tokens()).detach()
    check(nn.parallel.DistributedDataParallel(model), expected)


def test_defect_8_base_shapes_of_wrapped_models(process_group):
    """Upstream turned 'module.embed.weight' into 'bed.weight'."""
    plain, wrapped = tiny(), nn.parallel.DistributedDataParallel(Tiny(32))
    mup.set_base_shapes(wrapped, Tiny(8), delta=Tiny(16))
    assert mup.get_infshapes(wrapped.module) == mup.get_infshapes(plain)
    again = mup.set_base_shapes(Tiny(64), mup.get_infshapes(wrapped))
    assert again.embed.weight.infshape == mup.InfShape([mup.InfDim(None, 11), mup.InfDim(8, 64)])
    compiled = torch.compile(nn.parallel.DistributedDataParallel(Tiny(32)), backend="eager")
    mup.set_base_shapes(compiled, Tiny(8), delta=Tiny(16))
    assert list(mup.get_infshapes(compiled).values()) == list(mup.get_infshapes(plain).values())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:FSDP2-wrapped module:UserWarning")  # about in-place use of the logits
def test_fsdp2(process_group):
    model = tiny()
    expected = model(tokens()).detach()
    mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    torch.distributed.fsdp.fully_shard(model, mesh=mesh)
    assert not hasattr(model.fc.weight, "infshape")
    check(model, expected)


def test_tied_readout_survives_deepcopy():
    model = tiny(tied=True)
    twin = copy.deepcopy(model)
    assert twin.readout.weight is twin.embed.weight
    torch.testing.assert_close(twin(tokens()), model(tokens()))
    assert "readout.weight" not in learning_rates(mup.MuAdam(twin, lr=1.0), twin)


def test_defect_1_lost_information_raises_and_never_defaults_to_one():
    """Seen from the side of someone who passes tensors only; the other tests here pass the model."""
    twin = copy.deepcopy(tiny())
    with pytest.raises(mup.UndeclaredParameterError, match="pass the model"):
        mup.MuAdam(twin.parameters(), lr=1.0)
    with pytest.raises(mup.UndeclaredParameterError, match="set_base_shapes"):
        mup.init.normal_(twin.fc.weight)
    mup.apply_infshapes(twin, mup.get_infshapes(twin))
    mup.init.normal_(twin.fc.weight)
    assert learning_rates(mup.MuAdam(twin.parameters(), lr=1.0), twin) == pytest.approx(ADAM)

    bare = Tiny(32)
    with pytest.raises(mup.UndeclaredParameterError, match="set_base_shapes"):
        bare(tokens())
    with pytest.raises(mup.UndeclaredParameterError, match="gate"):
        mup.MuAdam(bare, lr=1.0)
