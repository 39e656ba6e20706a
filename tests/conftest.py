"""One small cache for all tests, so that the embedded and synthetic corpora are prepared once per run."""

import os
import signal
from pathlib import Path

import pytest
import torch

from speedrun_mup.config import TrainConfig, make_config
from speedrun_mup.training import train

# A shell that starts this in the background has it ignore Ctrl-C, and everything that it starts as well. Tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """A corpus cache that all workers of this run share."""
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base
    os.environ["SPEEDRUN_MUP_CACHE"] = str(shared / "cache")
    torch.set_num_threads(1)
    return Path(os.environ["SPEEDRUN_MUP_CACHE"])


def pytest_collection_modifyitems(items):
    """Tests marked `gpu` are skipped where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs CUDA"))


TINY = {
    "data": "synthetic",
    "width": 64,
    "base_width": 32,
    "parametrization": "mup",
    "head_dim": 16,
    "block_size": 32,
    "window_tokens": 96,
    "iterations": 6,
    "micro_batch_tokens": 128,
    "micro_batches": 4,
    "val_tokens": 1024,
    "val_chunk_tokens": 256,
    "val_every": 3,
    "progress": False,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def warm(tmp_path_factory):
    """What a first run has to import and prepare is done, so that lives are as long as the test expects."""
    train(make_config("laptop", TINY | {"iterations": 1, "out": str(tmp_path_factory.mktemp("warm"))}))


@pytest.fixture
def tiny(tmp_path):
    """tiny(**changes): a config that trains in under a second, writing into this test's folder."""

    def make(**changes) -> TrainConfig:
        return make_config("laptop", TINY | {"out": str(tmp_path / "runs")} | changes)

    return make
