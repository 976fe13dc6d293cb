# Everything a contributor runs. `make` alone prints the list.
#
#   PYTHON   interpreter that creates the environment (3.11 or newer)
#   VENV     where the environment lives
#   SEED     order of the tests; the run prints it
#   TESTS    what `make test` runs: a directory, a file, a test id
#   NAME     one benchmark instead of all: make bench NAME=engine

PYTHON ?= python3
VENV ?= .venv
SEED ?= 1
TESTS ?= tests
NAME ?=

BIN := $(VENV)/bin
RUN := $(BIN)/python
PACKAGES := cluster replicas moe offload router
CHECKED := $(PACKAGES) bench tools tests examples

# All of them run, so that one report names everything that is wrong.
LINTERS := "ruff format --check ." "ruff check ." "python -m tools.checks" "lint-imports --no-cache" \
           "python -m router.proto.generate --check" "codespell" "mypy $(CHECKED)"

# The stamp is named after what was installed: a changed pin means a new stamp and one pip run.
LOCK := requirements.lock
STAMP := $(VENV)/.installed-$(shell cat $(LOCK) pyproject.toml | cksum | cut -d' ' -f1)

# A CPU benchmark is a module of bench/ that writes a report; device benchmarks live in bench/gpu/.
# bench.offload and bench.moe need root (a memory cgroup, network namespaces): run them by name.
REPORTING := $(shell grep -lw write_report bench/*.py)
BENCHES := $(or $(NAME),$(filter-out report offload moe,$(basename $(notdir $(REPORTING)))))

.DEFAULT_GOAL := help
.PHONY: help setup ops demo test lint types format proto manifests bench lock clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## install every pinned dependency into VENV (nothing to do when up to date)
	@echo "environment: $(VENV)"

$(STAMP): | $(LOCK)
	@command -v $(PYTHON) >/dev/null || { echo "no such interpreter: $(PYTHON); try make PYTHON=..." >&2; exit 2; }
	@$(PYTHON) tools/bootstrap.py --venv $(VENV) --lock $(LOCK) --stamp $@

ops: $(STAMP)  ## compile CPU kernels and readers of packed weights (once; needs g++, headers of libaio)
	@failed=; for part in replicas.kernels.ahead offload.readers.aio_build; do \
	    $(RUN) -m $$part || failed=1; \
	done; \
	test -z "$$failed"

demo: $(STAMP)  ## start a small cluster, stream tokens over gRPC and HTTP, shut it down
	@$(RUN) examples/demo.py

test: $(STAMP)  ## the whole test suite, in the random order that SEED gives
	@echo "kernels that tests load: compiled once, which takes minutes"
	@$(RUN) -m tests.support.compiled_kernels
	$(RUN) -m pytest --randomly-seed=$(SEED) --durations=10 $(TESTS)

lint: $(STAMP)  ## format, lint, house rules, import layers, generated code, spelling, types
	@failed=; for check in $(LINTERS); do \
	    echo "== $$check"; $(BIN)/$$check || failed="$$failed '$$check'"; \
	done; \
	test -z "$$failed" || { echo "lint failed:$$failed" >&2; exit 1; }

types: $(STAMP)  ## mypy alone
	$(BIN)/mypy $(CHECKED)

format: $(STAMP)  ## rewrite the sources in house style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

proto: $(STAMP)  ## regenerate the protobuf and gRPC modules
	$(RUN) -m router.proto.generate

manifests: $(STAMP)  ## render the manifests of k8s/overlays from their cluster files
	$(BIN)/penstock render k8s/overlays/cpu/cluster.yaml -o k8s/overlays/cpu/rendered
	$(BIN)/penstock render k8s/overlays/gpu/cluster.yaml -o k8s/overlays/gpu/rendered \
	    --pod-gpus 2 --pod-cpus 8 --pod-memory 32GiB

bench: $(STAMP)  ## run the CPU benchmarks; results go to bench/results
	@set -e; for name in $(BENCHES); do echo "== bench.$$name"; $(RUN) -m bench.$$name; done

lock: $(STAMP)  ## resolve all dependencies anew and pin them in requirements.lock
	$(RUN) tools/lock.py

clean:  ## remove the environment, caches and build products
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(CHECKED) -name __pycache__ -type d -prune -exec rm -rf {} +
