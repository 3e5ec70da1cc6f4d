# Every target makes .venv first where it is missing, and installs again only when what it installs has changed.
PYTHON ?= $(shell for p in python3 python3.13 python3.12 python3.11; do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := .venv/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q -c constraints.txt
SOURCES := pyproject.toml setup.py constraints.txt $(wildcard csrc/*.cc csrc/*.h csrc/cpu/* csrc/cuda/*)

.PHONY: help demo test test-fast test-hf4 sanitize tsan lint bench clean
.DELETE_ON_ERROR:

help:
	@echo "make demo      quantize two small CLIP models and show what that did to their reliability"
	@echo "make test      the whole test suite"
	@echo "make test-fast the suite without the tests that are slow or need a GPU"
	@echo "make test-hf4  the Hugging Face tests with transformers 4, in .venv-hf4"
	@echo "make sanitize  the kernels' tests on a build with AddressSanitizer and UndefinedBehaviorSanitizer"
	@echo "make tsan      every op on several threads under ThreadSanitizer"
	@echo "make lint      ruff, clang-format, mypy, import-linter"
	@echo "make bench     the kernels and a whole tower beside their peers"
	@echo "make clean     remove what was built (not .venv)"

demo: .venv/.installed
	$(BIN)/qclip demo

# One process per core. Each keeps its threads, which tests of races want: they sleep, not spin, while they wait.
SPREAD := -n auto --dist loadfile
export OMP_WAIT_POLICY ?= passive

test: .venv/.installed-test
	$(BIN)/python -m pytest $(SPREAD)

test-fast: .venv/.installed-test
	$(BIN)/python -m pytest $(SPREAD) -m "not slow and not gpu"

lint: .venv/.installed-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run --Werror $$(git ls-files 'csrc/*.cc' 'csrc/*.h' 'csrc/*.cu' 'csrc/*.def' 'tests/*.cc')
	$(BIN)/lint-imports --no-cache
	$(BIN)/mypy

bench: .venv/.installed-bench .venv/.installed-test
	$(BIN)/python -m pytest benchmarks --benchmark-only
	$(BIN)/python -m benchmarks.towers --only vit-b-32-image-16-w8a8 --peers all --force

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "qclip needs Python 3.11 or newer; install it, or name it: make PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv

.venv/.installed: $(SOURCES) | .venv/bin/python
	@echo "installing into .venv (torch is a large download the first time)"
	$(PIP) -e .
	@touch $@

.venv/.installed-%: $(SOURCES) | .venv/bin/python
	@echo "installing into .venv, with what '$*' needs (torch is a large download the first time)"
	$(PIP) -e '.[$*]'
	@touch .venv/.installed $(if $(filter dev,$*),.venv/.installed-test) $@

# transformers 4 wants an older huggingface_hub and tokenizers, so these four are free here and everything else is pinned.
test-hf4: $(SOURCES)
	@test -n "$(PYTHON)" || { echo "qclip needs Python 3.11 or newer; install it, or name it: make PYTHON=/path/to/python"; exit 1; }
	test -x .venv-hf4/bin/python || $(PYTHON) -m venv .venv-hf4
	grep -vE '^(transformers|huggingface_hub|tokenizers|hf-xet)==' constraints.txt > .venv-hf4/constraints.txt
	.venv-hf4/bin/python -m pip install --disable-pip-version-check -q -c .venv-hf4/constraints.txt -e . 'transformers>=4.50,<5' pytest hypothesis pytest-benchmark scipy
	.venv-hf4/bin/python -m pytest tests/models

# In a copy, so that the working build stays. Python itself is not instrumented: the runtime is loaded before it, and
# what Python never frees is no leak of ours. NDEBUG-free, optimised a little: ten times slower than the real build.
# The sanitizer brings a malloc of its own, so nothing is asked of the heap.
SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=all
sanitize: .venv/.installed-test
	rm -rf build/sanitized && mkdir -p build/sanitized
	cp -r qkernels tests csrc setup.py pyproject.toml README.md build/sanitized && rm -f build/sanitized/qkernels/_*.so
	cd build/sanitized && QKERNELS_CUDA=0 CXXFLAGS="$(SANITIZE) -O1 -g1 -fno-omit-frame-pointer" LDFLAGS="$(SANITIZE)" \
		$(CURDIR)/$(BIN)/python setup.py -q build_ext --inplace
	cd build/sanitized && PYTHONPATH=. ASAN_OPTIONS=detect_leaks=0:allocator_may_return_null=1 UBSAN_OPTIONS=print_stacktrace=1 \
		LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
		$(CURDIR)/$(BIN)/python -m pytest -q -p no:cacheprovider $(SPREAD) tests/kernels \
		--ignore tests/kernels/test_build.py --ignore tests/kernels/test_disassembly.py --ignore tests/kernels/test_heap.py \
		--ignore tests/kernels/triton --ignore tests/kernels/cuda -k "not neon and not avxvnni"

tsan: .venv/.installed-test
	$(BIN)/python -m pytest -q tests/kernels/remote/check_threads.py

clean:
	rm -rf build dist *.egg-info qclip-demo .pytest_cache .hypothesis .ruff_cache .mypy_cache .import_linter_cache .benchmarks
	rm -f qkernels/_native*.so qkernels/_cuda*.so .venv/.installed*
	find qclip qkernels tests benchmarks dev -name __pycache__ -type d -prune -exec rm -rf {} +
