"""Stages 4 and 5 at the paper's scale: packing, accumulation, LoRA, sharding, memory and FLOPs are exact or close, and divergence is caught."""
import copy
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, lines, load, script, tiny_qwen25, write_questions
from PIL import Image
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig

sft, refine = load("04"), load("05")
FULL = dict(save_dtype="auto", train="full", freeze_vision=False, checkpointing=False, lora_rank=8, lora_alpha=16, dtype="float32", offload=False)
ROAD = ["--train", "full", "--freeze_vision", "False", "--lr", "1e-3", "--log_every", "1", "--val_share", 0, "--student", "4_base"]


def student_of(run, folder, family="qwen3", attention="world2vlm"):
    if family == "qwen2.5":
        return tiny_qwen25(run, folder, attention)
    return sft.load_student(str(run / "4_base"), torch.float32, "cpu", attention, 10**6)


def groups_of(run, most=16):
    return sft.group_by_pictures(sft.read_questions(run / "3_qa/sft.jsonl", run), most)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def same(a, b, atol=1e-5):
    assert a.keys() == b.keys() and max(g.abs().max() for g in a.values()) > 1e-3  # not a comparison of zeros
    for name in a:
        assert torch.allclose(a[name], b[name], atol=atol), name


# --- packing and accumulation ----------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["qwen3", "qwen2.5"])
def test_packed_equals_padded(run, tmp_path, family):
    """All groups in one row without padding, against rows padded to the longest under a matrix of visible pairs."""
    results = []
    for attention in ("world2vlm", "eager"):
        student = student_of(run, tmp_path, family, attention)
        rows = sft.rows_of(student, groups_of(run), True, 10**6)
        rows = [rows[0], *sft.rows_of(student, [group[:1] for group in groups_of(run)[1:4]], True, 10**6)]  # of unequal lengths
        logprobs = sft.token_logprobs(student, rows)
        (-logprobs.mean()).backward()
        results.append((logprobs.detach(), gradients(student.model)))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    same(results[0][1], results[1][1])
    lengths = [len(row["ids"]) for row in rows]
    packed, padded = sft.pack(rows)[0], sft.pad_rows(rows, 0, torch.float32)[0]
    assert packed["input_ids"].shape == (1, sum(lengths)) and padded["input_ids"].numel() > 1.05 * sum(lengths)


def test_a_group_over_the_budget_becomes_several_rows_with_the_same_answers(run, tmp_path):
    student = student_of(run, tmp_path)
    whole, = sft.rows_of(student, groups_of(run)[:1], True, 10**6)
    prefix = int((whole["segment"] == 0).sum())
    room = prefix + int((whole["segment"] == 1).sum()) + int((whole["segment"] == 2).sum())
    cut = sft.rows_of(student, groups_of(run)[:1], True, room)
    assert [row["questions"] for row in cut] == [2, 1] and all(len(row["ids"]) <= room for row in cut)
    assert torch.allclose(sft.token_logprobs(student, cut), sft.token_logprobs(student, [whole]), atol=1e-5)
    assert sum(len(sft.rows_of(student, groups_of(run)[:1], True, 1)) for _ in range(1)) == 3  # no room at all: one question a row


def test_micro_batches_hold_what_fits_and_lose_nothing():
    rows = [{"ids": torch.zeros(n)} for n in (5, 30, 12, 70, 12, 9)]
    for padded in (False, True):
        parts = sft.micro_batches(rows, 42, padded)
        assert sorted(len(row["ids"]) for part in parts for row in part) == [5, 9, 12, 12, 30, 70]
        for part in parts:
            cost = len(part) * len(part[0]["ids"]) if padded else sum(len(row["ids"]) for row in part)
            assert cost <= 42 or len(part) == 1
    assert len(sft.micro_batches(rows, 42, False)) < len(sft.micro_batches(rows, 42, True))


def test_four_passes_of_one_row_give_the_gradient_of_one_pass_of_four(run, tmp_path):
    student = student_of(run, tmp_path)
    rows = sft.rows_of(student, [group[:k + 1] for k, group in enumerate(groups_of(run)[:4])], True, 10**6)  # 1, 2, 3, 3 questions
    count, cfg, found = sum(len(row["target"]) for row in rows), SimpleNamespace(dtype="float32", mean="token"), []
    for parts in ([rows], [[row] for row in rows]):
        loss, broken = sft.loss_of(student, parts, cfg, count, backward=True)
        found.append((loss, gradients(student.model)))
        assert not broken
    assert abs(found[0][0] - found[1][0]) < 1e-5
    same(found[0][1], found[1][1])


