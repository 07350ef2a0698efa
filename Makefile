# make demo: the road 01 -> 06 on a bare machine, with the simulator and the tiny student (STEPS of SFT).   make test: the tests.
# Both make .venv first. Each stage skips itself when its folder is finished, so an interrupted demo goes on where it stopped.

RUN    ?= runs/demo
PYTHON ?= python3
STEPS  ?= 860
VENV   := .venv
PY     := $(VENV)/bin/python

# Two busy cores train twice as fast when idle threads sleep instead of spinning.
export OMP_WAIT_POLICY := PASSIVE

TINY := --recipe tiny

.PHONY: demo test bench base base-check peers rival fire clean

demo: $(VENV)/ready
	$(PY) 01_sample_trajectories.py --run $(RUN) --rooms 3000 --room_px 84 --same_label_share 1 --heldout 0.06 --shares 0.7 0.15 0.15
	$(PY) 02_imagine_views.py --run $(RUN) --keep ends
	$(PY) 03_build_qa.py --run $(RUN) --box_step 10 --caps A4=0.2 D1=3 D2=0.5 D3=2 D4=2 S2=2
	$(PY) 04_train_sft.py --run $(RUN) --out 4_base --data 3_qa/static.jsonl --schedule constant --steps 250 $(TINY)
	$(PY) 04_train_sft.py --run $(RUN) --student 4_base --rehearse 3_qa/static.jsonl --rehearse_share 0.25 --warmup 0.02 --steps $(STEPS) $(TINY)
	$(PY) 05_train_refine.py --run $(RUN) --recipe tiny
	$(PY) 06_eval.py --run $(RUN) --checkpoint 4_base --tag base --per_task 120 --blank False
	$(PY) 06_eval.py --run $(RUN) --checkpoint 4_sft --tag sft --per_task 120
	$(PY) 06_eval.py --run $(RUN) --checkpoint 5_refine --tag refined --per_task 120 --beside base sft

# The student that the demo starts from, base/: it reads pictures, finds and compares objects in rooms of its own, and has met no question about
# motion. Made once (hours) and kept in the repository with its log; base-check trains the first 5 % of it anew and compares the losses.
BASE_STEPS := 2400
BASE = $(PY) 04_train_sft.py --run runs/base --out 4_base --data 3_qa/static.jsonl --steps $(BASE_STEPS) --save_dtype bfloat16 $(TINY)
runs/base/3_qa/meta.json: | $(VENV)/ready
	$(PY) 01_sample_trajectories.py --run runs/base --rooms 4000 --room_px 84 --same_label_share 1 --heldout 0.02 --shares 0.7 0.15 0.15 --seed 1
	$(PY) 02_imagine_views.py --run runs/base --keep ends
	$(PY) 03_build_qa.py --run runs/base --box_step 10 --caps S1=1 S2=0.6 S3=0.6 S4=0.4 S5=4 S6=4

base: runs/base/3_qa/meta.json
	$(BASE)
	mkdir -p base
	cd runs/base/4_base && cp *.json *.jinja model.safetensors metrics.jsonl curves.png ../../../base/

base-check: runs/base/3_qa/meta.json
	rm -rf runs/base/4_check
	$(BASE) --out 4_check --until $$(($(BASE_STEPS) / 20))
	$(PY) -c "import json, pathlib as p; a, b = ([json.loads(l)['loss'] for l in p.Path(f, 'metrics.jsonl').open()] \
		for f in ('base', 'runs/base/4_check')); assert b == a[:len(b)]; print(len(b), 'losses, all as in base/metrics.jsonl')"

# Frames, questions a second: the simulator at two sizes, then SFT with and without shared prefixes (after make demo).
bench: $(VENV)/ready
	$(PY) 02_imagine_views.py --benchmark
	rm -rf $(RUN)/bench_shared $(RUN)/bench_alone
	$(PY) 04_train_sft.py --run $(RUN) --out bench_shared --student 4_base --steps 30 --val_share 0 $(TINY)
	$(PY) 04_train_sft.py --run $(RUN) --out bench_alone --student 4_base --steps 30 --val_share 0 $(TINY) --no_share

# Seconds of a step of 04 and 05 beside those of TRL's trainers, which live in an environment of their own (20 minutes).
peers: $(VENV)/ready .venv-peers/ready
	$(PY) tests/peers.py

.venv-peers/ready: $(VENV)/ready
	$(PYTHON) -m venv .venv-peers
	.venv-peers/bin/pip install --quiet torch==2.13.0 trl==1.16.0 datasets accelerate pillow \
		transformers==$$($(PY) -c "import transformers; print(transformers.__version__)")
	touch $@

# The students of make demo beside one that asks a world model while it answers: right answers, seconds and operations a question.
RIVAL := --checkpoint 4_base --per_task 25 --blank False --tasks A1 A2 A3 A4 D1 D2 D3 D4
rival: $(VENV)/ready
	$(PY) 06_eval.py --run $(RUN) $(RIVAL) --tag rival-base
	$(PY) 06_eval.py --run $(RUN) $(RIVAL) --tag rival-simulator --coupled simulator
	$(PY) 06_eval.py --run $(RUN) $(RIVAL) --tag rival-warp --coupled warp
	$(PY) 06_eval.py --run $(RUN) $(RIVAL) --tag rival-stated --coupled simulator --coupled_stated
	$(PY) 06_eval.py --run $(RUN) $(RIVAL) --tag rival-sft --checkpoint 4_sft
	$(PY) 06_eval.py --run $(RUN) $(RIVAL) --tag rival-refined --checkpoint 5_refine --blank True \
		--beside rival-base rival-simulator rival-warp rival-stated rival-sft
	$(PY) 06_eval.py --run $(RUN) --compare rival-base rival-refined

# Kills, full disks, bad pictures, bad lines, bad weights, a long run against every stage: one table of what survived (20 minutes).
fire: $(VENV)/ready
	$(PY) tests/fire/run.py

test: $(VENV)/ready
	$(PY) -m pytest -q -n 2 --dist loadfile --no-loadscope-reorder tests/test_kernels.py tests

$(VENV)/ready: requirements.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install --quiet --requirement requirements.txt
	touch $@

clean:
	rm -rf $(VENV) .venv-peers runs
