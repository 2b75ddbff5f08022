# Everything a fresh Debian 12 needs, and what one does with the project.
#   make venv               .venv with the project (editable), its C extension and all tools
#   make demo [TREE=dir]    import a tree, serve it to a virtual machine, compare every file
#   make format             put Python code into its form, and correct what ruff can correct
#   make lint               formatter, linters, types, layers, generated code, warnings of the C compiler
#   make check [ARGS=...]   the same and all quick tests, without a guest: within two minutes
#   make test [ARGS=...]    linters, unit tests, tests in virtual machines; ARGS go to pytest
#   make bench              measurements against other virtiofs servers, and plain gRPC; with
#                           BEFORE=dir, of walks and imports against another checkout too
#   make protos             regenerate the protobuf code
#   make clean              remove what make has made, downloads included
# Debian packages are installed when make runs as root; otherwise what is missing is listed.

PYTHON ?= python3
BIN := .venv/bin
INSTALLED := .venv/.installed
WRAPPERS := cffi_build/_bench.c cffi_build/_engine.c cffi_build/_fastcdc.c cffi_build/_images.c cffi_build/_reader.c
# a process for each CPU, but no more guests than memory is for
PARALLEL := -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder
BUILD_INPUTS := pyproject.toml $(filter-out $(WRAPPERS),$(wildcard cffi_build/*.[ch] cffi_build/*.py))

.PHONY: venv demo format lint check test bench protos clean packages-venv packages-demo packages-test
.DELETE_ON_ERROR:

venv: packages-venv $(INSTALLED)

packages-venv packages-demo packages-test: packages-%:
	@setup/packages.sh $*

# the interpreter is looked at after the packages, which may bring it
$(INSTALLED): $(BUILD_INPUTS) setup/venv.sh | packages-venv
	@setup/venv.sh $(PYTHON) .venv
	@touch $@

demo: packages-demo $(INSTALLED)
	@PYTHONPATH=vm-tests $(BIN)/python -m vmharness.demo $(if $(TREE),"$(TREE)")

format: $(INSTALLED)
	$(BIN)/ruff check --fix --exit-zero --quiet
	$(BIN)/ruff format

lint: $(INSTALLED)
	$(BIN)/python -m pytest -m lint tests/test_linters.py tests/test_generated.py tests/test_c_build.py

check: packages-test $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) -m 'lint or not (slow or vm)' $(ARGS)

test: packages-test $(INSTALLED)
	$(BIN)/python -m pytest $(PARALLEL) $(ARGS)

# all of them, whatever the first ones find
bench: packages-test $(INSTALLED)
	@status=0; \
	$(BIN)/python vm-tests/bench.py $(ARGS) || status=1; \
	$(BIN)/python -m tests.bench_walk $(if $(BEFORE),--before "$(BEFORE)") || status=1; \
	PYTHONPATH=vm-tests $(BIN)/python -m tests.bench_back_ends || status=1; \
	$(BIN)/python -m tests.bench_neighbour || status=1; \
	$(BIN)/python -m tests.mount.bench || status=1; \
	$(BIN)/python -m tests.bench_rpc || status=1; \
	$(BIN)/python -m tests.remote.bench || status=1; \
	exit $$status

protos: $(INSTALLED)
	setup/protos.sh .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f $(WRAPPERS) appliance/_*.so
	find appliance tests vm-tests cffi_build -name __pycache__ -type d -prune -exec rm -rf {} +
