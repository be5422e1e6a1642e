# Every target does its own set-up in .venv; stamp files make the second call quick. `make help` lists them.

VENV ?= .venv
BIN := $(VENV)/bin
CARGO ?= cargo
# The first Python >= 3.11 on the PATH; name another with `make PYTHON=/path/to/python3 …`.
PYTHON ?= $(or $(shell for p in python3 python3.14 python3.13 python3.12 python3.11; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done),python3)
# The oldest release of torch.
TORCH ?= 2.11.0
# The oldest release of transformers that moekern.hf serves, and one between it and the newest.
TRANSFORMERS ?= 5.0.0 5.17.0
# Tests of torch's compiler, exporter, profiler and libraries.
TORCH_TESTS := integrations/test_torch_integration integrations/test_training_stacks layer/test_layer layer/test_masks \
	layer/test_balance verbs/test_eager costs/test_costs functional/test_experts backends/test_cuda_compilers
# Tests of the models of transformers.
TRANSFORMERS_TESTS := integrations/test_hf integrations/test_hf_blocks routing/test_router layer/test_shared_expert
# With the few of its dependencies that its experts import.
TORCHTITAN := torchtitan==0.3.0 spmd_types==0.2.3 tyro docstring_parser
# Packages that the own tests of transformers import.
SUITES_NEED := parameterized datasets pytest-timeout
# Commits made since then have subjects of 72 characters at most.
SUBJECTS_SINCE := 2026-11-30T00:00:00Z
# Test processes side by side, each with its share of the cores for torch; 0 runs the tests within pytest itself.
WORKERS ?= $(shell $(PYTHON) -c 'import os; print(min(4, os.cpu_count() or 1))')
# Which CuPy the tests compile the kernels with; cuda12 on a machine with an older driver, empty for none.
CUDA ?= $(if $(filter Linux,$(shell uname -s)),cuda13)

MADE := $(VENV)/.made
INSTALLED := $(VENV)/.installed
LINTERS := $(VENV)/.linters
SITE := $(VENV)/.site
SOURCES := Cargo.toml Cargo.lock pyproject.toml README.md LICENSE \
	$(shell find rust cuda python \( -name '__pycache__' -prune \) -o ! -name '*.so' ! -name '*.pyc' -print 2>/dev/null)

comma := ,
EXTRAS := test,bench,hf$(if $(CUDA),$(comma)$(CUDA))

# The cargo commands below must see the interpreter that the wheel is built for.
export PYO3_PYTHON := $(abspath $(BIN))/python
export UV_HTTP_TIMEOUT ?= 300

pytest = $(BIN)/python -m pytest -n $(WORKERS)

# uv installs torch and its five gigabytes of CUDA libraries in half a minute; pip serves where uv has no wheel.
install = if [ -x $(BIN)/uv ]; then $(BIN)/uv pip install --python $(BIN)/python $(1); \
	else $(BIN)/python -m pip install $(1); fi

.DEFAULT_GOAL := help
.PHONY: help demo test test-gpu releases suites sanitize doctor lint format bench figures docs build wheel sdist dev clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-8s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

demo: $(INSTALLED) ## set up, then train a dense and a mixture-of-experts model and compare them (ARGS="--steps 100")
	$(BIN)/moekern demo $(ARGS)

test: $(INSTALLED) ## set up, then run every test that needs no GPU, and each benchmark once
	$(CARGO) test --workspace --locked --quiet
	$(if $(CUDA),$(BIN)/moekern compile)
	$(BIN)/python -m pytest benches --benchmark-disable -m "not gpu"
	$(pytest) -m "not gpu" $(ARGS)

# Twice: under expandable segments too, whose addresses are low, as those of all virtual memory management are. The second
# run follows even if the first one fails.
test-gpu: $(INSTALLED) ## the tests that need a GPU, with torch's usual allocator and again with expandable segments (needs a GPU)
	@failed=0; for setting in expandable_segments:False expandable_segments:True; do \
		echo "PYTORCH_ALLOC_CONF=$$setting"; \
		env -u PYTORCH_CUDA_ALLOC_CONF PYTORCH_ALLOC_CONF=$$setting $(pytest) -m gpu $(ARGS) || failed=1; \
	done; exit $$failed

# Each in a folder of its own ahead of the environment, which keeps the newest.
releases: $(INSTALLED) ## the tests with older releases of torch and transformers, and with torchtitan
	@set -e; ahead() { \
		there=$(abspath $(VENV))/ahead-$$1; what="$$2"; which="$$3"; shift 3; \
		[ -d $$there ] || { $(call install,-q --target $$there $$what) || { rm -rf $$there; exit 1; }; }; \
		echo "$$what"; \
		PYTHONPATH=$$there$${PYTHONPATH:+:$$PYTHONPATH} $(pytest) -q -m "$$which" $(ARGS) $$@; \
	}; \
	ahead torch-$(TORCH) "torch==$(TORCH)" "not gpu" $(TORCH_TESTS:%=tests/%.py); \
	for release in $(TRANSFORMERS); do \
		ahead $$release "transformers==$$release" "not gpu and not slow" $(TRANSFORMERS_TESTS:%=tests/%.py); \
	done; \
	ahead torchtitan "--no-deps $(TORCHTITAN)" "not gpu and not slow" tests/integrations/test_torchtitan.py

# Not in CI: a quarter of an hour and more, and GitHub must be reachable, or TRANSFORMERS_SOURCE=/path/to/checkout given.
suites: $(INSTALLED) ## transformers' and peft's own tests with moekern as the experts (MODELS=all, SUITES=peft, ARGS="-k ep_")
	@[ -d $(VENV)/suites ] || { $(call install,-q --target $(VENV)/suites $(SUITES_NEED)) || { rm -rf $(VENV)/suites; exit 1; }; }
	PYTHONPATH=$(abspath $(VENV))/suites$${PYTHONPATH:+:$$PYTHONPATH} $(BIN)/python tests/suites/run.py \
		$(if $(MODELS),--models $(MODELS)) $(if $(SUITES),--suites $(SUITES)) \
		$(if $(TRANSFORMERS_SOURCE),--source $(TRANSFORMERS_SOURCE)) -- $(ARGS)

