"""The job script of docs/reliability.md, with stand-ins for Slurm's programs and for torchrun."""

import re
import subprocess
from pathlib import Path

import pytest

PAGE = Path(__file__).parent.parent / "docs" / "reliability.md"
STAND_INS = {
    "scontrol": '[ "$1" = show ] && printf "node7\\nnode8\\n" || echo "$@" >> scontrol.txt',
    "srun": 'exec "$@"',
    "torchrun": 'echo "$@" > torchrun.txt; cp status runs/big/status.json; exit 1',  # as torchrun ends, whatever its ranks did
}


@pytest.mark.parametrize(
    "status, again", [("stopped", True), ("finished", False), ("failed", False), ("diverged", False)]
)
def test_the_job_script_requeues_a_run_that_was_stopped(tmp_path, status, again):
    script = next(block for block in re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.S) if "#SBATCH" in block)
    (tmp_path / "runs" / "big").mkdir(parents=True)
    (tmp_path / "status").write_text(f'{{\n "status": "{status}",\n "why": null\n}}\n')
    for name, text in STAND_INS.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{text}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_ID": "77", "SLURM_NNODES": "2"}
    environment["PATH"] = f"{tmp_path}:/usr/bin:/bin"
    subprocess.run(["bash", "-c", script], cwd=tmp_path, env=environment, timeout=60)
    words = (tmp_path / "torchrun.txt").read_text().split()
    assert {"--nnodes=2", "--rdzv-endpoint=node7:29500", "--rdzv-id=77"} < set(words) and words[-2:] == [
        "--resume",
        "auto",
    ]
    requeued = tmp_path / "scontrol.txt"
    assert (requeued.read_text() == "requeue 77\n") if again else not requeued.exists()
