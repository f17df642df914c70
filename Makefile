# make demo: set up, generate digits, show the speed table.  make test: everything but slow tests.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# the oldest Triton that the kernels are compiled with, beside the one that is installed
OLDEST_TRITON := $(VENV)/triton-3.6.0
SOURCES := setup.py pyproject.toml constraints.txt $(wildcard csrc/*)

.PHONY: setup demo test test-all lint types bench gpu gpu-contract gpu-tune clean

setup: $(STAMP)

$(STAMP): $(SOURCES)
	$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, got " + sys.version.split()[0] if sys.version_info < (3, 11) else 0)'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(STAMP)

# only wheels for Linux exist; elsewhere the test that wants it is skipped
$(OLDEST_TRITON): | $(STAMP)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --target $@.part triton==3.6.0 \
		&& mv $@.part $@ || rm -rf $@.part

demo: setup
	$(BIN)/maskgit generate --classes 0-9 --per-class 5 --steps 8 --seed 0 --out demo.png --strip demo_steps.png
	$(BIN)/maskgit bench decode-step --shape 64x126464 --dtype float32 --mode greedy draw --backend cpp --samples 3 --seconds 1 --no-memory

test: setup $(OLDEST_TRITON) lint types
	$(BIN)/python -m pytest -n 2

test-all: setup $(OLDEST_TRITON) lint types
	$(BIN)/python -m pytest -n 2 --all

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# mypy cannot follow the folder map of setup.py, so it reads a copy that is laid out as installed
types: setup
	rm -rf build/types && mkdir -p build/types/maskgit
	cp -r maskgit/. build/types/maskgit && cp -r kernels/. build/types/maskgit/kernels
	cp -r benchmarks/. build/types/maskgit/benchmarks
	cd build/types && ../../$(BIN)/mypy --config-file ../../pyproject.toml -p maskgit

bench: setup
	$(BIN)/python -m pytest benchmarks --benchmark-enable --benchmark-only

# on a machine with an NVIDIA GPU, torch, triton and pytest; needs no setup
gpu:
	$(PYTHON) benchmarks/gpu/main.py

gpu-contract:
	$(PYTHON) benchmarks/gpu/main.py --only contract

# the same machine: tile sizes for it, into kernels/*/tuned
gpu-tune:
	$(PYTHON) benchmarks/gpu/main.py --only tune-attention tune-step tune-head

clean:
	rm -rf build $(VENV) .pytest_cache .mypy_cache .ruff_cache *.egg-info maskgit/*.so
