"""Stages 4 and 5 at scale: accumulation, LoRA, the reference model, sharding, divergence."""

import json
import math
import time
from collections import Counter
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import launch_all, lines, load, script, student_of
from safetensors.torch import load_file

from kernels.generation import generate_groups
from kernels.lora import merge_lora
from kernels.rows import row_logprobs

sft, refine = load("04"), load("05")
ROAD = [
    "--train",
    "full",
    "--freeze_vision",
    "False",
    "--lr",
    "1e-3",
    "--val_share",
    "0",
    "--student",
    "4_base",
]
GRID = {"meters": (0.05, 2.0), "degrees": (5.0, 90.0)}
FAMILIES = pytest.mark.parametrize("family", ["qwen3", "qwen2.5", "qwen3.5"])


def settings(**more):
    base = {"train": "full", "freeze_vision": False, "checkpointing": False, "lora_rank": 8}
    base |= {"dtype": "float32", "seed": 0, "clip_ratio": [0.2], "kl": 0.01, "temperature": 1.0}
    return SimpleNamespace(**base | more)


def groups_of(run):
    return sft.group_by_pictures(sft.read_questions(run / "3_qa/sft.jsonl", run))


def rows_of(student, groups, shared=True, mean="token"):
    cfg = SimpleNamespace(share=shared, tokens=10**6, mean=mean)
    return sum((sft.rows_of(student, group, cfg) for group in groups), [])


def logprobs(student, rows):
    return row_logprobs(student.model, rows, student.tokenizer.pad_token_id)


def gradients(model):
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def close(a, b, atol):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.allclose(a[name], b[name], atol=atol), name


def came_in(student):
    return [weight.clone() for weight in refine.trained_weights(student.model)]


