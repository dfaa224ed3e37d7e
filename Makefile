# Each target sets up what it needs in .venv; only Python >= 3.11, make and pip are assumed.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
WORKERS ?= 2
# A worker that ends by itself is not replaced: what it did would be repeated, or waited for.
PARALLEL = -n $(WORKERS) --dist loadfile --max-worker-restart 0
export PIP_DISABLE_PIP_VERSION_CHECK := 1

.PHONY: demo demo-prune test test-examples test-netket test-optimized test-oldest test-tpu bench bench-history bench-mfac bench-natural bench-pruning bench-spectrum \
	bench-tiny bench-tpu bench-training docs notebooks gallery format check dist clean

demo: $(VENV)/.examples
	$(BIN)/python examples/digits.py $(ARGS)

demo-prune: $(VENV)/.examples
	$(BIN)/python examples/prune_digits.py $(ARGS)

# Tests mostly compile small programs: they are optimized less, and each is compiled once for all
# modules and workers. Older versions of XLA compile in half the time with a flag that newer ones
# refuse, so it is tried first. A plain `pytest` runs what users run.
test test-examples test-netket bench-tiny: export JAX_DISABLE_MOST_OPTIMIZATIONS := 1
test test-examples test-netket test-optimized bench-tiny: export JAX_COMPILATION_CACHE_DIR := $(CURDIR)/$(VENV)/compiled
test test-examples test-netket test-optimized bench-tiny: export JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS := 0
QUICK := --xla_cpu_use_fusion_emitters=false
QUICKLY = XLA_FLAGS=$(QUICK) $(BIN)/python -c "import jax; jax.devices()" 2>/dev/null \
		&& export XLA_FLAGS=$(QUICK);

# The package, its docstrings and README.
test: $(VENV)/.test
	$(QUICKLY) $(BIN)/python -m pytest $(PARALLEL) --ignore-glob 'docs/*' $(EXAMPLES:%=--ignore %) $(ARGS)

# The code on the pages, the scripts and notebooks, and what measures.
EXAMPLES := tests/test_examples.py tests/test_notebooks.py tests/test_spin_chain.py tests/benchmarks
test-examples: $(VENV)/.test
	$(QUICKLY) $(BIN)/python -m pytest $(PARALLEL) docs $(EXAMPLES) $(ARGS)

# The natural gradient inside NetKet, beside NetKet's own.
test-netket: $(VENV)/.test $(VENV)/.netket
	$(BIN)/python -m pytest tests/test_spin_chain.py $(ARGS)

# Both, optimized as for users.
test-optimized: $(VENV)/.test
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

test-oldest: .venv-oldest/.ready
	.venv-oldest/bin/python -m pytest $(PARALLEL) -m oldest tests $(ARGS)

# The benchmark of accelerators at sizes for a test, and nothing of it is kept.
bench-tiny: $(VENV)/.test
	$(QUICKLY) $(BIN)/python benchmarks/accelerator.py --tiny --output "$$(mktemp -d)"

# Programs compiled for TPUs, on a machine without any. The compiler has an environment of its own:
# where it is installed, JAX looks for TPUs and complains that there are none.
test-tpu: .venv-tpu/.ready
	JAX_PLATFORMS=cpu .venv-tpu/bin/python -m pytest $(PARALLEL) tests/tpu $(ARGS)

bench: $(VENV)/.benchmarks
	$(BIN)/python benchmarks/adahessian_step.py $(ARGS)

bench-history: $(VENV)/.examples
	PYTHONPATH=. $(BIN)/python benchmarks/history.py $(ARGS)

bench-mfac: $(VENV)/.benchmarks
	$(BIN)/python benchmarks/mfac_step.py $(ARGS)

bench-natural: $(VENV)/.benchmarks
	PYTHONPATH=. $(BIN)/python benchmarks/natural_gradient.py $(ARGS)

bench-pruning: $(VENV)/.benchmarks
	cd benchmarks && ../$(BIN)/python -m sparsity $(ARGS)

bench-spectrum: $(VENV)/.benchmarks
	$(BIN)/python benchmarks/spectrum.py $(ARGS)

bench-training: $(VENV)/.benchmarks
	cd benchmarks && ../$(BIN)/python -m training $(ARGS)

bench-tpu: .venv-tpu/.ready
	JAX_PLATFORMS=cpu PYTHONPATH=. .venv-tpu/bin/python benchmarks/tpu_plan.py $(ARGS)

docs: $(VENV)/.dev
	$(BIN)/python docs/tools/notebooks.py
	PYTHONPATH=docs/tools $(BIN)/zensical build --clean --strict

notebooks: $(VENV)/.dev
	$(BIN)/jupyter execute notebooks/*.ipynb

# Each script in a process of its own; without ARGS, the figures of the pages.
gallery: $(VENV)/.examples
	set -e; for script in $(filter-out %/common.py,$(wildcard examples/gallery/*.py)); do \
		$(BIN)/python $$script $(ARGS); done

SCHEMA := $(BIN)/check-jsonschema --builtin-schema vendor.github

format: $(VENV)/.dev
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

check: $(VENV)/.dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/pyright
	$(BIN)/zizmor --offline --quiet .github
	$(SCHEMA)-workflows .github/workflows/*.yml
	$(SCHEMA)-issue-forms $(filter-out %config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA)-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.dependabot .github/dependabot.yml
	$(BIN)/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff

# The last commit, built twice, and checked.
dist: $(VENV)/.dev
	.ci/dist

clean:
	rm -rf $(VENV) .venv-newest .venv-oldest .venv-tpu .venv-wheel build dist site .cache

$(VENV)/bin/python:
	$(PYTHON) -m venv $(VENV)

# The stamp .venv/.NAME says that the extras of NAME are installed. Most of their modules are never
# imported: those that are, Python compiles then.
$(VENV)/.examples: EXTRAS := examples
$(VENV)/.test: EXTRAS := examples,test
$(VENV)/.netket: EXTRAS := netket
$(VENV)/.benchmarks: EXTRAS := benchmarks
$(VENV)/.dev: EXTRAS := dev
$(VENV)/.%: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet --no-compile --editable ".[$(EXTRAS)]"
	touch $@

.venv-tpu/.ready: pyproject.toml
	$(PYTHON) -m venv .venv-tpu
	.venv-tpu/bin/python -m pip install --quiet --no-compile --editable ".[examples,test,tpu-compile]"
	touch $@

# The lower bounds of pyproject.toml constrain pip, which resolves everything behind them itself:
# two tools may see different releases of one index.
.venv-oldest/.ready: pyproject.toml | $(VENV)/bin/python
	$(BIN)/python -m pip install --quiet "uv>=0.8"
	$(PYTHON) -m venv .venv-oldest
	$(BIN)/uv pip compile --quiet --no-deps --resolution lowest-direct --extra test pyproject.toml \
		--no-annotate --no-header --output-file .venv-oldest/constraints.txt
	.venv-oldest/bin/python -m pip install --quiet --no-compile --constraint .venv-oldest/constraints.txt \
		--editable ".[test]"
	touch $@
