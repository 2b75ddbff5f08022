# Everything a fresh Debian 12 needs, and what one does with the project.
#   make venv               .venv with the project (editable), its C extension and all tools
#   make demo [TREE=dir]    import a tree, serve it to a virtual machine, compare every file
#   make format             put Python code into its form, and correct what ruff can correct
#   make lint               formatter, linters, types, layers, generated code, warnings of the C compiler
#   make check [ARGS=...]   the same and all quick tests, without a guest: within two minutes
#   make test [ARGS=...]    linters, unit tests, tests in virtual machines; ARGS go to pytest
#   make bench              measurements against other virtiofs servers, and plain gRPC, which go into
#                           the tables of README.md; with BEFORE=dir, of walks and imports against
#                           another checkout too
#   make debian-root        a guest that boots Debian's own init from an imported tree
#   make debian-profile     the same over a slow link, with a profile and without one
#   make deb                a package for Debian, in build/deb
#   make test-deb           the same, installed, upgraded and removed in a new Debian 12 that boots
#                           with systemd; needs root, debootstrap and a Debian mirror
#   make docs               the documents as a book of pages, in build/book
#   make wheel              a wheel for manylinux, in build/wheel
#   make container          an OCI image of share/container/Containerfile, in build/container; needs root
#                           and a Debian mirror, and no daemon and no registry
#   make test-container     the same, run
#   make long-cut           the tests of links between hosts, with a link that is cut for a minute
#   make device-again       a device that QEMU removes and adds again 20 times, with a newer QEMU, too
#   make migrate            guests that read move between two QEMUs and two supervisors, 20 times back
#                           and forth, and are saved and loaded; downloads a newer QEMU
#   make libvirt-saved      domains of a newer libvirt that are saved, restored, moved and changed
#                           while they run; downloads that libvirt
#   make storm              guests whose supervisor is killed 100 times while they read, and 1,000
#                           kills of session processes and workers at random
#   make kill-publishers    an import into an object store that is killed at 200 moments
#   make other-s3           the tests of S3, with a second server
#   make fuzz [SECONDS=600] [SEED=n]   all fuzzers: of the C code, of FUSE requests, of vhost-user messages
#   make soak-gc            random histories of a store with garbage collection, and kills of its
#                           processes, for more than an hour
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

.PHONY: venv demo format lint check test bench debian-root deb test-deb long-cut device-again migrate libvirt-saved storm kill-publishers other-s3 fuzz soak-gc protos clean packages-venv packages-demo packages-test packages-system
.PHONY: docs wheel container test-container
.DELETE_ON_ERROR:

venv: packages-venv $(INSTALLED)

packages-venv packages-demo packages-test packages-system: packages-%:
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

# The first run is the whole suite, in which plain requests are answered in C. The second run has the
# Python handler answer every request, which is the reference; it takes the tests that have a worker
# answer: those of workers, of supervisors and mounts around them, of remote stores, and of guests
# that boot quickly. All others cannot differ (to a worker, an object store is a service as any other),
# and tests/worker/test_twin.py compares both anyway.
ANSWERED := tests/worker tests/supervisor tests/mount tests/fs tests/conformance \
	$(filter-out tests/remote/test_object% %_kills.py,$(wildcard tests/remote/test_*.py)) \
	vm-tests/test_guest_messages.py vm-tests/test_guest_tree.py

test: packages-test $(INSTALLED)
	APPLIANCE_ANSWERS=c setup/run_tests.sh $(BIN)/python $(PARALLEL) $(ARGS)
	APPLIANCE_ANSWERS=python setup/run_tests.sh $(BIN)/python $(PARALLEL) $(ARGS) $(ANSWERED)

# All of them, whatever the first ones find. Where the project is installed, programs compile nothing
# when they start.
bench: packages-test $(INSTALLED)
	@$(BIN)/python -m compileall -q appliance; status=0; rm -rf build/bench; \
	$(BIN)/python vm-tests/bench.py $(ARGS) || status=1; \
	$(BIN)/python -m tests.bench_walk $(if $(BEFORE),--before "$(BEFORE)") || status=1; \
	PYTHONPATH=vm-tests $(BIN)/python -m tests.bench_back_ends || status=1; \
	PYTHONPATH=vm-tests $(BIN)/python -m tests.bench_queues || status=1; \
	$(BIN)/python -m tests.bench_neighbour || status=1; \
	$(BIN)/python -m tests.bench_memory || status=1; \
	$(BIN)/python -m tests.bench_metrics || status=1; \
	$(BIN)/python -m tests.mount.bench || status=1; \
	$(BIN)/python -m tests.bench_rpc || status=1; \
	$(BIN)/python -m tests.bench_nix || status=1; \
	$(BIN)/python -m tests.collector.bench_collection || status=1; \
	$(BIN)/python -m tests.remote.bench || status=1; \
	$(BIN)/python -m tests.remote.bench_objects || status=1; \
	$(BIN)/python -m tools.bench_table || status=1; \
	exit $$status

