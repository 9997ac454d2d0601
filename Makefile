# fewbit in one word each: `make help` lists them. Everything happens in .venv; nothing outside the checkout is touched.

VENV := .venv
BIN := $(VENV)/bin

# The one place where the version of torch is pinned; pyproject.toml only says which versions will do.
TORCH ?= torch==2.13.0
# Where torch comes from; empty: where everything else does. On Linux without a GPU a much smaller build does as well:
#   make test TORCH_INDEX=https://download.pytorch.org/whl/cpu
TORCH_INDEX ?=

# The first Python that is new enough; `make PYTHON=/path/to/python3.12 ...` picks another.
PYTHON ?= $(firstword $(foreach p,python3 python3.13 python3.12 python3.11,\
	$(shell $(p) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $(p))))

# The libraries that fewbit is compared with agree on no versions with it: they have an environment of their own.
PEERS := .venv-peers

# Beside them, to be compared in speed on a CPU: llama.cpp, built here for this processor, and transformers.
CPU_PEERS := .venv-cpu-peers

# Neither do the clients that a server is tested with, nor with each other: an environment for each tests/clients/*.txt.
CLIENTS := .venv-clients
CLIENT_STAMPS := $(patsubst tests/clients/%.txt,$(CLIENTS)/%/.all,$(wildcard tests/clients/*.txt))

PIP := $(BIN)/python -m pip -qq --disable-pip-version-check
TRITON_HINT := echo "if it is triton they disagree about: the tests' triton goes with the CPU build of torch;" \
	"make clean, then add TORCH_INDEX=https://download.pytorch.org/whl/cpu" >&2
FAST := not slow and not gpu and not multi_gpu
SLOW := slow and not gpu and not multi_gpu
# Tests run in so many processes at a time, a file in one of them; each takes up to 2 GiB.
WORKERS ?= 2
PYTEST := $(BIN)/pytest -q -n $(WORKERS) --dist loadfile

.DEFAULT_GOAL := help
.PHONY: help venv demo test test-all soak test-clients peers bench-peers check clean

help: ## print this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-12s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

venv: $(VENV)/.all ## make .venv with everything for work on fewbit

demo: $(VENV)/.demo ## compress the bundled model, compare the formats, serve one and ask it
	@$(BIN)/fewbit demo

test: check ## what must always hold: check, then the fast tests on the CPU
	@$(PYTEST) -m "$(FAST)"

test-all: $(VENV)/.all ## the slow tests that `make test` leaves out
	@$(PYTEST) -m "$(SLOW)"

test-clients: $(VENV)/.all $(CLIENT_STAMPS) ## serve to lm-eval, aiperf, guidellm and PyTriton's client; 3 GB at first
	@$(BIN)/pytest -q tests/clients

soak: $(VENV)/.all ## ten minutes of mixed traffic on a real server; MINUTES=1 for a shorter one
	@$(BIN)/python tests/robust/soak.py --minutes $(or $(MINUTES),10)

peers: $(PEERS)/.all ## make .venv-peers with the real libraries that the slow tests and benchmarks compare with

bench-peers: $(VENV)/.all $(CPU_PEERS)/.all ## speed on this CPU beside llama.cpp (built first) and transformers; ARGS=--quick
	@$(BIN)/python benchmarks/cpu_peers.py $(ARGS)

check: $(VENV)/.all ## format, lint, types, import floors, house rules
	@$(BIN)/ruff format --check --quiet . || { echo "not formatted; run: $(BIN)/ruff format ." >&2; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@floors=$$($(BIN)/lint-imports --no-logo 2>&1) || { echo "$$floors" >&2; exit 1; }
	@$(BIN)/python tools/house_lint.py

clean: ## remove .venv, caches and whatever was built
	@rm -rf $(VENV) build dist demo-out *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	@find src tests tools -name __pycache__ -type d -prune -exec rm -rf {} +

# Each stamp says that its step is done; a step is done again when what it was made from changes.
# The later steps name torch once more, so that no other package can move it to another version in silence.

$(VENV)/.python:
	@test -n "$(PYTHON)" || \
		{ echo "fewbit needs Python 3.11 or newer; say where: make PYTHON=/path/to/python3" >&2; exit 1; }
	@echo "making $(VENV) with $$($(PYTHON) --version)" >&2
	@$(PYTHON) -m venv $(VENV)
	@touch $@

$(VENV)/.torch: $(VENV)/.python Makefile
	@echo "installing $(TORCH)" >&2
	@$(PIP) install $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@touch $@

$(VENV)/.demo: $(VENV)/.torch pyproject.toml
	@echo "installing fewbit for the demo" >&2
	@$(PIP) install -e '.[demo]' "$(TORCH)"
	@touch $@

$(VENV)/.all: $(VENV)/.torch pyproject.toml
	@echo "installing fewbit with its tests and tools" >&2
	@$(PIP) install -e '.[demo,test,dev]' "$(TORCH)" || { $(TRITON_HINT); exit 1; }
	@touch $@ $(VENV)/.demo

# torch first, and from where .venv has it: the peers do not say which build they want.
$(PEERS)/.all: benchmarks/peers.txt Makefile
	@test -n "$(PYTHON)" || { echo "the peers need Python 3.11 or newer; say where: make PYTHON=... peers" >&2; exit 1; }
	@echo "making $(PEERS) with $$($(PYTHON) --version); this takes some minutes" >&2
	@$(PYTHON) -m venv $(PEERS)
	@$(PEERS)/bin/python -m pip -qq --disable-pip-version-check install \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@$(PEERS)/bin/python -m pip -qq --disable-pip-version-check install -r benchmarks/peers.txt
	@touch $@

# llama-cpp-python comes as sources.
$(CPU_PEERS)/.all: benchmarks/cpu_peers.txt Makefile
	@test -n "$(PYTHON)" || { echo "the peers need Python 3.11 or newer; say where: make PYTHON=... $@" >&2; exit 1; }
	@echo "making $(CPU_PEERS) with $$($(PYTHON) --version); llama.cpp is compiled, which takes about ten minutes" >&2
	@$(PYTHON) -m venv $(CPU_PEERS)
	@$(CPU_PEERS)/bin/python -m pip -qq --disable-pip-version-check install \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	@CMAKE_ARGS="-DGGML_NATIVE=ON -DLLAVA_BUILD=OFF" \
		$(CPU_PEERS)/bin/python -m pip -qq --disable-pip-version-check install -r benchmarks/cpu_peers.txt
	@touch $@

# As above where a client wants torch. One of them alone: make .venv-clients/pytriton/.all
$(CLIENTS)/%/.all: tests/clients/%.txt
	@test -n "$(PYTHON)" || { echo "clients need Python 3.11 or newer; say where: make PYTHON=... $@" >&2; exit 1; }
	@echo "making $(@D) with $$($(PYTHON) --version); this takes some minutes" >&2
	@$(PYTHON) -m venv $(@D)
	@if grep -q '^torch' $<; then $(@D)/bin/python -m pip -qq --disable-pip-version-check install \
		$(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"; fi
	@$(@D)/bin/python -m pip -qq --disable-pip-version-check install -r $<
	@touch $@
