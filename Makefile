# The two commands of a newcomer, each of which makes .venv when it is missing:
#   make demo    search a plan for the small model of this repository on this machine, compare it and the named methods with dense, write demo/report/report.html
#   make test    lint, types and tests
#   make hosts   whether each family works with the oldest diffusers that is supported and with the newest that there is
# Another interpreter or another build of torch (.venv is then brought up to date):
#   make test PYTHON=python3.12
#   make test TORCH="torch==2.12.0"

PYTHON ?= python3
TORCH ?= torch==2.13.0
PY := .venv/bin/python
# One stamp for each TORCH, written last: an interrupted installation is taken up again by the next `make`.
STAMP := .venv/installed-$(shell printf '%s' '$(TORCH)' | cksum | cut -d' ' -f1)
WORKERS := -n logical --maxprocesses 4
PIP := $(PY) -m pip --disable-pip-version-check
EDITABLE := --no-build-isolation --config-settings editable_mode=strict -e

.PHONY: demo test lint types pytest interpreter hosts install format clean
.DEFAULT_GOAL := test

demo: install
	$(PY) -m diffusers_accel.evals.demo --out demo

test: lint types pytest interpreter

lint: install
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

# From outside the root, where kernels/, search/ and evals/ would be found a second time under their bare names.
types: install
	cd .venv && bin/python -m mypy --config-file ../pyproject.toml --cache-dir ../.mypy_cache -p diffusers_accel

# Several processes of one thread each: tests are small, and two threads that wait for a busy core are slower than one.
pytest: install
	OMP_NUM_THREADS=1 $(PY) -m pytest -m 'not interpreter' $(WORKERS)

# Triton reads TRITON_INTERPRET when it is imported, so these tests have a process of their own.
interpreter: install
	@if $(PY) -c 'import triton' 2>/dev/null; then set -x; OMP_NUM_THREADS=1 TRITON_INTERPRET=1 $(PY) -m pytest tests/kernels -m interpreter $(WORKERS); \
	else echo "interpreter: not run, Triton is not installed (it has no build for $$(uname -sm))"; fi

# Where the host's seam moves, this is where it shows: layers, steps, branches and dense frames of every family.
OLDEST := diffusers==0.42.0
HOSTS ?= $(OLDEST) diffusers
hosts: install
	set -e; for host in $(HOSTS); do rm -rf build/host; $(PIP) install --quiet --no-deps --target build/host $$host; \
	PYTHONPATH=$(CURDIR)/build/host $(PY) -c 'import diffusers as d; assert "build/host" in d.__file__, d.__file__; print("hosts: diffusers", d.__version__)'; \
	PYTHONPATH=$(CURDIR)/build/host OMP_NUM_THREADS=1 $(PY) -m pytest tests/families/test_every_family.py -k 'knows_step or stock_pipeline' $(WORKERS); done

format: install
	$(PY) -m ruff check --fix .
	$(PY) -m ruff format .

# Again at each run: a strict installation shows only the files that were there when it was made.
install: $(STAMP)
	@$(PIP) install --quiet --no-deps $(EDITABLE) .

$(STAMP): constraints.txt pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed, %s is %s: make PYTHON=python3.12 ..." % (sys.executable, sys.version.split()[0]))'
	@$(PY) -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv --clear .venv
	@rm -f .venv/installed-*
	$(PIP) install --constraint constraints.txt 'setuptools>=77'
	$(PIP) install --constraint constraints.txt $(TORCH)
	$(PIP) install --constraint constraints.txt $(EDITABLE) '.[dev]'
	@# torch's CUDA build brings (and demands) its own Triton, its CPU build none.
	@$(PY) -c 'import triton' 2>/dev/null || [ "$$(uname -s)" != Linux ] || $(PIP) install triton==3.6.0
	@touch $@

clean:
	rm -rf .venv build demo .mypy_cache .pytest_cache .ruff_cache