def shaken(student, seed=0):
    """Every weight that trains is moved a little."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in student.model.parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn(p.shape, generator=generator))
    return student


def test_four_passes_of_one_row_give_the_gradient_of_one_pass_of_four(run, tmp_path):
    student = student_of(run, tmp_path)
    groups = [group[: k + 1] for k, group in enumerate(groups_of(run)[:4])]
    rows = rows_of(student, groups)
    total, found = sum(len(row["target"]) for row in rows), []
    for parts in ([rows], [[row] for row in rows]):
        loss, broken = sft.loss_of(student, parts, settings(), total, learn=True)
        found.append((loss, gradients(student.model)))
        assert not broken
    assert abs(found[0][0] - found[1][0]) < 1e-5
    assert max(g.abs().max() for g in found[0][1].values()) > 1e-3
    close(found[0][1], found[1][1], 1e-5)


@pytest.mark.parametrize("mean", ["token", "answer"])
def test_what_weighs_the_same(run, tmp_path, mean):
    """By the definition: the mean over answer tokens, or over answers of the mean of each."""
    student, groups = student_of(run, tmp_path), groups_of(run)[:3]
    turn = "turn left 10 degrees"
    for group, answer in zip(groups, ["yes", turn, f"{turn}; turn right 20 degrees"], strict=True):
        group[0]["messages"][1]["content"] = answer
    alone = [-logprobs(student, [row]).detach() for row in rows_of(student, groups, shared=False)]
    of_tokens = torch.cat(alone).mean()
    of_answers = torch.stack([losses.mean() for losses in alone]).mean()
    rows = rows_of(student, groups, mean=mean)
    weight = sum(float(row["weight"].sum()) for row in rows)
    assert abs(weight - (sum(map(len, alone)) if mean == "token" else len(alone))) < 1e-4
    loss, _ = sft.loss_of(student, [rows[:1], rows[1:]], settings(), weight, learn=False)
    assert abs(loss - (of_tokens if mean == "token" else of_answers)) < 1e-5
    assert abs(of_tokens - of_answers) > 1e-4


@FAMILIES
def test_merged_lora_equals_applied_lora(run, tmp_path, family):
    student = student_of(run, tmp_path, family)
    rows = rows_of(student, groups_of(run)[:3])
    plain = logprobs(student, rows).detach()
    sft.choose_trained(student.model, settings(train="lora", freeze_vision=True), 8)
    applied = logprobs(shaken(student), rows).detach()
    assert merge_lora(student.model) > 0.9
    fresh = student_of(run, tmp_path, family)
    fresh.model.load_state_dict(student.model.state_dict())
    assert (applied - plain).abs().max() > 1e-2
    assert torch.allclose(logprobs(fresh, rows), applied, atol=1e-4)


def test_what_trains_is_float32_and_what_is_frozen_stays_small(run, tmp_path):
    """A learning rate of 1e-6 moves no bfloat16 weight; the checkpoint is bfloat16 again."""
    source = str(run / "4_base")
    student = refine.load_student(source, torch.bfloat16, "cpu", "world2vlm", 10**6)
    refine.choose_trained(student.model, settings(train="lora", dtype="bfloat16"), 8)
    kinds = {(p.requires_grad, p.dtype) for p in student.model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}
    rows = refine.rows_of(student, answered_prompts(student, run), torch.ones(2, 3), 10**6)
    row_logprobs(student.model, rows, student.tokenizer.pad_token_id, half=True).sum().backward()
    weight = student.model.model.visual.blocks[0].mlp.linear_fc1.weight
    before = weight.clone()
    trained = [p for p in student.model.parameters() if p.requires_grad]
    torch.optim.AdamW(trained, lr=1e-6).step()
    assert 0 < (weight - before).abs().max() < 2e-6
    refine.save_student(student, tmp_path / "saved", torch.bfloat16, 0, True)
    saved = load_file(tmp_path / "saved/model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.bfloat16}
    saved = load_file(tmp_path / "saved/adapter/adapter_model.safetensors")
    assert {weight.dtype for weight in saved.values()} == {torch.float32}


def answered_prompts(student, run):
    """Two prompts with three responses each; the last one is its end token only."""
    questions = refine.read_questions(run / "3_qa/grpo.jsonl", run)[:2]
    texts = ("turn left 40 degrees", "turn right 20 degrees", "")
    tokens = [student.tokenizer(text + "<|im_end|>")["input_ids"] for text in texts]
    return [refine.open_prompt(student, one) | {"tokens": tokens} for one in questions]


@pytest.mark.parametrize("train", ["full", "lora"])
def test_reference_is_the_student_that_came_in(run, tmp_path, train):
    """Before training the KL divergence is exactly 0; afterwards the reference has not moved."""
    student, parts = student_of(run, tmp_path), [{}, {}]
    rows = refine.rows_of(student, answered_prompts(student, run), torch.zeros(2, 3), 10**6)
    first = logprobs(student, rows).detach()
    refine.choose_trained(student.model, settings(train=train), 8)
    came, divergences = came_in(student), []
    for part in parts:
        part["rows"] = rows
        divergences.append(float(refine.update(student, came, [part], settings())[0][1]))
        shaken(student)
    assert divergences[0] == 0 and divergences[1] > 1e-3
    assert (parts[1]["old"] - first).abs().max() > 1e-2
    assert torch.allclose(parts[1]["reference"], first, atol=1e-6)


def test_a_group_of_equal_rewards_gives_no_gradient(run, tmp_path):
    student, norms = student_of(run, tmp_path), []
    came = came_in(student)
    for rewards in ([[0.7, 0.7, 0.7], [0.1, 0.1, 0.1]], [[0.7, 0.7, 0.0], [0.1, 0.1, 0.1]]):
        gains = refine.advantages(torch.tensor(rewards))
        rows = refine.rows_of(student, answered_prompts(student, run), gains, 10**6)
        refine.update(student, came, [{"rows": rows}], settings())
        found = gradients(student.model).values()
        norms.append(torch.stack([g.norm() for g in found]).norm())
    assert norms[0] < 1e-6 and norms[1] > 1e-2


def test_rows_cut_by_the_budget_keep_every_advantage(run, tmp_path):
    student = student_of(run, tmp_path)
    gains = torch.tensor([[1.0, -2.0, 3.0], [4.0, -5.0, 6.0]])
    prompts = answered_prompts(student, run)
    whole, cut = (refine.rows_of(student, prompts, gains, most) for most in (10**6, 1))
    assert len(whole) == 2 and len(cut) == 6
    for name in ("advantage", "weight"):
        joined = [torch.cat([row[name] for row in rows]) for rows in (whole, cut)]
        assert torch.equal(*joined)
    assert whole[0]["advantage"].unique().tolist() == [-2.0, 1.0, 3.0]


def counted(model):
    """Counts the forward and backward passes of the MLPs of tower and language model."""
    calls = Counter()
    parts = {"tower": model.model.visual.blocks, "text": model.model.language_model.layers}
    for name, layers in parts.items():
        for layer in layers:  # of its MLP: the layer's own hooks stand outside the checkpoint
            layer.mlp.register_forward_pre_hook(lambda *_, n=name: calls.update([f"{n} forward"]))
            layer.mlp.register_full_backward_hook(lambda *_, n=name: calls.update([f"{n} back"]))
    return calls


@FAMILIES
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_checkpointing_computes_what_trains_twice(run, tmp_path, family, checkpointing, frozen):
    """Also after a rollout, whose model is in eval(): only in train() does it do anything.

    A frozen tower runs once, and nothing goes back through it.
    """
    student = student_of(run, tmp_path, family)
    cfg = settings(train="lora", checkpointing=checkpointing, kl=0, freeze_vision=frozen)
    refine.choose_trained(student.model, cfg, 8)
    rows = refine.rows_of(student, answered_prompts(student, run), torch.ones(2, 3), 10**6)
    calls, layers = counted(student.model.eval()), len(student.model.model.language_model.layers)
    refine.update(student, [], [{"rows": rows}], cfg)
    assert calls["text forward"] == (1 + checkpointing) * layers
    assert calls["text back"] == layers
    blocks = len(student.model.model.visual.blocks)
    assert calls["tower forward"] == blocks * (1 if frozen else 1 + checkpointing)
    assert calls["tower back"] == blocks * (not frozen)


@FAMILIES
def test_training_mode_changes_no_number(run, tmp_path, family):
    student = student_of(run, tmp_path, family)
    rows = refine.rows_of(student, answered_prompts(student, run), torch.ones(2, 3), 10**6)
    found = [
        logprobs(SimpleNamespace(model=mode(), tokenizer=student.tokenizer), rows)
        for mode in (student.model.train, student.model.eval)
    ]
    assert torch.equal(*found)


def test_the_policy_is_learned_at_the_temperature_at_which_it_answers(run, tmp_path):
    """log p of rollout, policy and reference: of logits / temperature, as transformers has it."""
    student, cfg = student_of(run, tmp_path), settings(temperature=0.5, kl=1.0)
    prompts = answered_prompts(student, run)
    rows = refine.rows_of(student, prompts, torch.ones(2, 3), 10**6)
    parts = [{"rows": rows}]
    refine.update(student, came_in(student), parts, cfg)
    expected = []
    for prompt in prompts:
        for tokens in prompt["tokens"]:
            answer = torch.tensor(tokens)
            behind = prompt["positions"].max() + 1 + torch.arange(len(tokens))
            positions = torch.cat([prompt["positions"], behind.expand(3, -1)], 1)[:, None]
            logits = student.model(
                input_ids=torch.cat([prompt["ids"], answer])[None],
                position_ids=positions,
                pixel_values=prompt["pixels"],
                image_grid_thw=prompt["grids"],
                use_cache=False,
            ).logits[0, len(prompt["ids"]) - 1 : -1]
            at_half = (logits / 0.5).log_softmax(-1)
            expected.append(at_half.gather(1, answer[:, None])[:, 0])
    for name in ("old", "reference"):
        assert torch.allclose(parts[0][name], torch.cat(expected), atol=1e-4), name


def test_a_rollout_draws_at_its_temperature(run, tmp_path, monkeypatch):
    student, seen = student_of(run, tmp_path), []
    questions = refine.read_questions(run / "3_qa/grpo.jsonl", run)[:1]
    for temperature in (1.0, 0.01):
        cfg = refine.Config(group=6, max_new_tokens=4, temperature=temperature)
        prompts = [refine.open_prompt(student, one) for one in questions]
        refine.roll_out(student, prompts, 0, GRID, cfg)
        seen.append(prompts[0]["tokens"])
    (greedy,) = generate_groups(student, prompts, 4)
    assert seen[1] == greedy * 6 and seen[0] != seen[1]


@pytest.mark.parametrize("value", [0.7, 0.1, 1 / 3, 0.55])
def test_a_group_of_equals_has_no_advantage_at_all(value):
    rewards = torch.full((1, 7), value)
    assert not refine.advantages(rewards).any()
    rewards[0, 0] = 1
    assert refine.advantages(rewards).sum().abs() < 1e-5


def test_an_answer_cut_off_earns_nothing_and_both_end_tokens_end_one(run, tmp_path, monkeypatch):
    student = student_of(run, tmp_path)
    ends = student.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    student.model.generation_config.eos_token_id = ends
    questions = refine.read_questions(run / "3_qa/grpo.jsonl", run)[:1]
    right = student.tokenizer(questions[0]["messages"][1]["content"])["input_ids"]
    long = student.tokenizer("word " * 60)["input_ids"]
    answers = [right + [ends[0]], right + [ends[1]], right, long]
    monkeypatch.setattr(refine, "generate_groups", lambda *_: [answers])
    prompts = [refine.open_prompt(student, one) for one in questions]
    refine.roll_out(student, prompts, 0, GRID, refine.Config(group=4))
    assert prompts[0]["scores"] == [1, 1, 0, -1]
    assert prompts[0]["right"] == [True, True, False, False]


@pytest.mark.parametrize("end", ["<|im_end|>", "<|endoftext|>"])
def test_every_end_token_of_the_generation_config_ends_a_response(run, tmp_path, end):
    student = student_of(run, tmp_path)
    ends = student.tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    student.model.generation_config.eos_token_id = ends
    likely, head = student.tokenizer.convert_tokens_to_ids(end), student.model.lm_head
    head.register_forward_hook(lambda *a: a[2].index_fill(-1, torch.tensor([likely]), 1e4))
    questions = refine.read_questions(run / "3_qa/grpo.jsonl", run)[:1]
    prompts = [refine.open_prompt(student, one) for one in questions]
    assert generate_groups(student, prompts, 4) == [[[likely]]]
    assert load("06").generate(student, prompts, 4) == [[likely]]


def test_what_is_measured_of_the_groups():
    """Equal groups, spread of the reward in a group, cut answers: over all processes."""
    asked = {"question": {"task_type": "A1"}, "tokens": [[1, 2], [3, 4, 5, 6]]}
    found = refine.measure(
        [
            asked | {"scores": [0.5, 0.5], "cut": [False, True]},
            asked | {"scores": [1.0, 0.0], "cut": [False, False]},
        ]
    )
    assert found["equal"] == 0.5 and found["truncated"] == 0.25
    assert found["spread"] == pytest.approx(0.5**0.5 / 2)
    assert (found["reward"], found["length"], found["rewards"]) == (0.5, 3, {"A1": 0.5})
    assert refine.measure([])["truncated"] == 0


def test_the_entropy_is_that_of_the_drawn_tokens(run, tmp_path):
    """Its estimate, mean over responses of mean over tokens of -log p."""
    student = student_of(run, tmp_path)
    rows = refine.rows_of(student, answered_prompts(student, run), torch.ones(2, 3), 10**6)
    parts = [{"rows": rows}]
    sums, _ = refine.update(student, [], parts, settings(kl=0.0))
    weight = torch.cat([row["weight"] for row in rows])
    assert float(sums[3]) == pytest.approx(-float(parts[0]["old"] @ weight), rel=1e-5)
    assert float(sums[3]) > 1 and weight.sum() == pytest.approx(1)


def test_batches_hold_what_batch_says():
    """Over an epoch exactly; a step at most the last group more."""
    groups = [[{}] * (1 + k % 16) for k in range(400)]
    plan, counts = sft.batches(groups, 100, 0), []
    for _ in range(34):  # 3,400 questions
        batch = next(plan)
        counts.append(sum(map(len, batch)))
        assert counts[-1] - len(batch[-1]) < 100
    assert abs(sum(counts) - 3400) < 16


# --- as runs ---
STEPS = ["--steps", "6", "--batch", "12", "--muon_lr", "1e-3"]


@pytest.fixture(scope="module")
def whole(run):
    script("04", "--run", run, "--out", "4_whole", *ROAD, *STEPS)
    return run / "4_whole"


@pytest.mark.parametrize("before,after", [(1, 2), (2, 1)])
def test_a_state_resumes_on_another_number_of_processes(run, whole, before, after):
    out = run / f"4_{before}to{after}"
    arguments = ["--run", run, "--out", out.name, *ROAD, *STEPS, "--save_every", 1]
    processes, log = launch_all("04", *arguments, processes=before), out / "metrics.jsonl"
    while not log.is_file() or len(log.read_text().splitlines()) < 4:
        assert not [one for one in processes if one.poll() is not None]
        time.sleep(0.01)
    for process in processes:
        process.kill()
        process.wait()
    assert "resumed after step" in script("04", *arguments, processes=after).stdout
    losses = [[line["loss"] for line in lines(at / "metrics.jsonl")] for at in (out, whole)]
    assert np.allclose(*losses, atol=1e-4)
    close(*(load_file(at / "model.safetensors") for at in (out, whole)), 2e-3)
    assert not list(out.glob("step_*")) and (out / "curves.png").stat().st_size > 5000


def test_two_processes_with_unequal_parts_validate_as_one(run):
    arguments = ["--run", run, *ROAD, "--steps", 1, "--batch", 12, "--val_share", 0.2]
    questions = sft.read_questions(run / "3_qa/sft.jsonl", run)
    validation = [question for question in questions if sft.in_validation(question, 0.2)]
    assert len(sft.group_by_pictures(validation)) % 2  # so one process has a pass less
    losses = []
    for processes in (1, 2):
        out = f"4_validated{processes}"
        script("04", *arguments, "--tokens", 1, "--out", out, processes=processes)
        losses.append(lines(run / out / "metrics.jsonl")[-1]["val_loss"])
    assert abs(losses[0] - losses[1]) < 1e-4


def test_divergence_names_the_step_the_questions_and_a_checkpoint(tmp_path, capsys):
    """A step that would spoil the weights ends the run; one of an ordinary norm does not."""
    model = torch.nn.Linear(1, 1, bias=False)
    rows = [{"questions": [{"name": "sft.jsonl line 7"}]}]
    calm = [1.0, 1.2, 0.9] * 5

    def clipped(gradient, norms, loss=0.5):
        model.weight.grad = torch.full_like(model.weight, gradient)
        sft.clip_gradients(model, tmp_path, 9, loss, list(norms), rows, [])

    (tmp_path / "step_000008").mkdir()
    clipped(40.0, calm)
    assert float(model.weight.grad.detach()) == pytest.approx(1, abs=1e-4)  # scaled to MAX_NORM
    clipped(500.0, [1.0])  # the first steps have no history to be judged by
    clipped(4.5, [0.01] * 20)  # a new question to a student that knows the others by heart
    for gradient, loss in ((140.0, 0.5), (1.0, math.nan), (math.inf, 0.5)):
        with pytest.raises(SystemExit):
            clipped(gradient, calm, loss)
        said = capsys.readouterr().err
        assert "step 9" in said and "step_000008" in said and said.count("\n") == 1
        told = json.loads((tmp_path / "diverged.json").read_text())
        assert told["step"] == 9 and told["questions"] == ["sft.jsonl line 7"]


def test_a_loss_that_is_no_number_names_its_own_question(run, tmp_path, monkeypatch):
    student, honest = student_of(run, tmp_path), sft.row_logprobs
    rows = rows_of(student, groups_of(run)[:3])

    def broken_logprobs(model, rows, pad, half):
        hit = torch.cat([(row["owner"] == 2) & (k == 1) for k, row in enumerate(rows)])
        return honest(model, rows, pad).masked_fill(hit, math.nan)

    monkeypatch.setattr(sft, "row_logprobs", broken_logprobs)
    loss, broken = sft.loss_of(student, [rows], settings(), 100, learn=False)
    assert math.isnan(loss) and broken == [rows[1]["questions"][2]["name"]]


@FAMILIES
def test_any_qwen_vl_folder_trains_refines_and_answers(run, tmp_path, family):
    source = student_of(run, tmp_path, family).source
    lora = ["--run", run, "--lr", 1e-3, "--steps", 2]
    sft_flags = ["--out", f"4_{family}", "--student", source, "--batch", 12, "--val_share", 0]
    sft_flags += ["--lora_rank", 8]
    script("04", *lora, *sft_flags)
    flags = ["--out", f"5_{family}", "--student", f"4_{family}", "--prompts", 2]
    script("05", *lora, *flags, "--max_new_tokens", 6)
    folders = [run / f"{stage}_{family}" for stage in (4, 5)]
    before, after = (load_file(folder / "adapter/adapter_model.safetensors") for folder in folders)
    assert before.keys() == after.keys()  # the tower is as it was
    assert not all(torch.equal(before[name], after[name]) for name in before)
    refined = refine.load_student(str(folders[1]), torch.float32, "cpu", "world2vlm", 10**6)
    questions = refine.read_questions(run / "3_qa/grpo.jsonl", run)[:2]
    prompts = [refine.open_prompt(refined, one) for one in questions]
    assert len(generate_groups(refined, prompts, 4)) == 2
    assert (folders[1] / "curves.png").is_file()
