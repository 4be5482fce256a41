# All targets use .venv, which is created if it is missing. Stamps in .venv record the installations, so that a target
# installs and compiles again only after a source has changed.

PYTHON ?= python3
ifeq ($(CUDA),pip)
# NVIDIA's compiler from PyPI, in a separate environment, without a CUDA toolkit of the machine.
VENV := .venv-cuda-pip
export FUSED_TRICKS_CUDA := 1
export CUDA_HOME = $(shell $(IN_VENV) -c "import sysconfig; print(sysconfig.get_path('platlib'))" 2>/dev/null)/nvidia/cu13
BUILD_GROUPS := --group build --group cuda
else
VENV := .venv
BUILD_GROUPS := --group build
endif
IN_VENV := $(VENV)/bin/python
STAMPS := $(VENV)/stamps
NATIVE := $(shell find csrc -type f)
CORE := $(wildcard csrc/core/*.h)
CORE_NAMES := $(subst $() ,|,$(notdir $(CORE)))
NATIVE_FORMATTED := $(shell find csrc tests -name '*.h' -o -name '*.cpp' -o -name '*.cu' -o -name '*.cuh')

# Without the extension the tests would pass on the slow backends only, so a failed build is an error.
export FUSED_TRICKS_REQUIRE_EXTENSION ?= 1

# Small tests run fastest in processes of one thread. A test of threads sets its own number.
TEST_PROCESSES ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=
# The time limit of the GPU report in seconds.
LIMIT ?= 530
GPU_REPORT_ARGS ?=
# The commit that sass-diff compares with the working tree.
BASE ?= HEAD
# The releases of torch for test-torches: the oldest supported one, a common one, and the newest.
TORCHES ?= 2.10.0 2.11.0 2.14.1
# For the wheels: the interpreters, by default one of each supported release, and releases of torch for CUDA 12 and 13.
PYTHONS ?=
SMOKE_TORCHES ?= 2.10.0 2.14.1
CHECK_ARGS ?=

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help build test test-fast test-gpu test-triton fuzz sanitize test-torches bench gpu-report sass-diff \
	wheels wheels-manylinux check-wheels smoke-wheels docs lint format clean FORCE

help:
	@echo "make build    install into $(VENV) in editable mode, with the compiled extension"
	@echo "make test     run the tests; PYTEST_ARGS='-k overflow' selects some"
	@echo "make test-fast  run the quick tests: no training, no other processes, no interpreted kernels"
	@echo "make test-gpu   run the tests that require a GPU; without a GPU they are skipped"
	@echo "make test-triton  run every instance of the tests of the Triton backend; make test runs a choice"
	@echo "make fuzz     compare every backend with the reference on random histories, for SECONDS=60"
	@echo "make sanitize run tests of the extension and the emulated kernels under AddressSanitizer,"
	@echo "              UndefinedBehaviorSanitizer and ThreadSanitizer"
	@echo "make test-torches  run all tests with one wheel and several releases of torch: TORCHES='$(TORCHES)'"
	@echo "make bench    measure training and the step against torch.amp; results go to build/benchmarks."
	@echo "              BENCH_ARGS goes to the training, and BENCH_ARGS=--help lists its options"
	@echo "make gpu-report  build, test, time and profile on this machine's GPU within LIMIT=$(LIMIT) seconds, with"
	@echo "              $(PYTHON) and without any installation; GPU_REPORT_ARGS=--help lists options"
	@echo "make sass-diff BASE=HEAD~1  compare the machine code of the CUDA kernels before and after a change, for each"
	@echo "              architecture; without BASE, the change since the last commit. Requires nvcc"
	@echo "make wheels   build dist/: a wheel for each CPython 3.10 to 3.14 here, with kernels for sm_75 to sm_120 and no"
	@echo "              requirement but torch and a driver for the CUDA release of nvcc (12.x: 525, 13.x: 580); a wheel"
	@echo "              without compiled code; the sources. PYTHONS='python3.11 ...' selects interpreters"
	@echo "make wheels-manylinux  the same with CUDA 12.9 and in the container manylinux_2_28, which requires Docker"
	@echo "make check-wheels  check the files in dist/: tags, sizes, contents, metadata"
	@echo "make smoke-wheels  install each wheel in new environments, and run tests/smoke: SMOKE_TORCHES='$(SMOKE_TORCHES)'"
	@echo "make docs     write the site to build/site; a broken link or anchor is an error; no build required"
	@echo "make lint     check with ruff, mypy and clang-format, and check the includes of csrc/core; no build required"
	@echo "make format   format the files with ruff and clang-format"
	@echo "make clean    remove build products; $(VENV) stays"
	@echo
	@echo "CUDA=pip uses .venv-cuda-pip, with NVIDIA's compiler from PyPI and without a CUDA toolkit of the machine."
	@echo "PYTHON=python3.12 selects the Python of a new $(VENV). setup.py lists the variables of the build."

build: $(STAMPS)/build
	$(IN_VENV) -m fused_tricks

test: $(STAMPS)/build $(STAMPS)/test
	OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} $(IN_VENV) -m pytest -n $(TEST_PROCESSES) -rs $(PYTEST_ARGS)

SECONDS ?= 60
# For the inner loop: excludes slow tests.
test-fast: PYTEST_ARGS += -m "not (slow or integration or gpu)"
test-fast: test

test-gpu: PYTEST_ARGS += -m gpu
test-gpu: test

test-triton: PYTEST_ARGS += --backend triton -k triton
test-triton: test

fuzz: $(STAMPS)/build $(STAMPS)/test
	cd tests && PYTHONPATH=.:.. ../$(IN_VENV) -m fuzz --seconds $(SECONDS)

sanitize: $(STAMPS)/build $(STAMPS)/test
	$(IN_VENV) tests/support/sanitizers address
	$(IN_VENV) tests/support/sanitizers thread

test-torches: $(TORCHES:%=test-torch-%)

# Tests run in a clone with the uncommitted changes of tracked files, and with the wheel in place of the package.
test-torch-%: build/wheel
	test -x .venv-torch-$*/bin/python || $(PYTHON) -m venv .venv-torch-$*
	.venv-torch-$*/bin/python -m pip install --quiet "torch==$*" "setuptools>=77,<82" "$$(echo build/wheel/*.whl)[test]"
	.venv-torch-$*/bin/python -m pip install --quiet "$$(.venv-torch-$*/bin/python -c '$(NUMPY)')"
	.venv-torch-$*/bin/python -m pip install --quiet --force-reinstall --no-deps build/wheel/*.whl
	rm -rf build/torch-$* && git clone --quiet . build/torch-$*
	changed=$$(git stash create) && git archive $${changed:-HEAD} | tar -xf - -C build/torch-$*
	rm -rf build/torch-$*/fused_tricks
	.venv-torch-$*/bin/python -m pip install --quiet --no-deps --target build/torch-$* build/wheel/*.whl
	cd build/torch-$* && OMP_NUM_THREADS=$${OMP_NUM_THREADS:-1} \
		../../.venv-torch-$*/bin/python -m pytest -n $(TEST_PROCESSES) -rs $(PYTEST_ARGS)

# Triton's interpreter before 3.7 requires NumPy below 2.4.
define NUMPY
import importlib.metadata as m; print("numpy<2.4" if [*map(int, m.version("triton").split(".")[:2])] < [3, 7] else "numpy")
endef

.PHONY: build/wheel
build/wheel: $(STAMPS)/build
	rm -rf $@
	$(IN_VENV) -m pip wheel --quiet --no-build-isolation --no-deps --wheel-dir $@ .

wheels wheels-manylinux: $(STAMPS)/release
	$(IN_VENV) -m release.wheels $(if $(filter wheels-manylinux,$@),--manylinux,$(PYTHONS))
	$(MAKE) check-wheels

check-wheels: $(STAMPS)/release
	$(IN_VENV) -m release.check $(CHECK_ARGS)
	$(IN_VENV) -m twine check --strict dist/*

smoke-wheels: $(STAMPS)/release
	$(IN_VENV) -m release.smoke $(PYTHONS) --torch $(SMOKE_TORCHES)

bench: $(STAMPS)/build $(STAMPS)/bench
	$(IN_VENV) -m benchmarks.train --minutes 2 $(BENCH_ARGS)
	$(if $(filter -h --help,$(BENCH_ARGS)),,$(IN_VENV) -m benchmarks.step --rounds 10 --host-rounds 50 --no-compiled)

gpu-report:
	$(PYTHON) -m benchmarks.gpu_report --seconds $(LIMIT) $(GPU_REPORT_ARGS)

sass-diff: $(STAMPS)/build $(STAMPS)/bench
	$(IN_VENV) -m benchmarks.resources.sass_diff "$(BASE)"

# Material announces its successor in every build otherwise.
docs: $(STAMPS)/docs
	NO_MKDOCS_2_WARNING=1 $(IN_VENV) -m mkdocs build --strict
	@echo "build/site/index.html has the site"

lint: $(STAMPS)/lint
	$(IN_VENV) -m ruff check
	$(IN_VENV) -m ruff format --check
	$(IN_VENV) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(NATIVE_FORMATTED)
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.github-workflows .github/workflows/*.yml
	$(VENV)/bin/check-jsonschema --builtin-schema vendor.citation-file-format CITATION.cff
	@test -n "$(CORE)" || { echo "csrc/core has no headers" >&2; exit 1; }
	@! grep -nE 'include|PyObject|py::' $(CORE) | grep -vE '#include (<[a-z_]+>|"($(CORE_NAMES))")$$' || \
		{ echo "csrc/core may include only its own files and the standard library, without Python" >&2; exit 1; }

format: $(STAMPS)/lint
	$(IN_VENV) -m ruff check --fix-only
	$(IN_VENV) -m ruff format
	$(VENV)/bin/clang-format -i $(NATIVE_FORMATTED)

clean:
	rm -rf build dist *.egg-info fused_tricks/_extension.*.so fused_tricks/_build_info.json
	rm -rf .mypy_cache .pytest_cache .ruff_cache
	rm -f $(STAMPS)/build
	find fused_tricks tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment variables that setup.py reads. A changed value triggers a new build, as a changed source does.
SETTINGS := $(foreach name,FUSED_TRICKS_EXTENSION FUSED_TRICKS_REQUIRE_EXTENSION FUSED_TRICKS_CUDA \
	TORCH_CUDA_ARCH_LIST CUDA_HOME CUDA_PATH CXX CXXFLAGS LDFLAGS,$(name)=$($(name)))

# --group requires pip 25.1. An environment in which even ensurepip fails is broken, and created again.
$(STAMPS)/venv: pyproject.toml
	$(IN_VENV) -m pip --version >/dev/null 2>&1 || $(IN_VENV) -m ensurepip >/dev/null 2>&1 \
		|| $(PYTHON) -m venv --clear $(VENV)
	$(IN_VENV) -m pip install "pip>=25.1"
	$(IN_VENV) -m pip install $(BUILD_GROUPS)
	mkdir -p $(STAMPS) && touch $@

$(STAMPS)/settings: $(STAMPS)/venv FORCE
	@echo '$(SETTINGS)' | cmp -s - $@ || echo '$(SETTINGS)' > $@

# Without build isolation the paths of pybind11's headers stay the same, so that ninja skips unchanged files.
$(STAMPS)/build: $(STAMPS)/venv $(STAMPS)/settings pyproject.toml setup.py fused_tricks/cuda_toolkit.py $(NATIVE)
	$(IN_VENV) -m pip install --no-build-isolation --editable .
	touch $@

$(STAMPS)/test $(STAMPS)/bench: pyproject.toml | $(STAMPS)/build
	$(IN_VENV) -m pip install --no-build-isolation --editable ".[$(@F)]"
	touch $@

$(STAMPS)/lint $(STAMPS)/docs $(STAMPS)/release: pyproject.toml | $(STAMPS)/venv
	$(IN_VENV) -m pip install --group $(@F)
	touch $@

FORCE:
