"""Fixtures and assertions of the contract tests."""

import logging

import jax
import pytest


@pytest.fixture
def x64():
    """64-bit mode for one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def compilations(caplog):
    """A function that returns the names of what was compiled since it was last called."""

    def names():
        messages = [record.getMessage() for record in caplog.records]
        caplog.clear()
        return [text for text in messages if text.startswith("Finished XLA compilation")]

    with jax.log_compiles(), caplog.at_level(logging.WARNING, logger="jax"):
        yield names
