# make demo: the road 01 -> 06 on a bare machine in ten minutes, from the student in base/, with the
# world model in base/world. make test: the form and the tests. Both make .venv first. A stage skips
# itself when its folder is finished, so whatever was interrupted goes on where it stopped. Numbers
# live in the RECIPES of the scripts; here stand names of recipes and sizes.

RUN    ?= runs/demo
PYTHON ?= python3
SEED   ?= 0
VENV   := .venv
PY     := $(VENV)/bin/python

# The sizes of the demo: rooms, optimiser steps of the two stages, questions per task at the end;
# and the recipe of SFT, which has its learning rate.
ROOMS      ?= 330
SFT_RECIPE ?= tiny
STEPS      ?= 240
GRPO_STEPS ?= 20
PER_TASK   ?= 200

# Two busy cores train twice as fast when idle threads sleep instead of spinning.
export OMP_WAIT_POLICY := PASSIVE

.PHONY: demo miniature second-stage test-time-baseline ablations base base-check world world-check bench gpu \
	bench-kernels compile-kernels peers fire lint same shortcuts test clean

SAMPLE  = $(PY) 01_sample_trajectories.py --run $(RUN) --rooms $(ROOMS) --recipe
IMAGINE = $(PY) 02_imagine_views.py --run $(RUN) --recipe
ASK     = $(PY) 03_build_qa.py --run $(RUN) --recipe
SFT     = $(PY) 04_train_sft.py --run $(RUN) --recipe
REFINE  = $(PY) 05_train_refine.py --run $(RUN) --recipe
EVAL    = $(PY) 06_eval.py --run $(RUN)
EXAM    = $(EVAL) --recipe tiny --per_task $(PER_TASK)

# Held-out rooms are drawn exactly: a student of imagined views is examined on true ones.
demo: $(VENV)/ready
	$(SAMPLE) tiny
	$(IMAGINE) tiny
	$(ASK) tiny
	$(SFT) $(SFT_RECIPE) --steps $(STEPS) --seed $(SEED)
	$(REFINE) tiny --steps $(GRPO_STEPS) --seed $(SEED)
	$(EXAM) --checkpoint base
	$(EXAM) --checkpoint 4_sft --tag sft
	$(EXAM) --checkpoint 5_refine --tag refined --pictures both --beside base sft
	@echo "Look at $(RUN)/2_views/contact_sheet.png, $(RUN)/3_qa/examples.png and the report above. Then:"
	@echo "make miniature (longer, with the test-time baseline), or your own photographs: README.md"

# The paper's claims: the demo with more rooms and steps, how GRPO changed the greedy and the drawn
# answers, and the test-time baseline.
miniature:
	$(MAKE) demo second-stage test-time-baseline \
		RUN=runs/miniature ROOMS=2000 SFT_RECIPE=long STEPS=1150 GRPO_STEPS=100 PER_TASK=600

second-stage: $(VENV)/ready
	$(EVAL) --compare sft refined
	$(EVAL) --recipe drawn --checkpoint 4_sft --tag sft-drawn
	$(EVAL) --recipe drawn --checkpoint 5_refine --tag refined-drawn
	$(EVAL) --compare sft-drawn refined-drawn

# The base of a run that asks a world model while it answers, beside the students that do not:
# right answers, seconds and operations per question. The base knows static skills only, so it is
# asked the static question that a view from the end of the stated motion makes of D1, D2 and D4, 200
# of each; of D1 and D4 the second picture is given. The simulator is an oracle.
BASELINE = $(EVAL) --recipe tiny --tasks D1 D2 D4 --per_task 200
COUPLED = $(BASELINE) --checkpoint base --coupled
test-time-baseline: $(VENV)/ready
	$(BASELINE) --checkpoint base --tag rival-base
	$(COUPLED) simulator --coupled_stated
	$(COUPLED) "warp --fill base/world" --coupled_stated
	$(BASELINE) --checkpoint 4_sft --tag rival-sft
	$(BASELINE) --checkpoint 5_refine --tag rival-refined --beside rival-base \
		base-simulator-stated base-warp-stated rival-sft
	$(EVAL) --compare base-warp-stated rival-refined

# One part of the method changed at a time, three seeds, one line of tests/ablations.jsonl per
# student, in any number of sittings (many hours).
ablations: $(VENV)/ready
	$(PY) tests/ablations.py

# The student that the demo starts from, base/: it reads pictures, finds and compares objects in
# rooms of its own, and has met no question about motion. Made once (97 minutes) and kept with its
# log; base-check trains the first 5 % anew and compares the losses.
BASE = $(PY) 04_train_sft.py --run runs/base --recipe base
runs/base/3_qa/meta.json: RUN = runs/base
runs/base/3_qa/meta.json: ROOMS = 16000
runs/base/3_qa/meta.json: | $(VENV)/ready
	$(SAMPLE) base
	$(IMAGINE) exact
	$(ASK) base