@pytest.mark.parametrize("mean", ["token", "answer"])
def test_what_weighs_the_same(run, tmp_path, mean):
    """Against the definition, question by question: the mean over all answer tokens, or over the answers of the mean over each one's tokens."""
    student, groups = student_of(run, tmp_path), groups_of(run)[:3]
    for number, group in enumerate(groups):
        group[0]["messages"][1]["content"] = ["yes", "turn left 10 degrees", "turn left 10 degrees; turn right 20 degrees"][number]
    alone = [-sft.token_logprobs(student, [row]).detach().double() for group in groups for row in sft.rows_of(student, [group], False, 10**6)]
    want = torch.cat(alone).mean() if mean == "token" else torch.stack([losses.mean() for losses in alone]).mean()
    rows = sft.rows_of(student, groups, True, 10**6)
    weight = sum(float(sft.token_weights(row, mean).sum()) for row in rows)
    assert abs(weight - (sum(map(len, alone)) if mean == "token" else len(alone))) < 1e-4
    loss, _ = sft.loss_of(student, [rows[:1], rows[1:]], SimpleNamespace(dtype="float32", mean=mean), weight, backward=False)
    assert abs(loss - want) < 1e-5 and abs(torch.cat(alone).mean() - torch.stack([losses.mean() for losses in alone]).mean()) > 1e-4


def test_logits_in_chunks_give_the_same_gradients(run, tmp_path, monkeypatch):
    student = student_of(run, tmp_path)
    rows, found = sft.rows_of(student, groups_of(run)[:4], True, 10**6), []
    for logits in (2**27, 7 * student.model.config.text_config.vocab_size):  # 7 answer tokens at a time
        monkeypatch.setattr(sft, "LOGITS", logits)
        logprobs = sft.token_logprobs(student, rows)
        (-logprobs.mean()).backward()
        found.append((logprobs.detach(), gradients(student.model)))
    assert len(found[0][0]) > 40 and torch.allclose(found[0][0], found[1][0], atol=1e-5)
    same(found[0][1], found[1][1])


# --- LoRA, reference, GRPO -------------------------------------------------------------------------------------------------------------

def with_lora(student, module, seed=0, **changed):
    """A LoRA that does something: B starts at random."""
    module.choose_trained(student.model, SimpleNamespace(**FULL | dict(train="lora", freeze_vision=True) | changed))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in student.model.named_parameters():
            if name.endswith("lora_B"):
                p.normal_(0, 0.05, generator=generator)
    return student


@pytest.mark.parametrize("family", ["qwen3", "qwen2.5"])
def test_merged_lora_equals_applied_lora(run, tmp_path, family):
    student = student_of(run, tmp_path, family)
    rows = sft.rows_of(student, groups_of(run)[:3], True, 10**6)
    plain = sft.token_logprobs(student, rows).detach()
    applied = sft.token_logprobs(with_lora(student, sft), rows).detach()
    fresh = student_of(run, tmp_path, family)
    fresh.model.load_state_dict(dict(sft.merged(student.model)))
    assert (applied - plain).abs().max() > 1e-2
    assert torch.allclose(sft.token_logprobs(fresh, rows), applied, atol=1e-5)


def test_what_trains_is_float32_and_what_is_frozen_stays_small(run, tmp_path):
    """A learning rate of 1e-6 moves no bfloat16 weight; the checkpoint is bfloat16 again."""
    student = refine.load_student(str(run / "4_base"), torch.bfloat16, "cpu", "world2vlm", 10**6)
    cfg = SimpleNamespace(**FULL | dict(train="lora", dtype="bfloat16"))
    refine.choose_trained(student.model, cfg)
    assert {(p.requires_grad, p.dtype) for p in student.model.parameters()} == {(True, torch.float32), (False, torch.bfloat16)}
    rows = refine.rows_of(student, answered_prompts(student, run), torch.ones(2, 3), 6, 10**6)
    with torch.autocast("cpu", torch.bfloat16):
        refine.token_logprobs(student, rows).sum().backward()
    before = student.model.model.visual.blocks[0].mlp.linear_fc1.weight.clone()
    torch.optim.AdamW([p for p in student.model.parameters() if p.requires_grad], lr=1e-6).step()
    assert 0 < (student.model.model.visual.blocks[0].mlp.linear_fc1.weight - before).abs().max() < 2e-6
    refine.save_student(student, tmp_path / "saved", cfg, 0)
    assert {w.dtype for w in load_file(tmp_path / "saved/model.safetensors").values()} == {torch.bfloat16}


