# Everything a fresh machine needs: `make demo` and `make test` build the environment themselves.
PYTHON ?= python3
JOBS ?= 2
RUN = .venv/bin/python
# One thread a process: two processes of spinning threads on two cores are five times slower.
TEST = OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(RUN) -m pytest
.DELETE_ON_ERROR:
.PHONY: venv bench-env demo seeds hosts trust test test-all bench gpu results lint kernels clean

venv: .venv/done
.venv/done: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	.venv/bin/pip install --progress-bar off --no-warn-script-location -c constraints.txt -e '.[dev]'
	touch $@

bench-env: .venv-bench/done    ## what evaluate.py --benchmarks runs lmms-eval with, beside .venv: 7 GB with its torch
.venv-bench/done: pyproject.toml
	$(PYTHON) -m venv .venv-bench
	.venv-bench/bin/pip install --progress-bar off --no-warn-script-location -e '.[bench]'
	touch $@

demo: venv            ## the whole way on the toy world: maps, plain and Lavender tuning, report
	sh experiments/demo.sh

seeds: venv           ## the same over three seeds, with intervals
	sh experiments/seeds.sh

hosts: venv           ## every toy host over three seeds, in one table
	sh experiments/hosts.sh

trust: venv           ## whether a map's contrast tells that it is right, and whether weighing words by it helps, over five seeds
	sh experiments/trust.sh

test: venv lint       ## everything that runs in minutes
	$(TEST) -n $(JOBS)

test-all: venv lint   ## the slow tests too
	$(TEST) -n $(JOBS) -m 'not benchmark'

bench: venv           ## timings, side by side in one run; the kernels where there is a GPU
	HF_HUB_OFFLINE=1 $(RUN) -m pytest -m benchmark tests/benchmarks -s

gpu:                  ## on a GPU, with its own python3: all that only a GPU can tell, into runs/gpu or $OUT; TINY=1: in small, here
	$(if $(and $(TINY),$(wildcard $(RUN))),$(RUN),$(PYTHON)) tests/benchmarks/gpu $(if $(TINY),--tiny) $(FLAGS)

results:              ## the README's table of what `make gpu` measured; FROM=gpu.json: with what was measured elsewhere
	$(PYTHON) tests/benchmarks/gpu/table.py $(FROM)

kernels: venv         ## registers, shared memory and spills of every kernel, compiled ahead of time
	$(RUN) -m lavender_min.kernels.aot

lint: venv
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/mypy

clean:
	rm -rf .venv .venv-bench runs maps build *.egg-info
