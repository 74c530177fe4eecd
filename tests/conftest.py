"""Slow tests train for minutes: they run with --slow only.

    pytest tests            # minutes of everything else
    pytest tests --slow     # whole runs, killed and resumed ones, pictures from a folder
"""
import importlib
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # train.py and its packages


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="also run the tests that train for minutes")


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: trains for minutes; runs with --slow only")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="runs with --slow"))


@pytest.fixture(params=["small", "large"] if torch.cuda.is_available() else ["small"])
def blocks(request, monkeypatch):
    """Triton's blocks: smaller than the longer rows of these tests; on a GPU as large as they are in use, too."""
    for name, size in dict(row_logp=256, linear_kl=256, sample=256, policy_loss=256, gae=64).items():
        if request.param == "small":
            monkeypatch.setattr(importlib.import_module(f"kernels.{name}"), "BLOCK", size)