def answered_prompts(student, run):
    prompts = refine.open_prompts(student, refine.read_questions(run / "3_qa/grpo.jsonl", run)[:2])
    texts = ("turn left 40 degrees", "turn right 20 degrees", "")  # the last one is empty: its end token only
    return [prompt | {"tokens": [student.tokenizer(text + "<|im_end|>")["input_ids"] for text in texts]} for prompt in prompts]


@pytest.mark.parametrize("train", ["full", "lora"])
def test_reference_is_the_student_that_came_in(run, tmp_path, train):
    """Before training the KL divergence is exactly 0; after a change it is not, and the reference has not moved."""
    student = student_of(run, tmp_path)
    start = copy.deepcopy(student.model if train == "full" else student.model.model.visual)
    rows = refine.rows_of(student, answered_prompts(student, run), torch.zeros(2, 3), 6, 10**6)
    first = refine.token_logprobs(student, rows).detach()
    if train == "lora":
        refine.choose_trained(student.model, SimpleNamespace(**FULL | dict(train="lora")))
    reference = refine.reference_logprobs(student, start, rows, train)
    now = refine.token_logprobs(student, rows)
    assert refine.grpo_loss(now, now.detach(), reference, 0 * now, torch.ones_like(now), 0.2, 1.0)[1]["kl"] == 0
    with torch.no_grad():
        for p in student.model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    assert (refine.token_logprobs(student, rows) - first).abs().max() > 1e-2
    assert torch.allclose(refine.reference_logprobs(student, start, rows, train), first, atol=1e-6)


def test_a_group_of_equal_rewards_gives_no_gradient(run, tmp_path):
    student = student_of(run, tmp_path)
    start, cfg = copy.deepcopy(student.model), SimpleNamespace(dtype="float32", train="full", clip_ratio=0.2, kl=0.01)
    norms = []
    for rewards in ([[0.7, 0.7, 0.7], [0.1, 0.1, 0.1]], [[0.7, 0.7, 0.0], [0.1, 0.1, 0.1]]):
        rows = refine.rows_of(student, answered_prompts(student, run), refine.advantages(torch.tensor(rewards)), 6, 10**6)
        part = {"rows": rows} | {name: torch.cat([row[name] for row in rows]) for name in ("advantage", "weight")}
        refine.learn(student, start, [part], cfg, "cpu")
        norms.append(refine.clip_gradients(student.model, 1e9))
        student.model.zero_grad()
    assert norms[0] < 1e-6 and norms[1] > 1e-2


def test_rows_cut_by_the_budget_keep_every_advantage(run, tmp_path):
    student = student_of(run, tmp_path)
    gains, answered = torch.tensor([[1.0, -2.0, 3.0], [4.0, -5.0, 6.0]]), answered_prompts(student, run)
    whole, cut = (refine.rows_of(student, answered, gains, 6, most) for most in (10**6, 1))
    assert len(whole) == 2 and len(cut) == 6
    for name in ("advantage", "weight"):
        assert torch.equal(torch.cat([row[name] for row in whole]), torch.cat([row[name] for row in cut]))
    assert whole[0]["advantage"].unique().tolist() == [-2.0, 1.0, 3.0]


def test_left_padded_generation_equals_each_alone_with_one_two_and_four_pictures(run, tmp_path):
    """And the tokens that come out have, in the packed batch of the update, the highest probability: rollout and update see the same model."""
    student, draw, questions = student_of(run, tmp_path), np.random.default_rng(0), []
    for number, sizes in enumerate([[(84, 84)], [(28, 56), (84, 56)], [(56, 56), (28, 28), (84, 28), (56, 84)]]):
        paths = []
        for k, size in enumerate(sizes):
            paths.append(str(tmp_path / f"{number}-{k}.png"))
            Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
        questions.append({"task_type": "A2", "images": paths, "messages": [
            {"role": "user", "content": "<image>" * len(sizes) + "Which way?" * (number + 1)}, {"role": "assistant", "content": "left"}]})
    prompts = refine.open_prompts(student, questions)
    together = refine.generate(student, prompts, 6)
    assert together == [refine.generate(student, [prompt], 6)[0] for prompt in prompts]
    answered = [prompt | {"tokens": tokens} for prompt, tokens in zip(prompts, together)]
    rows = refine.rows_of(student, answered, torch.zeros(3, 1), 3, 10**6)
    inputs, where, tokens = refine.pack(rows)
    pictures = {"pixel_values": torch.cat([row["pixels"] for row in rows]), "image_grid_thw": torch.cat([row["grids"] for row in rows])}
    logits = student.model(**inputs, **pictures, use_cache=False).logits[0, where[1]]
    config = student.model.config
    logits[:, [config.image_token_id, config.video_token_id, config.vision_start_token_id]] = -torch.inf  # as in the rollout
    assert torch.equal(logits.argmax(-1), tokens)


