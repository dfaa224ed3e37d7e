"""Set-up of the whole test session."""

import ctypes
import gc

import jax
import pytest

# Tests of sharding need several devices. Their number is fixed once a backend starts, so it is
# set before any test module is imported, for every test of the session.
jax.config.update("jax_num_cpu_devices", 8)

C_LIBRARY = ctypes.CDLL(None)


@pytest.fixture(scope="module", autouse=True)
def compiled_functions_end_with_their_module():
    """Keeps the memory of a test process from growing with each module."""
    yield
    jax.clear_caches()
    gc.collect()
    # What compilation freed stays with the process until the C library is told to give it back.
    if hasattr(C_LIBRARY, "malloc_trim"):
        C_LIBRARY.malloc_trim(0)