debian-root: packages-test $(INSTALLED)
	$(BIN)/python -m pytest vm-tests/debian_root.py $(ARGS)

# its name keeps it out of `make test`, as it takes minutes
.PHONY: debian-profile
debian-profile: packages-test $(INSTALLED)
	$(BIN)/python -m pytest vm-tests/debian_profile.py -s $(ARGS)

deb: $(INSTALLED)
	@$(BIN)/python -m tools.debian_package build/deb

# its name keeps it out of `make test`, as it takes minutes
test-deb: packages-system $(INSTALLED)
	$(BIN)/python -m pytest -o faulthandler_timeout=0 vm-tests/debian_system.py $(ARGS)

docs: packages-test $(INSTALLED)
	@$(BIN)/python -m tools.book build/book

wheel: $(INSTALLED)
	@$(BIN)/python -m tools.manylinux_wheel build/wheel

container: packages-system $(INSTALLED)
	@$(BIN)/python -m tools.container_image build/container

# its name keeps it out of `make test`, as it takes minutes
test-container: packages-system $(INSTALLED)
	$(BIN)/python -m pytest -o faulthandler_timeout=0 vm-tests/container.py $(ARGS)

long-cut: packages-test $(INSTALLED)
	TEST_CUT_S=60 $(BIN)/python -m pytest tests/remote/test_links.py tests/remote/test_object_hosts.py $(ARGS)

device-again: packages-test $(INSTALLED)
	TEST_DEVICE_ROUNDS=20 $(BIN)/python -m pytest vm-tests/test_guest_device_again.py $(ARGS)

# its name keeps it out of `make test`, as it takes minutes
migrate: packages-test $(INSTALLED)
	$(BIN)/python -m pytest vm-tests/migration.py $(ARGS)

# the same
libvirt-saved: packages-test $(INSTALLED)
	$(BIN)/python -m pytest vm-tests/libvirt_saved.py $(ARGS)

storm: packages-test $(INSTALLED)
	TEST_SUPERVISOR_KILLS=100 $(BIN)/python -m pytest vm-tests/test_guest_crash.py -k again_and_again $(ARGS)
	TEST_RANDOM_KILLS=1000 $(BIN)/python -m pytest tests/supervisor/test_storm.py $(ARGS)

kill-publishers: packages-test $(INSTALLED)
	TEST_PUBLISHER_KILLS=200 $(BIN)/python -m pytest tests/remote/test_publisher_kills.py $(ARGS)

# what is tested with moto's server, with another one; go(1) builds that in minutes
S3_GATEWAY := build/tools/versitygw

$(S3_GATEWAY): setup/s3_gateway.sh
	setup/s3_gateway.sh $@

other-s3: packages-test $(INSTALLED) $(S3_GATEWAY)
	TEST_S3_GATEWAY=$(CURDIR)/$(S3_GATEWAY) $(BIN)/python -m pytest tests/contracts tests/remote/test_object_stores.py \
	  tests/remote/test_publisher_kills.py tests/copier/test_store_copy.py $(ARGS)

# prints the seed of each round, and at the end which lines of C all rounds together have reached
fuzz: packages-test $(INSTALLED)
	$(BIN)/python -m tests.fuzz --seconds $(or $(SECONDS),600) $(if $(SEED),--seed $(SEED))

soak-gc: packages-test $(INSTALLED)
	APPLIANCE_SOAK_EXAMPLES=2000 APPLIANCE_SOAK_ROUNDS=300 $(BIN)/python -m pytest \
	  tests/collector/test_collection_model.py tests/collector/test_killed_processes.py $(ARGS)

protos: $(INSTALLED)
	setup/protos.sh .

clean:
	rm -rf .venv build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	rm -f $(WRAPPERS) appliance/_*.so
	find appliance tests vm-tests cffi_build -name __pycache__ -type d -prune -exec rm -rf {} +
