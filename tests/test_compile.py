"""Compiling: the same numbers, no second graph once training is warm, and nothing compiled twice on one machine."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
from contextlib import closing

import pytest
import torch

from speedrun_mup.bench import graphs_compiled
from speedrun_mup.core import model as model_module
from speedrun_mup.core.model import loss as loss_module
from speedrun_mup.core.utils import World
from speedrun_mup.training.hardware import use_compile_cache
from speedrun_mup.training.passes import Passes
from speedrun_mup.training.run import Run

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's compiler has some of its own


@pytest.fixture
def traced(monkeypatch):
    """Capture graphs and derive their backward as ever, but run them without generating code: that takes minutes here."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    loss_module._fused_loss_and_gradient.cache_clear()
    torch._dynamo.reset()
    yield
    loss_module._fused_loss_and_gradient.cache_clear()
    torch._dynamo.reset()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("function", [model_module.rms_norm, model_module.ReluSquared.apply])
def test_gradients_of_our_own_functions_survive_compiling(function, dtype):
    """Torch 2.11 makes them zero in silence if the forward ends with a conversion that changes nothing."""
    torch._dynamo.reset()
    x = torch.randn(8, 16, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    compiled = torch.compile(function, backend="eager", dynamic=False)
    found, expected = (torch.autograd.grad(each(x), x, torch.ones_like(x))[0] for each in (compiled, function))
    assert expected.any() and torch.equal(found, expected)


@pytest.mark.slow
@pytest.mark.parametrize("attention", ["dense", "blocked"])
def test_training_compiles_nothing_after_warmup_while_the_window_grows(tiny, traced, attention):
    """Stream and loss with gradients and without, and Adam for tables, not for scalars; window and rates are tensors."""
    settings = {
        "attention": attention,
        "n_layer": 4,
        "kernel_warmup": 1,
        "iterations": 8,
        "window_tokens": 128,
        "save": False,
    }
    losses = {}
    for compiled in (False, True):
        before = graphs_compiled()
        with closing(Run(tiny(name=f"compiled-{compiled}", compile=compiled, **settings), World())) as run:
            run.warm_up_kernels()
            warm, windows = graphs_compiled(), {int(run.passes.window(step)) for step in range(8)}
            result = run.train()
            losses[compiled] = result.val_loss
        assert windows == {1, 2, 3, 4}
        assert warm - before == (5 if compiled else 0)
        assert graphs_compiled() == warm
    assert losses[True] == pytest.approx(losses[False], rel=1e-4)


@pytest.mark.slow
def test_sizes_that_do_not_fit_leave_no_compiled_code_behind(tiny, traced, monkeypatch):
    """Torch keeps the code of a few sizes of a function and runs the others uncompiled, here with an error."""
    passes = Passes.accumulate_gradients

    def limited(run, micro_batches, step):
        loss = passes(run, micro_batches, step)
        if run.cfg.micro_batch_tokens > 32:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return loss

    monkeypatch.setattr(Passes, "accumulate_gradients", limited)
    settings = {
        "attention": "dense",
        "n_layer": 2,
        "compile": True,
        "fit_memory": True,
        "micro_batch_tokens": 256,
        "micro_batches_per_forward": 1,
    }
    limit = torch._dynamo.config.patch(recompile_limit=2, fail_on_recompile_limit_hit=True)
    with limit, closing(Run(tiny(**settings, val_chunk_tokens=32), World())) as run:
        assert run.cfg.micro_batch_tokens == 32 and run.train().finished


@pytest.mark.slow
def test_a_residual_is_not_folded_into_the_product_before_it():
    """Folding would make the library copy the residual first. Plain F.linear is folded, so the test can see it."""
    from torch._inductor.utils import run_and_get_code

    linear = model_module.Linear(64, 64)
    torch.nn.init.normal_(linear.weight)
    torch._dynamo.reset()

    def folds(product) -> bool:
        def block(x):
            y = x + product(x)
            return y * y.square().mean(-1, keepdim=True)

        with torch.no_grad():
            _, code = run_and_get_code(torch.compile(block, dynamic=False), torch.randn(128, 64))
        return "addmm" in "".join(code)

    assert folds(lambda x: torch.nn.functional.linear(x, linear.weight))
    assert not folds(linear)


@pytest.mark.slow
def test_importing_the_model_leaves_the_compiler_alone():
    """Its import takes seconds, and fixes where compiled code is kept before a run can say so."""
    command = "import sys, speedrun_mup.coord_check, speedrun_mup.training.run; print('torch._dynamo' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "False", done.stderr


COMPILE = """
import sys, torch
from pathlib import Path
from speedrun_mup.core import model
from speedrun_mup.training.hardware import use_compile_cache
use_compile_cache(Path(sys.argv[1]))
from torch._dynamo.utils import counters
model.ReluSquared.backward = staticmethod(lambda ctx, grad: grad * ctx.saved_tensors[0] * float(sys.argv[2]))
x = torch.full((8,), 3.0, requires_grad=True)
torch.compile(model.ReluSquared.apply, dynamic=False)(x).sum().backward()
print(counters["aot_autograd"]["autograd_cache_hit"], x.grad[0].item())
"""


@pytest.mark.slow
def test_a_second_process_finds_what_the_first_compiled_unless_a_gradient_changed(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    found = []
    for factor in (2, 2, 5):
        command = [sys.executable, "-c", COMPILE, str(tmp_path / "compiled"), str(factor)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
        assert done.returncode == 0, done.stderr
        found.append(done.stdout.split())
    assert found == [["0", "6.0"], ["1", "6.0"], ["0", "15.0"]]
    assert any((tmp_path / "compiled").iterdir())


def test_a_cache_that_the_environment_names_is_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "elsewhere")
    use_compile_cache(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "elsewhere"
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    use_compile_cache(tmp_path)
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path)
