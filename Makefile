PYTHON ?= python3
NP ?= 4
ARGS ?=
SECONDS ?= 3600
TRANSPORT ?= horovod
TORCH ?= 2.3.1
export PYTHON

SCRIPTS = .ci/run $(wildcard launch/*.sh launch/slurm/*.sh launch/slurm/*.sbatch) launch/mpich/mpirun

.PHONY: setup train train-horovod train-torch test test-torch test-triton test-gpu bench-gpu test-cluster machine sanitize lint docs format clean

setup:  ## everything that hvd_saef needs, in .venv (idempotent)
	@launch/bootstrap.sh

train: train-$(TRANSPORT)  ## the quick start on NP ranks: make train NP=4 ARGS="--epochs 6" TRANSPORT=torch

train-horovod: setup
	launch/horovodrun.sh -np $(NP) python benchmarks/quickstart.py $(ARGS)

train-torch:  # builds no Horovod; as a module, since a torch of another environment leaves no torchrun in this one
	@launch/bootstrap.sh --without-horovod
	OMP_NUM_THREADS=1 .venv/bin/python -m torch.distributed.run --standalone --nproc-per-node $(NP) benchmarks/quickstart.py $(ARGS)

PROCESSES = $$(($$(nproc) + 1))
test: setup  ## all tests but those of test-cluster; one process starts MPI jobs and waits for them
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n $(PROCESSES) --dist loadgroup --ignore=tests/cluster tests

test-triton: setup  ## the Triton kernels, interpreted, on larger memory; and compiled for all GPUs that Triton knows here
	HVD_SAEF_LONG=1 OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q -n auto tests/kernels/test_triton.py tests/kernels/test_compiling.py

OTHER = $(if $(NUMPY),--numpy $(NUMPY)) $(if $(filter no,$(HOROVOD)),--without-horovod) $(if $(RECORD),--record)
test-torch:  ## the tests with another torch (PYTHON, NUMPY): make test-torch TORCH=2.3.1 HOROVOD=no ARGS=tests/kernels
	$(PYTHON) -m tests.versions $(TORCH) $(OTHER) -- $(ARGS)

test-gpu:  ## on a GPU, in 8 minutes, with the Python at hand (torch, Triton), no set-up: make test-gpu PYTHON=python3.12
	$(PYTHON) -m tests.gpu $(ARGS)

bench-gpu:  ## measures on a GPU, in 8 minutes, with the Python at hand, no set-up
	$(PYTHON) -m benchmarks.gpu $(ARGS)

test-cluster: setup  ## the tests that need a SLURM or hosts: as root, on a machine where apt-get works
	OMP_NUM_THREADS=1 .venv/bin/python -m pytest -q tests/cluster

machine: setup  ## programs of all that users do, against a model, for so long: make machine SECONDS=3600
	OMP_NUM_THREADS=1 .venv/bin/python -m tests.machine --seconds $(SECONDS) $(ARGS)

SANITIZED = build/sanitize
sanitize: setup  ## kernels with AddressSanitizer and UBSan, under their tests and the fuzzing of decoders
	HVD_SAEF_SANITIZE=1 .venv/bin/python setup.py -q build --build-base build/sanitize-objects --build-lib $(SANITIZED)
	cp -r tests benchmarks pyproject.toml $(SANITIZED)
	cd $(SANITIZED) && OMP_NUM_THREADS=2 HVD_SAEF_FUZZ=500 UBSAN_OPTIONS=print_stacktrace=1 \
	  ASAN_OPTIONS=detect_leaks=0 LD_PRELOAD="$$(g++ -print-file-name=libasan.so) $$(g++ -print-file-name=libubsan.so) $$(g++ -print-file-name=libstdc++.so)" \
	  $(CURDIR)/.venv/bin/python -m pytest -q -p no:cacheprovider -k 'not compiler' tests/compression/test_fuzz.py tests/kernels/test_kernels.py \
	  tests/kernels/test_kernels_sign.py tests/kernels/test_kernels_topk.py

lint: setup  ## ruff, mypy, shellcheck and hadolint
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy
	.venv/bin/shellcheck -x $(SCRIPTS)
	.venv/bin/hadolint Dockerfile.gpu

docs: setup  ## the API reference from the docstrings, in build/docs; warnings are errors
	.venv/bin/sphinx-build -q -W --keep-going -b html docs/api build/docs

format: setup  ## let ruff rewrite what it can
	.venv/bin/ruff check --fix .
	.venv/bin/ruff format .

clean:  ## what make made here; the cache of built wheels stays
	rm -rf .venv build *.egg-info runs .pytest_cache .mypy_cache .ruff_cache .hypothesis
