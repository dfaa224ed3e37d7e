"""Test set-up: eight virtual CPU devices, and the examples of README and docs."""

import jax
from sybil import Sybil
from sybil.parsers.markdown import PythonCodeBlockParser, SkipParser

# Before any computation: the sharding tests need a mesh.
jax.config.update("jax_num_cpu_devices", 8)

# What builds the site imports what only the extra `docs` installs.
collect_ignore = ["docs/tools"]

pytest_collect_file = Sybil(
    parsers=[PythonCodeBlockParser(), SkipParser()],
    patterns=["*.md"],
    excludes=["tests/**", "docs/notebooks/**"],
).pytest()