base: runs/base/3_qa/meta.json
	$(BASE)
	mkdir -p base
	cd runs/base/4_base && cp *.json *.jinja model.safetensors metrics.jsonl curves.png ../../../base/

# The small world model that fills the holes of warped views, base/world/; trained in rooms of its
# own. Made once and kept with its log; world-check trains the first 5 % anew and compares.
WORLD = $(PY) base/train_world.py --run runs/world
runs/world/1_trajectories/meta.json: RUN = runs/world
runs/world/1_trajectories/meta.json: ROOMS = 2500
runs/world/1_trajectories/meta.json: | $(VENV)/ready
	$(SAMPLE) world

world: runs/world/1_trajectories/meta.json
	$(WORLD)
	mkdir -p base/world
	cd runs/world/world && cp *.json *.safetensors metrics.jsonl ../../../base/world/

world-check: runs/world/1_trajectories/meta.json
	rm -rf runs/world/check
	$(WORLD) --out check --until 175
	$(PY) tests/same_losses.py base/world runs/world/check

base-check: runs/base/3_qa/meta.json
	rm -rf runs/base/4_check
	$(PY) tests/same_losses.py base runs/base/4_check $(BASE) --out 4_check

# Rates of the simulator, and of SFT with and without shared prefixes (after make demo).
bench: $(VENV)/ready
	$(PY) tests/bench_simulator.py
	rm -rf $(RUN)/bench_shared $(RUN)/bench_alone
	$(SFT) tiny --out bench_shared --steps 30 --val_share 0
	$(SFT) tiny --out bench_alone --steps 30 --val_share 0 --no_share

# All figures of one card in nine minutes: kernels, training, rollout, svc; GPU_PARTS="sft svc": these
# parts; SEVA=folder: a checkout of svc's authors' code to time beside ours. Nothing is installed: it
# takes the first python3 whose torch finds a GPU.
GPU_PYTHON = $(shell for python in $(PYTHON) $(PY); do \
	$$python -c "import torch; assert torch.cuda.is_available()" 2> /dev/null && echo $$python && break; done)
gpu:
	@$(or $(GPU_PYTHON),$(PYTHON)) tests/gpu/measure.py $(GPU_PARTS) $(if $(SEVA),--seva $(SEVA))

# Every kernel: times beside the floor and the baselines (on a GPU); compiled for four cards without one.
bench-kernels: $(VENV)/ready
	$(PY) tests/gpu/bench.py

compile-kernels: $(VENV)/ready
	$(PY) tests/gpu/compile.py

# Seconds per step of 04 and 05 beside TRL's trainers, in an environment of their own (20 minutes).
peers: $(VENV)/ready .venv-peers/ready
	$(PY) tests/peers.py

.venv-peers/ready: $(VENV)/ready
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet torch==2.13.0 trl==1.16.0 datasets accelerate pillow \
		transformers==$$($(PY) -c "import transformers; print(transformers.__version__)")
	touch $@

# Kills, full disks, bad pictures, bad lines, bad weights and a long run against every stage.
fire: $(VENV)/ready
	$(PY) tests/fire/run.py

# The form: ruff's, and the measures of tests/house.py (which `make test` checks too).
lint: $(VENV)/ready
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/ruff check .

# The marked blocks that recur in the scripts, written anew from the first script that holds each.
same: $(VENV)/ready
	$(PY) tests/house.py --same

# What can be answered without imagining: probes on 1,000 rooms, then on the photographs and
# panoramas of PHOTOS=folder, where it is given.
shortcuts: RUN = runs/shortcuts
shortcuts: ROOMS = 1000
shortcuts: $(VENV)/ready
	$(SAMPLE) paper && $(IMAGINE) paper && $(ASK) paper
	$(PY) tests/shortcuts.py $(RUN)
ifdef PHOTOS
	$(PY) 01_sample_trajectories.py --run $(RUN)-photos --images $(PHOTOS) --recipe photos
	$(PY) 02_imagine_views.py --run $(RUN)-photos --teacher pan
	$(PY) 03_build_qa.py --run $(RUN)-photos
	$(PY) tests/shortcuts.py $(RUN)-photos
endif

# The longest files first: a worker that meets one at the end lets the other wait.
LONG = 04_05_training kernels kernels_compile fire labels 02_fill 04_05_scale
test: $(VENV)/ready
	$(PY) tests/house.py
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder $(LONG:%=tests/test_%.py) tests

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-peers runs
