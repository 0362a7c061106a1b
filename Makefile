# Every target first makes its environment, .venv, if it is missing or older than the requirements.
#
#   make demo                 teacher, plain student and distilled student on the digits set, with one table at the end
#   make test                 the tests; ARGS="-k ssim" passes options on, here and below
#   make lint                 ruff, mypy and import-linter
#   make docs                 the documentation site, in site/; ARGS="--site-dir FOLDER" puts it elsewhere
#   make faults               the tests that kill processes and break files
#   make bench, bench-gpu     the benchmarks, on the CPU and on a GPU
#   make setup, clean         only the environment; remove it and the caches
#
#   PYTHON=python3.11         the interpreter to make the environment with; otherwise the first of 3.10-3.12 on the path
#   VENV=folder               the environment to use, made if missing
#   VENV=none                 no environment: run on PYTHON (python3) with what is installed there, needs no network

VENV ?= .venv
ARGS ?=

REQUIREMENTS := requirements.txt requirements-dev.txt setup.cfg \
	$(wildcard third_party/detectron2/*.py) third_party/detectron2/pyproject.toml

ifeq ($(VENV),none)
PYTHON ?= python3
RUN := PYTHONPATH="$(CURDIR)$${PYTHONPATH:+:$$PYTHONPATH}" $(PYTHON)
READY :=
else
RUN := $(VENV)/bin/python
READY := $(VENV)/.ssim_kd-ready
endif

.PHONY: help setup demo test lint docs faults bench bench-gpu clean

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

setup: $(READY)

demo: $(READY)
	$(RUN) tools/demo.py $(ARGS)

test: $(READY)
	$(RUN) -m pytest -m "not faults" -n 2 --dist loadfile $(ARGS)

faults: $(READY)
	$(RUN) -m pytest -m faults -n 2 $(ARGS)

lint: $(READY)
	$(RUN) -m ruff check .
	$(RUN) -m ruff format --check .
	$(RUN) -m mypy
	$(RUN) -c "from importlinter.cli import lint_imports_command as lint; lint()"

# Warnings are errors. The variable silences what mkdocs-material prints of its own future.
docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(RUN) -m mkdocs build --strict --quiet $(ARGS)
	@echo "Open site/index.html. Its search needs a server: python3 -m http.server -d site"

bench: $(READY)
	$(RUN) tools/benchmark_losses.py --device cpu $(ARGS)
	$(RUN) tools/benchmark_step.py --device cpu $(ARGS)
	$(RUN) tools/benchmark_teacher.py --device cpu $(ARGS)

bench-gpu: $(READY)
	$(RUN) tools/benchmark_losses.py --device cuda $(ARGS)
	$(RUN) tools/benchmark_step.py --device cuda $(ARGS)
	$(RUN) tools/benchmark_teacher.py --device cuda $(ARGS)

# Results (output/, datasets/) stay.
clean:
	rm -rf .venv build site .import_linter_cache .pytest_cache .mypy_cache .ruff_cache .hypothesis ssim_kd.egg-info
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

ifneq ($(VENV),none)
# Prints the checkout that an environment imports ssim_kd from, if it is not this one.
OTHER := import importlib.util as u, os; s = u.find_spec("ssim_kd"); \
	f = os.path.realpath(os.path.dirname(s.origin) + "/..") if s else ""; \
	print(f if f not in ("", os.path.realpath(".")) and "-packages" not in f else "")
# The file .ssim_kd-begun marks an environment of ours while pip works in it. Where it is found, an earlier set-up was cut short,
# and the folder is made anew: pip can take a half-unpacked package for an installed one. A folder without that mark is
# never removed.
$(READY): $(REQUIREMENTS)
	@set -e; \
	if [ -e "$(VENV)/.ssim_kd-begun" ]; then \
		echo "The last set-up of $(VENV) was cut short: making it anew."; rm -rf "$(VENV)"; \
	fi; \
	if [ ! -x "$(VENV)/bin/python" ]; then \
		if [ -e "$(VENV)" ] && [ -n "$$(ls -A "$(VENV)")" ]; then \
			echo "VENV=$(VENV) is neither a virtual environment nor an empty folder." >&2; exit 1; \
		fi; \
		fits='import sys, venv, ensurepip; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 12))'; \
		found=; \
		for python in $(or $(PYTHON),python3 python3.12 python3.11 python3.10 python); do \
			if "$$python" -c "$$fits" >/dev/null 2>&1; then found=$$python; break; fi; \
		done; \
		if [ -z "$$found" ]; then \
			echo "No usable Python: $(or $(PYTHON),python3 (3.12, 3.11, 3.10) on the path) is missing, not 3.10-3.12, or lacks" \
				"venv (Debian: apt install python3-venv). Name one with: make PYTHON=/path/to/python3.11" >&2; exit 1; \
		fi; \
		echo "Setting up $(VENV) with $$("$$found" --version). This downloads PyTorch: some gigabytes, once."; \
		mkdir -p "$(VENV)"; touch "$(VENV)/.ssim_kd-begun"; \
		"$$found" -m venv "$(VENV)"; \
	elif other=$$("$(VENV)/bin/python" -I -c '$(OTHER)'); [ -n "$$other" ]; then \
		echo "VENV=$(VENV) is the environment of the checkout $$other, and stays as it is." \
			"Name another folder, for example VENV=.venv." >&2; exit 1; \
	elif [ -e "$@" ]; then \
		echo "The requirements have changed: updating $(VENV)."; touch "$(VENV)/.ssim_kd-begun"; \
	fi; \
	"$(VENV)/bin/python" -m pip install --disable-pip-version-check -r requirements-dev.txt; \
	touch "$@"; rm -f "$(VENV)/.ssim_kd-begun"
endif
