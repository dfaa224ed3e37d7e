"""Set-up of the whole test session."""

import gc

import jax
import pytest

# Tests of sharding need several devices. Their number is fixed once a backend starts, so it is
# set before any test module is imported, for every test of the session.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="module", autouse=True)
def compiled_functions_end_with_their_module():
    """Keeps the memory of a test process from growing with each module."""
    yield
    jax.clear_caches()
    gc.collect()
