# Two commands matter: make demo, make test. Both set everything up first (dev/setup_host.py says what and where).
PYTHON ?= python3
setup = $(PYTHON) dev/setup_host.py
# Assigned when a recipe runs, so that a failed set-up stops it.
interpreter = ENV_PYTHON="$$($(setup) python)"
env = $(interpreter) && "$$ENV_PYTHON"

# A checkout that the user named is not written to, not even Python's caches.
ifdef COMFYUI_DIR
export PYTHONPYCACHEPREFIX := $(or $(XDG_CACHE_HOME),$(HOME)/.cache)/comfyui-posterior/pycache
endif

# On the command line only: some shells set HOST to the machine's name. What does not touch ComfyUI is left out then.
ifeq ($(origin HOST),command line)
export COMFYUI_VERSION := $(HOST)
older = yes
endif

.PHONY: demo readme test test-full serve bench checkpoint train-prior python help

help:
	@echo "make demo        restore the shipped pictures through the real ComfyUI; results in output/"
	@echo "make readme      the same, and bring the picture and the numbers of README.md up to date"
	@echo "make test        the whole suite against the real ComfyUI; HOST=0.16.3 for what touches it, on an older one"
	@echo "make test-full   the counts that take long, too; in two processes; reports in tests/report-*.md"
	@echo "make serve       start ComfyUI with the pack and its templates; PORT=8200 for a port of your own"
	@echo "make bench       speed of the operators and cost of a step; the other benchmarks say themselves how they run"
	@echo "make checkpoint  write the demo prior as a stock SD 1.5 checkpoint into that ComfyUI's models"
	@echo "make train-prior train the demo prior from nothing (hours; resumable)"
	@echo "make -s python   print the environment's interpreter"

demo:
	@$(env) dev/demo.py

readme:
	@$(env) dev/make_readme.py

# Two processes for two cores; what the first says comes after what the second does. A shell starts what is in the background deaf
# to Ctrl-C: a SIGTERM ends both instead, as Ctrl-C would, so that the tests stop the servers they have started.
# On an older ComfyUI the tests through a server take half as long as those in process: some of these go to them. Left out
# there: many prompts on one server, pictures of 4K, plots, and the means of many samples.
moved = $(addprefix tests/host/test_,any_input.py guarantees.py memory.py)
own = $(addprefix --ignore=tests/,server/test_load.py $(addprefix host/test_,large_pictures.py plot.py posterior_mean.py))
in_process = tests/host $(if $(older),$(moved:%=--ignore=%) $(own))
rest = $(if $(older),tests/server $(moved) $(own),tests --ignore=tests/host)
# With BRIEF=yes what has depended on the version of the host: loading, gradients, names that it lacks, nodes.
ifdef BRIEF
in_process = $(addprefix tests/host/test_,host.py missing_internals.py schemas.py stock_nodes.py)
rest = $(addprefix tests/,server/test_pack.py host/test_gradients.py)
endif
# One thread each: the two fill both cores, and threads that wait for each other spin.
pytest = OMP_NUM_THREADS=1 "$$ENV_PYTHON" -c 'import pytest, signal, sys; signal.signal(signal.SIGTERM, signal.default_int_handler); sys.exit(pytest.main())'
both = { log="$$(mktemp)"; first=; second=; trap 'trap "" INT TERM; kill $$first $$second; wait; rm "$$log"; exit 130' INT TERM; \
	$(pytest) $(1) --part in-process $(in_process) >"$$log" 2>&1 & first=$$!; \
	$(pytest) $(1) --part rest $(rest) & second=$$!; \
	wait $$second; rest=$$?; wait $$first; in_process=$$?; cat "$$log"; rm "$$log"; exit $$((rest | in_process)); }

test:
	@$(env) -m ruff check . && "$$ENV_PYTHON" -m ruff format --check . && $(both)

test-full:
	@$(interpreter) && $(call both,--full)

# In the shell's place, so that a signal to make ends it.
serve:
	@$(interpreter) && exec "$$ENV_PYTHON" dev/serve.py

# deepinv and what it imports take part in the comparison only; they are no dependency and stay outside the environment.
bench:
	@$(env) -m pip install --quiet --upgrade --target output/deepinv --no-deps deepinv==0.5.0 natsort==8.4.0 h5py==3.16.0 && \
		PYTHONPATH=output/deepinv "$$ENV_PYTHON" benchmarks/operators.py && "$$ENV_PYTHON" benchmarks/psld_cost.py

checkpoint:
	@$(env) dev/make_checkpoint.py "$$($(setup) base)/models/checkpoints/posterior_avatars.safetensors"

train-prior:
	@$(env) -m prior.training $(ARGS) && "$$ENV_PYTHON" -m prior.training --pixel

python:
	@$(setup) python
