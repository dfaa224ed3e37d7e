"""Set-up of the TPU compiler, which looks for a TPU's surroundings when it is loaded."""

import os

import jax

# Only where the CPU was asked for: a machine with TPUs must find its own surroundings.
if jax.config.jax_platforms == "cpu":
    for name, value in {
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # workers of pytest-xdist
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_LOG_DIR": "disabled",
        "TPU_MIN_LOG_LEVEL": "3",
        "TPU_SKIP_MDS_QUERY": "1",  # no metadata server to ask
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }.items():
        os.environ.setdefault(name, value)
