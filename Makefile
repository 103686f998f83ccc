# Two commands from a bare checkout: `make demo` and `make test`. python3 with venv and pip is all they need.
PYTHON ?= python3
VENV ?= .venv
# Test processes; each with one thread, which is faster than threads on small tensors.
JOBS ?= 2
BIN := $(VENV)/bin
PACKAGES := contrastive memory_bank eval configs
CODE := $(PACKAGES) tests benchmarks scripts

.PHONY: help demo test test-faults check versions quick gpu-table clean
.DEFAULT_GOAL := help

help:
	@echo "make demo   install, pretrain on handwritten digits, probe, write a report (minutes, no GPU)"
	@echo "make test   install with the test extras, run every check"
	@echo "make test-faults  kill, damage and starve runs for some minutes (the README's fault table)"
	@echo "make check  every check, without the install"
	@echo "make quick  a tiny run, to see that things work after a change"
	@echo "make gpu-table    measure on a GPU what is missing in the README (SLICE=SECONDS DATA=CIFAR-10)"
	@echo "make clean  remove the virtual environment and the caches"

# The stamp holds the extras asked for; a changed setup.cfg installs again.
$(VENV)/.installed: setup.cfg pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "installing PyTorch and the rest into $(VENV): 6 GB, some minutes"
	$(BIN)/python -m pip install --disable-pip-version-check --editable .
	touch $@

$(VENV)/.installed-test: $(VENV)/.installed
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable '.[test]'
	touch $@

# Ctrl-C also ends make; it would first call the exit code of a command that has saved its work an error.
define interruptible
	@echo '$(1)'
	@trap 'interrupted=1' INT; $(1) || { code=$$?; test "$$interrupted" || exit $$code; }
endef

demo: $(VENV)/.installed
	$(call interruptible,$(BIN)/python -m contrastive run.name=demo)
	$(call interruptible,$(BIN)/python -m eval worth checkpoint=runs/demo)
	$(call interruptible,$(BIN)/python -m eval report runs/demo)
	@echo
	@echo "report:  runs/demo/report.html   (open it in a browser)"
	@echo "encoder: runs/demo/encoder.safetensors"
	@echo "metrics: runs/demo/metrics.csv, scores: runs/demo/eval/"
	@echo "go on:   . $(BIN)/activate   (then contrastive-pretrain and the README's other commands)"

test: $(VENV)/.installed-test
	$(MAKE) check

test-faults: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults tests/faults

check: versions
	$(BIN)/ruff format --check $(CODE)
	$(BIN)/ruff check $(CODE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(JOBS) --dist worksteal --durations=25

versions:
	@$(BIN)/python scripts/versions.py

quick: $(VENV)/.installed
	$(BIN)/python -m contrastive run.name=quick schedule.epochs=2 schedule.warmup_epochs=1 run.resume=auto

# Without the installation: a machine with a GPU may have a Python of its own, and no network.
gpu-table:
	$(if $(wildcard $(BIN)/python),$(BIN)/python,$(PYTHON)) benchmarks/gpu_table.py \
		$(if $(SLICE),--slice $(SLICE)) $(if $(DATA),--data $(DATA))

clean:
	rm -rf $(VENV) .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
