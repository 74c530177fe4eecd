"""Slow tests train for minutes: they run with --slow only.

    pytest tests            # minutes of everything else
    pytest tests --slow     # whole runs, killed and resumed ones, pictures from a folder
"""
import sys
from pathlib import Path

import pytest

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
