"""Tests here need libtpu, and one that fits JAX."""

import importlib.util

import pytest

from .compiler import trouble


@pytest.fixture(scope="session", autouse=True)
def compiler():
    """Skips without libtpu; fails with a sentence where it does not fit."""
    if reason := trouble():
        missing = importlib.util.find_spec("libtpu") is None
        (pytest.skip if missing else pytest.fail)(reason)
