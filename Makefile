# make demo   sets everything up and shows paged inference beside unmodified upstream
# make test   sets everything up and runs the tests
# Everything stays in this folder and in one cache folder (MONARCH_CACHE, default the user cache directory).

PYTHON3 ?= python3
VENV    := .venv
PYTHON  := $(VENV)/bin/python

# a moved clone, another Python or other requirements need a new environment
SETUP := $(shell { pwd; $(PYTHON3) --version; cat pyproject.toml LLAMA_CPP_VERSION; } | sha256sum | cut -c1-12)
READY := $(VENV)/ready-$(SETUP)

BINDINGS := llama-cpp-python==$(shell sed -n 's/^llama_cpp_python = //p' LLAMA_CPP_VERSION)

# what runs llama.cpp in child processes, or compiles its own programs
SANITIZED := test_state.py test_state_crafted.py test_paging.py test_native_kernels.py test_threads.py test_fuzz.py

.PHONY: demo test test-long test-convert sanitize fuzz cuda-check build lint clean

demo: build
	$(PYTHON) scripts/demo.py

test: build
	$(PYTHON) -m pytest -q tests

test-long: build
	$(PYTHON) -m pytest -q -m long tests

# under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer; builds the library twice, half an hour at first
sanitize: build
	for sanitizer in address thread; do $(PYTHON) -m monarch_llamacpp build --sanitizer $$sanitizer || exit; done
	$(PYTHON) -m pytest -q --sanitizer address $(addprefix tests/,$(SANITIZED))
	$(PYTHON) -m pytest -q --sanitizer thread tests/test_threads.py

# ten minutes each; SECONDS=60 for less
fuzz: build
	$(PYTHON) -m monarch_llamacpp build --sanitizer address
	$(PYTHON) tests/fuzz/run.py --seconds $(or $(SECONDS),600)

# against upstream's own converter and transformers, which bring torch
test-convert: build
	$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-cache-dir --editable '.[test,test-convert]'
	$(PYTHON) -m pytest -q tests/test_convert_oracle.py

# the CUDA kernels: emulated on the CPU, and compiled where nvcc is found
cuda-check: build
	$(PYTHON) -m pytest -q -rs -m "long or not long" tests/test_native_cuda.py

build: $(READY)
	$(PYTHON) -m monarch_llamacpp build --tools

lint: $(READY)
	$(PYTHON) -m ruff check .

clean:
	rm -rf $(VENV)

# The bindings come without their own llama.cpp. Nothing goes into pip's cache: it lies outside this folder, and a wheel
# without the library must not be what another project of this user gets from it.
$(READY):
	@echo "setting up $(VENV): about a minute"
	@rm -rf $(VENV)
	@$(PYTHON3) -m venv $(VENV)
	@CMAKE_ARGS="-DLLAMA_BUILD=OFF -DLLAVA_BUILD=OFF" \
	    $(PYTHON) -m pip install --quiet --disable-pip-version-check --no-cache-dir $(BINDINGS)
	@$(PYTHON) -m pip install --quiet --disable-pip-version-check --no-cache-dir --editable '.[test]'
	@touch $@