# cuBLAS is left out: racecheck reports hazards in its own kernels.
sanitize: $(INSTALLED) ## every CUDA kernel on small sizes under compute-sanitizer (needs a GPU and a CUDA toolkit)
	@set -e; for tool in memcheck racecheck synccheck; do \
		PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool $$tool --kernel-name-exclude kns=nvjet --error-exitcode 9 \
			$(BIN)/python -m pytest -q -m gpu tests/gpu/test_every_kernel.py $(ARGS); \
	done

doctor: $(INSTALLED) ## report what this machine can run
	$(BIN)/moekern doctor

lint: $(INSTALLED) $(LINTERS) ## formatters, linters, types, workflows, commit subjects; warnings are errors
	$(CARGO) fmt --all --check
	$(CARGO) clippy --workspace --all-targets --locked --quiet -- -D warnings
	RUSTDOCFLAGS="-D warnings" $(CARGO) doc --workspace --no-deps --locked --quiet
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/clang-format --dry-run --Werror cuda/*.cu cuda/*.cuh
	$(BIN)/mypy
	$(BIN)/check-jsonschema --quiet --builtin-schema vendor.github-workflows .github/workflows/*.yml
	@git log --no-merges --since=$(SUBJECTS_SINCE) --format='%h %s' | \
		awk 'length(substr($$0, index($$0, " ") + 1)) > 72 {print "subject of more than 72 characters: " $$0; bad = 1} END {exit bad}'

format: $(LINTERS) ## rewrite the sources in the project's format
	$(CARGO) fmt --all
	$(BIN)/ruff check --fix
	$(BIN)/ruff format
	$(BIN)/clang-format -i cuda/*.cu cuda/*.cuh

bench: $(INSTALLED) ## run the benchmarks; figures go to benches/results/NAME.json and .md (NAME=latest, ARGS="-k plan")
	$(BIN)/python -m pytest benches --benchmark-only --benchmark-json=benches/results/$(or $(NAME),latest).json $(ARGS)
	$(BIN)/python benches/records/figures.py

figures: $(INSTALLED) ## rewrite the figures in the texts from the records in benches/results
	$(BIN)/python benches/records/figures.py

docs: $(SITE) ## build the documentation's site into site/, with the reference; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build $(ARGS)

build: dev ## the same as dev

dev: $(MADE) ## compile the extension into python/moekern and install the package editable
	@rm -rf $(INSTALLED) python/moekern/cuda
	@$(BIN)/python -m pip uninstall -y -q moekern 2>/dev/null || true
	$(call install,-q maturin)
	$(BIN)/maturin develop --release --locked --extras $(EXTRAS) $(if $(wildcard $(BIN)/uv),--uv)
	@# maturin leaves copies of the kernels there; a link lets an edit of cuda/ take effect without a build.
	@rm -rf python/moekern/cuda && ln -s ../../cuda python/moekern/cuda

wheel: $(MADE) ## build the wheel into dist/
	@rm -f dist/moekern-*.whl
	$(BIN)/maturin build --release --locked --interpreter $(BIN)/python --out dist

sdist: $(MADE) ## build the source distribution into dist/
	@rm -f dist/moekern-*.tar.gz
	$(BIN)/maturin sdist --out dist

clean: ## remove what the other targets made
	rm -rf $(VENV) target dist site .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	rm -rf python/moekern/cuda python/moekern/*.so

$(MADE):
	@command -v $(firstword $(PYTHON)) >/dev/null || { echo "moekern needs Python >= 3.11, and $(PYTHON) was not found: install python3 and python3-venv with the system's package manager, or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "moekern needs Python >= 3.11, and $(PYTHON) is $$($(PYTHON) --version 2>&1): install a newer one from https://www.python.org/downloads/ or name one: make PYTHON=/path/to/python3" >&2; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || { echo "$(PYTHON) lacks the venv module: install it, on Debian and Ubuntu with: apt-get install python3-venv" >&2; exit 1; }
	@command -v $(CARGO) >/dev/null || { echo "moekern needs Rust >= 1.89, and $(CARGO) was not found: install it from https://rustup.rs, then open a new shell" >&2; exit 1; }
	@$(CARGO) --version | awk '{split($$2, v, "."); exit !(v[1] > 1 || v[2] >= 89)}' || { echo "moekern needs Rust >= 1.89, and this is $$($(CARGO) --version): run rustup update, or install a newer one from https://rustup.rs" >&2; exit 1; }
	@command -v cc >/dev/null || { echo "Rust needs a C linker, and cc was not found: install gcc or clang, on Debian and Ubuntu with: apt-get install build-essential" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --only-binary :all: uv || echo "uv has no wheel for this machine: going on with pip"
	$(call install,-q 'maturin>=1.9.4$(comma)<2')
	@touch $@

$(INSTALLED): $(MADE) $(SOURCES)
	@$(MAKE) --no-print-directory wheel
	@$(BIN)/python -m pip uninstall -y -q moekern 2>/dev/null || true
	$(call install,"moekern[$(EXTRAS)] @ file://$$(echo $(CURDIR)/dist/moekern-*.whl)")
	@touch $@

$(SITE): $(MADE) pyproject.toml
	$(call install,-q --group docs)
	@touch $@

$(LINTERS): $(MADE) pyproject.toml
	$(call install,--group dev)
	@touch $@
