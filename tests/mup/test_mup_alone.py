"""The muP part is usable alone: torch is all that it imports."""

import subprocess
import sys

import pytest

BLOCKED = "numpy yaml pandas tqdm matplotlib transformers safetensors datasets"
SCRIPT = f"""
import torch, sys, time

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {BLOCKED.split()!r}:
            raise ImportError("blocked: " + name)

before = set(sys.modules)
sys.meta_path.insert(0, Blocked())
began = time.process_time()
import speedrun_mup.core.mup as mup
mup.adapt, mup.MuAdamW
seconds = time.process_time() - began

for name in mup.__all__:
    getattr(mup, name)
model = torch.nn.Sequential(torch.nn.Linear(3, 64), torch.nn.ReLU(), torch.nn.Linear(64, 2))
build = lambda width: torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.ReLU(), torch.nn.Linear(width, 2))
mup.adapt(model, 16, build=build)
model(torch.ones(1, 3)).sum().backward()
foreign = {{name.partition(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names)
print(sorted(foreign - {{"torch", "speedrun_mup"}}), len(mup.explain(model).splitlines()), seconds)
"""


@pytest.mark.slow
def test_core_mup_needs_torch_and_nothing_else():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=300)
    found, _, seconds = done.stdout.strip().rpartition(" ")
    assert found == "[] 6", done.stderr[-500:]
    assert float(seconds) < 0.5  # 0.07 s of CPU time, next to the seconds that torch takes
