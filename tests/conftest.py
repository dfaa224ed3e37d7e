"""Set-up of the whole test session."""

import jax

# Tests of sharding need several devices. Their number is fixed once a backend starts, so it is
# set before any test module is imported, for every test of the session.
jax.config.update("jax_num_cpu_devices", 8)