def test_a_picture_token_in_a_response_never_reaches_the_model(run, tmp_path):
    student = student_of(run, tmp_path)
    pad = student.model.config.image_token_id
    with torch.no_grad():
        student.model.lm_head.weight[pad] += 10 * student.model.lm_head.weight.abs().max()  # the picture token is now the likeliest by far
    prompt, = refine.open_prompts(student, refine.read_questions(run / "3_qa/grpo.jsonl", run)[:1])
    responses = refine.generate(student, [prompt], 5, samples=4, uniforms=torch.rand(4, 5))[0]
    assert all(pad not in response for response in responses)


# --- what a step costs -----------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["qwen3", "qwen2.5"])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_flops_are_those_that_torch_counts(run, tmp_path, family, train):
    student = student_of(run, tmp_path, family, "eager")
    if train == "lora":
        with_lora(student, sft)
    frozen = train == "lora"
    rows = sft.rows_of(student, groups_of(run)[:4], True, 10**6)
    with FlopCounterMode(display=False) as counter:
        (-sft.token_logprobs(student, rows).mean()).backward()
    ours = sft.flops(student.model, rows, train, frozen)
    # eager attention multiplies the invisible half too, and a frozen first layer's input gradient is not wanted: a few per cent
    assert 0.85 < ours / counter.get_total_flops() < 1.02


class Saved:
    """Counts the bytes that autograd keeps, weights apart, each storage once."""

    def __init__(self, model):
        self.weights, self.seen = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.weights:
            self.seen[storage.data_ptr()] = storage.nbytes(), tensor  # the tensor is held, or its address might be used again
        return tensor

    def bytes(self):
        return sum(size for size, _ in self.seen.values())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("train", ["full", "lora"])
def test_activations_are_estimated_within_a_fifth(dtype, train):
    config = seven_billion(hidden_size=256, intermediate_size=768, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=2, vocab_size=64)
    cfg = SimpleNamespace(**FULL | dict(train=train, dtype=dtype, freeze_vision=True))
    model = AutoModelForImageTextToText.from_config(config, dtype=sft.weights_dtype(cfg), attn_implementation="sdpa")
    sft.choose_trained(model, cfg)
    model.enable_input_require_grads()
    saved, tokens = Saved(model), 2048
    with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda x: x), torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden = model.model(input_ids=torch.zeros(1, tokens, dtype=torch.long), position_ids=torch.arange(tokens).expand(3, 1, -1),
                             use_cache=False).last_hidden_state
    assert hidden.shape == (1, tokens, 256)
    assert 0.8 < sft.memory(model, cfg, tokens, 1)["activations"] / saved.bytes() < 1.25


def seven_billion(**smaller):
    """Qwen2.5-VL-7B's architecture, as its published configuration gives it."""
    text = dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4,
                rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]), tie_word_embeddings=False) | smaller
    if smaller:
        text["rope_parameters"] = dict(rope_type="default", rope_theta=1e6, mrope_section=[4, 6, 6])
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=text["hidden_size"], patch_size=14, window_size=112,
                  fullatt_block_indexes=[7, 15, 23, 31])
    if smaller:
        vision |= dict(depth=1, hidden_size=80, num_heads=1, intermediate_size=48)
    ids = dict(image_token_id=1, video_token_id=2, vision_start_token_id=3, vision_end_token_id=4) if smaller else {}
    return Qwen2_5_VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=False, **ids)


