"""Optimizers on training tasks, each with the same number of trials; see the README beside it."""
