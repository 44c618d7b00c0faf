# `make help` lists what there is. Everything runs in a virtual environment inside the repository.

VENV ?= .venv
# The interpreter that makes the environment. Unset: the one that the environment already has, else python3.
PYTHON ?=
# What JAX should run on: empty for the CPU, or tpu, cuda12, cuda13.
ACCELERATOR ?=
PYTEST_ARGS ?=
# Of accelerator-check: --small, --only PART...
CHECK_ARGS ?=

PY = $(VENV)/bin/python
# Huge pages make memory-bound operations faster on Linux CPUs; other systems ignore the variable.
FAST_MALLOC = GLIBC_TUNABLES=glibc.malloc.hugetlb=1

.DEFAULT_GOAL := help
.PHONY: help venv test-venv pretrain accelerator-check test test-subset soak lint clean

help:  ## This list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-18s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))
	@echo "  Variables: PYTHON=python3.12  VENV=.venv-3.12  ACCELERATOR=tpu|cuda12|cuda13  PYTEST_ARGS='-k name'"

# install(stamp, requirement files, download size, packages, file installed with --no-deps, file installed so aside):
# brings $(VENV) in line with the files, or does nothing.
# The stamp holds the interpreter's version and a hash of the files, not a date, so that a fresh checkout or a touched
# file changes nothing and another interpreter or an edited pin does. It is removed first and written last: what was
# interrupted is done again. The environment is made anew only if its interpreter is another one or does not run, and
# only if the folder is an environment at all.
define install
	@set -eu; \
	python="$(PYTHON)"; \
	if [ -z "$$python" ]; then \
	  if $(PY) -m pip --version >/dev/null 2>&1; then python=$(PY); else python=python3; fi; \
	fi; \
	version=$$($$python -c 'import platform; print(platform.python_version())') || \
	  { echo "PYTHON=$$python does not run." >&2; exit 1; }; \
	case $$version in \
	  3.11.*) pins=constraints-3.11.txt ;; \
	  3.1[2-9].*|3.[2-9][0-9].*) pins=constraints-3.12.txt ;; \
	  *) echo "Python 3.11 or newer is needed, '$$python' is $$version. Name another: make $@ PYTHON=python3.12" >&2; exit 1 ;; \
	esac; \
	key=$$($$python -c 'import hashlib, sys; print(hashlib.sha256(b"".join(open(f, "rb").read() for f in sys.argv[1:])).hexdigest())' $(2) $(5) $(6) $$pins); \
	key="$$version $$key $(4)"; \
	stamp=$(VENV)/$(1); \
	if [ "$$key" = "$$(cat $$stamp 2>/dev/null)" ] && $(PY) -c '' 2>/dev/null; then exit 0; fi; \
	if [ "$$($(PY) -c 'import pip, platform; print(platform.python_version())' 2>/dev/null)" != "$$version" ]; then \
	  if [ -d $(VENV) ] && [ -n "$$(ls -A $(VENV))" ] && [ ! -e $(VENV)/pyvenv.cfg ]; then \
	    echo "$(VENV) is a folder that is not a virtual environment: choose another VENV=" >&2; exit 1; \
	  fi; \
	  $$python -m venv --clear $(VENV); \
	fi; \
	rm -f $$stamp; \
	echo "Installing $(2) into $(VENV) (Python $$version; $(3))"; \
	$(PY) -m pip install -qq --disable-pip-version-check $(foreach file,$(2),-r $(file)) $(if $(4),"$(4)") -c $$pins; \
	$(if $(5),$(PY) -m pip install -qq --disable-pip-version-check --no-deps -r $(5);) \
	$(if $(6),$(PY) -m pip install -qq --disable-pip-version-check --no-deps --upgrade --target $(VENV)/aside -r $(6);) \
	echo "$$key" > $$stamp
endef

venv:  ## The environment that training needs
	$(call install,.stamp-run,requirements.txt,the first time this downloads about 350 MB and takes 1.4 GB on disk,$(if $(ACCELERATOR),jax[$(ACCELERATOR)]))

test-venv: venv  ## The same with what the tests need
	$(call install,.stamp-test,requirements.txt requirements-test.txt,the first time this downloads up to 250 MB more (mostly torch),,requirements-oracles.txt,requirements-aside.txt)

pretrain: venv  ## Pre-train a small model on the demo corpus, from raw audio to a report in work/demo
	$(FAST_MALLOC) $(PY) -m experiments recipe demo --workdir work/demo

accelerator-check: venv  ## Everything that a GPU or TPU at hand can show, into work/accelerator (CHECK_ARGS=--small: on any CPU)
	PYTHONPATH=. $(FAST_MALLOC) $(PY) benchmarks/accelerator_check.py --out work/accelerator $(CHECK_ARGS)

test: lint  ## Ruff and every test but the long ones (those that compare with torch: on Python 3.11 only)
	@if $(PY) -c 'import sys; sys.exit(sys.version_info >= (3, 12))'; then marks="not soak"; else \
	  marks="not torch and not soak"; echo "Not Python 3.11: the tests that compare with torch are left out"; fi; \
	echo "pytest -m '$$marks'"; $(PY) -m pytest -n 2 --dist loadfile -m "$$marks" $(PYTEST_ARGS)

test-subset: test-venv  ## The tests that do without torch, less the heaviest (any interpreter)
	$(PY) -m pytest -n 2 --dist loadfile -m "not torch and not soak and not once" $(PYTEST_ARGS)

soak: test-venv  ## The long tests; some also need libtpu (ACCELERATOR=tpu), an environment .venv-3.12, or root that may mount
	$(FAST_MALLOC) $(PY) -m pytest -m soak $(PYTEST_ARGS)

lint: test-venv  ## Ruff
	$(PY) -m ruff check .

clean:  ## Remove caches; environments and work/ stay
	rm -rf .pytest_cache .ruff_cache .hypothesis .jax_cache build dist *.egg-info
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