def test_the_7b_architecture_is_wrapped_counted_and_estimated(tmp_path):
    """On the meta device: LoRA of rank 256 counts as in the peft package, and both stages print the estimate from config.json alone."""
    from peft import LoraConfig, get_peft_model
    config = seven_billion()
    config.save_pretrained(tmp_path / "7b")
    with torch.device("meta"):
        theirs = AutoModelForImageTextToText.from_config(config)
        theirs = get_peft_model(theirs, LoraConfig(r=256, target_modules=r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"))
    trained, total = theirs.get_nb_trainable_parameters()
    assert round((total - trained) / 1e9, 2) == 8.29
    for stage, tower in (("04", 0), ("05", sum(p.numel() for name, p in theirs.named_parameters() if "visual" in name))):
        said = script(stage, "--student", tmp_path / "7b", "--estimate", "--dtype", "bfloat16").stdout
        assert f"{total:,} parameters, {trained + tower:,} trained" in said
        figures = {part.rsplit(" ", 1)[0]: float(part.rsplit(" ", 1)[1]) for part in said.split("estimated: ")[1].split(": ")[0].split(", ")}
        assert abs(figures["weights"] - (2 * (total - trained - tower) + 4 * (trained + tower)) / 1e9) < 0.06  # bfloat16, what trains float32
        assert abs(figures["optimiser"] - 8 * (trained + tower) / 1e9) < 0.06
        assert 30 < float(re.search(r": ([\d.]+) GB", said)[1]) < 80  # fits on one card of 80 GB


# --- runs ------------------------------------------------------------------------------------------------------------------------------

def weights(folder):
    return load_file(folder / "model.safetensors")


def close(a, b, atol):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=atol), name


@pytest.fixture(scope="module")
def undisturbed(run):
    script("04", "--run", run, "--out", "4_whole", *ROAD, "--steps", 6, "--batch", 12, "--optimizer", "muon", "--muon_lr", 1e-3)
    return run / "4_whole"


@pytest.mark.parametrize("before,after", [(1, 2), (2, 1)])
def test_a_state_resumes_on_another_number_of_processes(run, undisturbed, before, after):
    out = run / f"4_{before}to{after}"
    arguments = ["--run", run, "--out", out.name, *ROAD, "--steps", 6, "--batch", 12, "--optimizer", "muon", "--muon_lr", 1e-3, "--save_every", 1]
    launcher = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--"] if before == 2 else [])
    process = subprocess.Popen([*launcher, str(next(ROOT.glob("04*.py"))), *map(str, arguments)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "metrics.jsonl").is_file() or len((out / "metrics.jsonl").read_text().splitlines()) < 4:
        assert process.poll() is None
        time.sleep(0.01)
    for command in Path("/proc").glob("[0-9]*/cmdline"):  # torchrun's workers are not in its process group
        if f"\0{out.name}\0".encode() in command.read_bytes():
            os.kill(int(command.parent.name), signal.SIGKILL)
    process.wait()
    assert "resumed after step" in script("04", *arguments, processes=after).stdout
    assert np.allclose([line["loss"] for line in lines(out / "metrics.jsonl")], [line["loss"] for line in lines(undisturbed / "metrics.jsonl")], atol=1e-4)
    close(weights(out), weights(undisturbed), 2e-3)
    assert not list(out.glob("step_*")) and (out / "curves.png").stat().st_size > 5000


def test_two_processes_with_unequal_parts_validate_as_one(run):
    settings = ["--run", run, *ROAD, "--steps", 1, "--batch", 12, "--val_share", 0.2, "--tokens", 1]  # one picture list a micro-batch
    validation = [q for q in sft.read_questions(run / "3_qa/sft.jsonl", run) if sft.in_validation(q, 0.2)]
    assert len(sft.group_by_pictures(validation, 16)) % 2  # so one process has a micro-batch less
    losses = []
    for processes in (1, 2):
        script("04", *settings, "--out", f"4_validated{processes}", processes=processes)
        losses.append(lines(run / f"4_validated{processes}/metrics.jsonl")[-1]["val_loss"])
    assert abs(losses[0] - losses[1]) < 1e-4


def test_offload_and_sharding_by_one_process_change_nothing(run, undisturbed):
    script("04", "--run", run, "--out", "4_offload", *ROAD, "--steps", 6, "--batch", 12, "--optimizer", "muon", "--muon_lr", 1e-3, "--offload")
    close(weights(run / "4_offload"), weights(undisturbed), 1e-4)


def test_divergence_names_the_step_the_questions_and_a_checkpoint_that_resumes(run):
    settings = ["--run", run, "--out", "4_wild", *ROAD, "--steps", 30, "--batch", 12, "--save_every", 1, "--warmup", 1, "--explode", 1.3, "--lr", 0.3]
    done = script("04", *settings, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stdout
    told = json.loads((run / "4_wild/diverged.json").read_text())
    last = f"4_wild/step_{told['step'] - 2:06}"  # the step before this one may be what broke the weights
    assert f"step {told['step']}: the " in done.stderr and last in done.stderr and (run / last / "model.safetensors").is_file()
    assert len(told["questions"]) == 12 and told["questions"][0].startswith("A2 s") and told["questions"][0] in done.stderr
    script("04", "--run", run, "--out", "4_tame", *ROAD[:-2], "--student", last, "--steps", 2, "--batch", 12)
    again = script("04", *settings, check=False)
    assert f"resumed after step {told['step'] - 2}" in again.stdout


def test_a_loss_that_is_no_number_names_its_own_question(run, tmp_path, monkeypatch):
    student, logprobs = student_of(run, tmp_path), sft.token_logprobs
    rows = sft.rows_of(student, groups_of(run)[:3], True, 10**6)

    def broken_logprobs(student, rows):
        hit = torch.cat([(row["owner"] == 2) & (k == 1) for k, row in enumerate(rows)])
        return logprobs(student, rows).masked_fill(hit, math.nan)

    monkeypatch.setattr(sft, "token_logprobs", broken_logprobs)
    loss, broken = sft.loss_of(student, [rows], SimpleNamespace(dtype="float32", mean="token"), 100, backward=False)
    assert math.isnan(loss) and broken == [rows[1]["names"][2]]


def test_what_counts_as_divergence():
    calm = [1.0, 1.2, 0.9] * 5
    assert sft.diverged(0.5, calm + [40.0], 100) is None
    assert "usually 1" in sft.diverged(0.5, calm + [140.0], 100)
    assert "loss is nan" in sft.diverged(math.nan, calm, 100)
    assert "norm is inf" in sft.diverged(0.5, [math.inf], 100)
    assert sft.diverged(0.01, [0.01] * 20 + [4.5], 100, clip=1.0) is None  # a new question to a student that knows the others by heart
    assert "usually 0.01" in sft.diverged(0.01, [0.01] * 20 + [140.0], 100, clip=1.0)
    assert sft.diverged(0.5, [1.0, 500.0], 100) is None  # the first steps have no history to be judged by


@pytest.mark.parametrize("family", ["qwen3", "qwen2.5"])
def test_any_qwen_vl_folder_trains_refines_and_answers(run, tmp_path, family):
    student = student_of(run, tmp_path, family).source
    lora = ["--lora_rank", 8, "--lora_alpha", 16, "--lr", 1e-3]
    script("04", "--run", run, "--out", f"4_{family}", "--student", student, *lora, "--steps", 2, "--batch", 12, "--val_share", 0)
    script("05", "--run", run, "--out", f"5_{family}", "--student", f"4_{family}", *lora, "--steps", 2, "--prompts", 2, "--max_new_tokens", 6)
    before, after = weights(run / f"4_{family}"), weights(run / f"5_{family}")
    assert any("visual" in name and not torch.equal(before[name], after[name]) for name in before)  # 05 trains the tower
    refined = refine.load_student(str(run / f"5_{family}"), torch.float32, "cpu", "world2vlm", 10**6)
    assert len(refine.generate(refined, refine.open_prompts(refined, refine.read_questions(run / "3_qa/grpo.jsonl", run)[:2]), 4)) == 2
    assert (run / f"5_{family}/adapter/adapter_model.safetensors").is_file() and (run / f"5_{family}/curves.png").is_file()


def test_own_flags_win_over_the_recipe(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["04", "--recipe", "tiny", "--lr", "5"])
    monkeypatch.setattr(sys, "argv", ["04", *sft.recipe(), *sys.argv[1:]])
    cfg = sft.parse(sft.Config)
    assert (cfg.recipe, cfg.lr, cfg.optimizer, cfg.train) == ("tiny", 5.0, "muon", "full")
    monkeypatch.setattr(sys, "argv", ["04"])
    assert sft.recipe() == [] and (sft.parse(sft.Config).lr, sft.parse(sft.Config).lora_rank) == (1e-5, 256)  # the paper's are the defaults
