"""Set-up of the whole test session."""

import ctypes
import gc
import itertools

import jax
import pytest

# Tests of sharding need several devices. Their number is fixed once a backend starts, so it is
# set before any test module is imported, for every test of the session.
jax.config.update("jax_num_cpu_devices", 8)

# Traced programs are many objects that live long: looking for garbage among them takes time.
gc.set_threshold(20_000, 30, 30)

C_LIBRARY = ctypes.CDLL(None)
FINISHED_MODULES = itertools.count(1)


@pytest.fixture(scope="module", autouse=True)
def compiled_functions_end_with_their_modules():
    """Keeps the memory of a test process from growing with each module."""
    yield
    if next(FINISHED_MODULES) % 5:
        return
    jax.clear_caches()
    gc.collect()
    # What compilation freed stays with the process until the C library is told to give it back.
    if hasattr(C_LIBRARY, "malloc_trim"):
        C_LIBRARY.malloc_trim(0)
