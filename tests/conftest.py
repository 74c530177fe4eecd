"""The whole folder runs on up to four cores, files or tests that are named in this process (tests/pytest.ini).

    pytest tests            # minutes of everything that needs no long training
    pytest tests --slow     # whole runs, killed and resumed ones, pictures from a folder
"""
import gc
import importlib
import os
import sys
from pathlib import Path

# Before torch reads it: workers share the cores, they do not each take all of them.
WORKERS = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
if WORKERS > 1:
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // WORKERS)))

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # train.py and its packages


def pytest_xdist_auto_num_workers(config):
    """0: no workers. Each takes seconds to start and a gigabyte: too much for a file or two."""
    if any(Path(argument.partition("::")[0]).is_file() for argument in config.args):
        return 0
    return min(4, os.cpu_count())


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that train for minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: trains for minutes; runs with --slow only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="runs with --slow"))


def pytest_collection_finish():
    # Every stage of a run collects what nothing refers to. The modules that tests import, transformers among them, are
    # over a million objects that stay: looking through them each time took a tenth of the suite.
    gc.collect()
    gc.freeze()


@pytest.fixture(params=["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"])
def device(request):
    """Where a test's model and batches are."""
    return request.param


@pytest.fixture(params=["small", "large"] if torch.cuda.is_available() else ["small"])
def blocks(request, monkeypatch):
    """Triton's blocks: smaller than the longer rows of these tests; on a GPU as large as they are in use, too."""
    sizes = dict(row_logp=256, linear_kl=256, sample=256, policy_loss=256, gae=64, decode_attention=16)
    for name, size in sizes.items():
        if request.param == "small":
            monkeypatch.setattr(importlib.import_module(f"kernels.{name}"), "BLOCK", size)
