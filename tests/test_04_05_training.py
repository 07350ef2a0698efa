"""Stages 4 and 5: shared prefixes, GRPO and generation are exact; checkpoints are ordinary; resumed and parallel runs equal plain ones."""
import hashlib
import json
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import ROOT, load, script, tiny_qwen25, write_questions
from PIL import Image
from safetensors.torch import load_file

sft, refine = load("04"), load("05")
TINY = ["--train", "full", "--freeze_vision", "False", "--lr", "1e-3", "--log_every", "1"]


def losses(folder, name="loss"):
    return [json.loads(line)[name] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tiny(run, module=sft):
    return module.load_student(str(run / "4_base"), torch.float32, "cpu", "eager", 10**6)


def gradients(student):
    found = torch.cat([p.grad.flatten() for p in student.model.parameters() if p.grad is not None])
    student.model.zero_grad()
    return found


@pytest.mark.parametrize("number, module", [("04", sft), ("05", refine)])
def test_a_first_try_that_wrote_nothing_binds_no_settings(run, tmp_path, number, module):
    for name in ("misspelt", "misspelt too"):
        done = script(number, "--run", tmp_path, "--student", run / "4_base", "--data", f"{name}.jsonl", check=False)
        assert done.returncode == 2 and f"{name}.jsonl is missing" in done.stderr and "other settings" not in done.stderr
    module.begin(tmp_path / "stage", {"seed": 0})
    assert module.begin(tmp_path / "stage", {"seed": 1})["config"] == {"seed": 1}
    assert json.loads((tmp_path / "stage/meta.json").read_text())["config"] == {"seed": 1}
    (tmp_path / "stage/.lock_1_of_2").touch()  # another shard is there, or was
    with pytest.raises(SystemExit):
        module.begin(tmp_path / "stage", {"seed": 2})
    assert json.loads((tmp_path / "stage/meta.json").read_text())["config"] == {"seed": 1}


# --- shared prefixes -------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("family", ["qwen3", "qwen2.5"])
def test_shared_prefix_keeps_loss_and_gradients(run, tmp_path, family):
    student = tiny(run) if family == "qwen3" else tiny_qwen25(run, tmp_path, "eager")
    groups = sft.group_by_pictures(sft.read_questions(run / "3_qa/sft.jsonl", run), 16)
    shared, alone = (sft.rows_of(student, groups, way, 10**6) for way in (True, False))
    assert len(shared) == 12 and len(alone) == 36
    assert sum(len(row["ids"]) for row in shared) < 0.6 * sum(len(row["ids"]) for row in alone)
    results = []
    for rows in (shared, alone):
        logprobs = torch.cat([sft.token_logprobs(student, [row]) for row in rows])
        (-logprobs.mean()).backward()
        results.append((logprobs.detach(), gradients(student)))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-5)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-5)
    assert results[0][1].abs().max() > 1e-3  # the comparison is not one of zeros


def test_questions_would_see_each_other_without_the_mask(run):
    """The same comparison fails when the segments are joined: the mask does the work."""
    student = tiny(run)
    groups = sft.group_by_pictures(sft.read_questions(run / "3_qa/sft.jsonl", run), 16)[:2]
    rows = sft.rows_of(student, groups, True, 10**6)
    right = sft.token_logprobs(student, rows)
    wrong = sft.token_logprobs(student, [row | {"segment": torch.zeros_like(row["segment"])} for row in rows])
    assert (right - wrong).abs().max() > 1e-2


@pytest.mark.parametrize("family", ["qwen3", "qwen2.5"])
def test_positions_are_those_of_transformers(run, tmp_path, family):
    student = tiny(run) if family == "qwen3" else tiny_qwen25(run, tmp_path, "eager")
    grids = torch.tensor([[1, 6, 6], [1, 2, 8], [1, 4, 2]])
    record = {"messages": [{"role": "user", "content": "Look: <image><image> and <image> where is it?"}, {"role": "assistant", "content": "left"}]}
    encoded = sft.encode(student, record, grids)
    types = (encoded["ids"] == student.model.config.image_token_id).int()[None]
    positions, _ = student.model.model.get_rope_index(encoded["ids"][None], mm_token_type_ids=types, image_grid_thw=grids)
    assert torch.equal(positions[:, 0], encoded["positions"])


def test_batched_logprobs_equal_those_of_each_alone(run, tmp_path):
    """One, two and four pictures of different sizes in one padded batch: what public trainers got wrong."""
    student, draw = tiny(run, refine), np.random.default_rng(0)
    rows = []
    for number, sizes in enumerate([[(84, 84)], [(28, 56), (84, 56)], [(56, 56), (28, 28), (84, 28), (56, 84)]]):
        paths = []
        for k, size in enumerate(sizes):
            paths.append(str(tmp_path / f"{number}-{k}.png"))
            Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)).save(paths[-1])
        pixels, grids = refine.look(student, paths)
        record = {"messages": [{"role": "user", "content": "<image>" * len(sizes) + "Which way?" * (number + 1)},
                               {"role": "assistant", "content": "turn left 40 degrees" + "; move forward 1 meters" * number}]}
        rows += refine.share([refine.encode(student, record, grids)], pixels, grids, student.model.config.image_token_id, 10**6)
    together = refine.token_logprobs(student, rows)
    alone = torch.cat([refine.token_logprobs(student, [row]) for row in rows])
    assert torch.allclose(together, alone, atol=1e-4)


# --- generation ------------------------------------------------------------------------------------------------------------------------

def prompts_of(student, questions):
    return refine.open_prompts(student, questions)


def test_batched_generation_equals_transformers_generate(run, tmp_path):
    student = tiny(run, refine)
    write_questions(tmp_path / "one.jsonl", tmp_path, scenes=3, pictures=1, per_scene=1, seed=5)
    questions = refine.read_questions(run / "3_qa/grpo.jsonl", run)[:3] + refine.read_questions(tmp_path / "one.jsonl", tmp_path)
    prompts = prompts_of(student, questions)
    ours = [group[0] for group in refine.generate(student, prompts, 12)]
    config = student.model.config
    never = [config.image_token_id, config.video_token_id, config.vision_start_token_id]
    for prompt, response in zip(prompts, ours):
        types = (prompt["ids"] == student.model.config.image_token_id).int()[None]
        theirs = student.model.generate(input_ids=prompt["ids"][None], attention_mask=torch.ones_like(types), mm_token_type_ids=types,
                                        pixel_values=prompt["pixels"], image_grid_thw=prompt["grids"], max_new_tokens=12, do_sample=False,
                                        suppress_tokens=never)
        assert response == theirs[0, len(prompt["ids"]):].tolist()


def test_sampled_responses_follow_the_distribution_and_their_own_numbers(run):
    student = tiny(run, refine)
    prompts = prompts_of(student, refine.read_questions(run / "3_qa/grpo.jsonl", run)[:2])
    uniforms = torch.rand(2 * 4000, 1, generator=torch.Generator().manual_seed(0))
    together = refine.generate(student, prompts, 1, samples=4000, uniforms=uniforms)
    alone = refine.generate(student, prompts[1:], 1, samples=4000, uniforms=uniforms[4000:])
    assert np.mean([a == b for a, b in zip(together[1], alone[0])]) > 0.999
    out = student.model(input_ids=prompts[1]["ids"][None], position_ids=prompts[1]["positions"][:, None], pixel_values=prompts[1]["pixels"],
                        image_grid_thw=prompts[1]["grids"])
    expected = out.logits[0, -1].float().softmax(-1)
    counts = torch.bincount(torch.tensor(alone[0])[:, 0], minlength=len(expected)) / 4000
    assert (counts - expected).abs().max() < 0.03


# --- GRPO ------------------------------------------------------------------------------------------------------------------------------

def slow_grpo(logprob, old, reference, rewards, lengths, clip_ratio, kl):
    """The equation, response by response and token by token, in float64."""
    flat, total, at = [r for group in rewards for r in group], 0.0, 0
    for k, length in enumerate(lengths):
        group = rewards[k // len(rewards[0])]
        advantage = (flat[k] - np.mean(group)) / (np.std(group, ddof=1) + 1e-4)
        inner = 0.0
        for t in range(at, at + length):
            ratio = np.exp(logprob[t] - old[t])
            gain = min(ratio * advantage, min(max(ratio, 1 - clip_ratio), 1 + clip_ratio) * advantage)
            d = reference[t] - logprob[t]
            inner += kl * (np.exp(d) - d - 1) - gain
        total += inner / length / len(lengths)
        at += length
    return total


def test_grpo_loss_equals_the_slow_one():
    draw = np.random.default_rng(0)
    rewards, lengths = draw.random((3, 4)), draw.integers(1, 7, 12)
    n = lengths.sum()
    logprob, old, reference = (draw.normal(-1, 0.5, n) for _ in range(3))
    advantage = refine.advantages(torch.tensor(rewards)).flatten().repeat_interleave(torch.tensor(lengths))
    weight = torch.tensor(1 / (np.repeat(lengths, lengths) * 12.0))
    loss, parts = refine.grpo_loss(*map(torch.tensor, (logprob, old, reference)), advantage, weight, 0.2, 0.01)
    expected = slow_grpo(logprob, old, reference, rewards.tolist(), lengths.tolist(), 0.2, 0.01)
    assert abs(float(loss) - expected) < 1e-9
    assert 0 < float(parts["clipped"]) < 1
    flipped, _ = refine.grpo_loss(*map(torch.tensor, (logprob, old, reference)), -advantage, weight, 0.2, 0.01)
    assert abs(float(flipped) - expected) > 1e-3


def test_equal_rewards_teach_nothing_and_a_model_has_no_distance_from_itself():
    logprob = torch.randn(8, requires_grad=True)
    advantage = refine.advantages(torch.full((2, 4), 0.7)).flatten()
    loss, parts = refine.grpo_loss(logprob, logprob.detach(), logprob.detach(), advantage, torch.full((8,), 1 / 8), 0.2, 1.0)
    loss.backward()
    assert float(parts["kl"]) == 0 and advantage.abs().max() == 0 and logprob.grad.abs().max() == 0


def test_grpo_makes_the_better_response_likelier(run):
    student = tiny(run, refine)
    prompt, = prompts_of(student, refine.read_questions(run / "3_qa/grpo.jsonl", run)[:1])
    tokens = [student.tokenizer(text + "<|im_end|>")["input_ids"] for text in ("turn left 40 degrees", "turn right 20 degrees")]
    row = refine.rows_of(student, [prompt | {"tokens": tokens}], refine.advantages(torch.tensor([[1.0, 0.0]])), 2, 10**6)
    before = refine.token_logprobs(student, row)
    loss, _ = refine.grpo_loss(before, before.detach(), before.detach(), row[0]["advantage"], row[0]["weight"], 0.2, 0.01)
    loss.backward()
    with torch.no_grad():
        for p in student.model.parameters():
            p -= 0.01 * p.grad
    change = (refine.token_logprobs(student, row) - before).detach()
    assert change[row[0]["owner"] == 0].sum() > 0 > change[row[0]["owner"] == 1].sum()


# --- what is trained -------------------------------------------------------------------------------------------------------------------

def test_muon_steps_along_the_nearest_orthogonal_matrix():
    torch.manual_seed(0)
    for shape in ((24, 40), (40, 24)):
        p = torch.nn.Parameter(torch.zeros(shape))
        p.grad = torch.randn(shape)
        sft.Muon([p], lr=1.0, weight_decay=0.0).step()
        u, _, v = torch.linalg.svd(p.grad, full_matrices=False)
        step = -p.detach() / max(1, shape[0] / shape[1]) ** 0.5
        assert torch.linalg.svdvals(step).sub(1).abs().max() < 0.4        # five iterations give singular values near 1, not 1
        assert torch.nn.functional.cosine_similarity(step.flatten(), (u @ v).flatten(), 0) > 0.97


def test_smooth_numbers(run):
    student = tiny(run)
    fresh = torch.randn(len(student.tokenizer), 128) * 0.02
    sft.order_numbers(fresh, student.tokenizer, torch.Generator().manual_seed(0))
    vector = {v: fresh[student.tokenizer.convert_tokens_to_ids(student.tokenizer.tokenize(f"[10, {v}, 990, 500]")[1])] for v in (300, 310, 900)}
    near, far = (torch.nn.functional.cosine_similarity(vector[300], vector[v], 0) for v in (310, 900))
    assert near > 0.98 and far < 0.6
    assert student.tokenizer.decode(student.tokenizer("[410, 300, 530, 610]")["input_ids"]) == "[410, 300, 530, 610]"
    assert len(student.tokenizer("[410, 300, 530, 610]")["input_ids"]) == 5


FRESH = """
import json, sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
folder, root = sys.argv[1:3]
processor = AutoProcessor.from_pretrained(folder)
if len(sys.argv) > 3:
    from peft import PeftModel
    model = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(sys.argv[3]), folder + "/adapter").eval()
else:
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
for line in open(root + "/3_qa/grpo.jsonl"):
    record = json.loads(line)
    content = [{"type": "image", "image": Image.open(f"{root}/{path}")} for path in record["images"]]
    content.append({"type": "text", "text": record["messages"][0]["content"].replace("<image>", "")})
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    print(model.generate(**inputs, max_new_tokens=10, do_sample=False)[0, inputs["input_ids"].shape[1]:].tolist())
"""


def fresh_answers(*arguments):
    done = subprocess.run([sys.executable, "-c", FRESH, *map(str, arguments)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_checkpoint_and_adapter_give_the_same_answers_in_a_fresh_process(run):
    """A LoRA run: our loader, AutoModel on the merged folder, and peft's adapter over the base agree, and the base answers otherwise."""
    script("04", "--run", run, "--out", "4_lora", "--student", "4_base", "--lora_rank", 8, "--lora_alpha", 16, "--lr", 3e-2, "--steps", 8, "--val_share", 0)
    student = refine.load_student(str(run / "4_lora"), torch.float32, "cpu", "eager", 10**6)
    ours = [group[0] for group in refine.generate(student, prompts_of(student, refine.read_questions(run / "3_qa/grpo.jsonl", run)), 10)]
    assert fresh_answers(run / "4_lora", run) == ours
    assert fresh_answers(run / "4_lora", run, run / "4_base") == ours
    assert fresh_answers(run / "4_base", run) != ours


# --- runs ------------------------------------------------------------------------------------------------------------------------------

STAGES = {"04": ["--student", "4_base", "--steps", 8, "--batch", 12, "--val_share", 0, "--save_every", 2],
          "05": ["--student", "4_base", "--steps", 4, "--prompts", 4, "--group", 3, "--max_new_tokens", 8, "--save_every", 1]}


@pytest.fixture(scope="session")
def undisturbed(run):
    """The losses of one plain run of each stage."""
    for stage, settings in STAGES.items():
        script(stage, "--run", run, "--out", f"{stage}_plain", *TINY, *settings)
    return {stage: losses(run / f"{stage}_plain") for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_run_goes_on_with_the_same_losses(run, undisturbed, stage):
    out = run / f"{stage}_killed"
    path, = ROOT.glob(f"{stage}*.py")
    arguments = [sys.executable, str(path), "--run", run, "--out", out.name, *TINY, *STAGES[stage]]
    process = subprocess.Popen([str(a) for a in arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while not (out / "metrics.jsonl").is_file() or len((out / "metrics.jsonl").read_text().splitlines()) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = script(stage, "--run", run, "--out", out.name, *TINY, *STAGES[stage])
    assert "resumed after step" in done.stdout
    assert losses(out) == undisturbed[stage]
    assert (out / "model.safetensors").read_bytes() == (run / f"{stage}_plain/model.safetensors").read_bytes()
    assert "nothing to do" in script(stage, "--run", run, "--out", out.name, *TINY, *STAGES[stage]).stdout
    refused = script(stage, "--run", run, "--out", out.name, *TINY, *STAGES[stage], "--seed", 7, check=False)
    assert refused.returncode == 2 and "seed was 0, now 7" in refused.stderr


def test_a_run_that_left_off_goes_on_and_its_log_and_weights_bear_their_hashes(run, undisturbed):
    """--until leaves off as a kill would; the first losses are those of the whole run. meta.json names command and hashes."""
    short = script("04", "--run", run, "--out", "4_until", *TINY, *STAGES["04"], "--until", 2)
    assert "left off after step 2" in short.stdout and not json.loads((run / "4_until/meta.json").read_text())["finished"]
    assert losses(run / "4_until") == undisturbed["04"][:2]
    script("04", "--run", run, "--out", "4_until", *TINY, *STAGES["04"])
    assert losses(run / "4_until") == undisturbed["04"]
    meta = json.loads((run / "4_until/meta.json").read_text())
    assert "--out 4_until" in meta["command"] and {*meta["sha256"]} == {"model.safetensors", "metrics.jsonl"}
    for name, digest in meta["sha256"].items():
        assert hashlib.sha256((run / "4_until" / name).read_bytes()).hexdigest() == digest


def test_weights_saved_in_bfloat16_are_those_of_float32_rounded(run, undisturbed):
    script("04", "--run", run, "--out", "4_half", *TINY, *STAGES["04"], "--save_dtype", "bfloat16")
    whole, half = (load_file(folder / "model.safetensors") for folder in (run / "04_plain", run / "4_half"))
    assert all(torch.equal(half[name], weight.bfloat16()) for name, weight in whole.items()) and len(half) == len(whole)
    assert sft.load_student(str(run / "4_half"), torch.float32, "cpu", "world2vlm", 10**6).model.dtype == torch.float32


@pytest.mark.parametrize("stage,flag,value", [("04", "--dtype", "bf16"), ("04", "--schedule", "linear"), ("05", "--train", "qlora"), ("06", "--dtype", "float8")])
def test_an_unknown_choice_is_one_line(tmp_path, stage, flag, value):
    done = script(stage, "--run", tmp_path, flag, value, check=False)
    assert done.returncode == 2 and f"argument {flag}: invalid choice: '{value}'" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_to_the_same_loss(run, undisturbed, stage):
    script(stage, "--run", run, "--out", f"{stage}_two", *TINY, *STAGES[stage], processes=2)
    assert np.allclose(losses(run / f"{stage}_two"), undisturbed[stage], atol=1e-4)
    if stage == "05":
        assert np.allclose(losses(run / "05_two", "reward"), losses(run / "05_plain", "reward"), atol=1e-4)


def test_small_micro_batches_and_no_sharing_give_the_same_losses(run, undisturbed):
    script("04", "--run", run, "--out", "04_micro", *TINY, *STAGES["04"], "--tokens", 100)
    script("04", "--run", run, "--out", "04_alone", *TINY, *STAGES["04"], "--no_share")
    assert np.allclose(losses(run / "04_micro"), undisturbed["04"], atol=1e-4)
    assert np.allclose(losses(run / "04_alone"), undisturbed["04"], atol=1e-4)


def test_published_format_trains_and_bad_records_are_named(run, tmp_path):
    """The World2VLM demo's layout: marks on lines of their own, no key beside task_type, messages and images; some lines are broken."""
    write_questions(tmp_path / "images.jsonl", tmp_path, scenes=4)
    good = [json.loads(line) for line in (tmp_path / "images.jsonl").read_text().splitlines()]
    for record in good:
        del record["scene_id"]
        record["messages"][0]["content"] = record["messages"][0]["content"].replace("<image>", "<image>\n")
    (tmp_path / "text.png").write_text("not a picture")
    first = good[0]
    bad = [json.dumps(first)[:40], json.dumps(first | {"images": ["../outside.png"] * 2}), json.dumps(first | {"images": first["images"][:1]}),
           json.dumps(first | {"images": ["nowhere.png"] * 2}), json.dumps(first | {"images": ["text.png"] * 2}), json.dumps({"task_type": "A1"}),
           json.dumps(first | {"messages": [{"role": "user", "content": "<image><image><|image_pad|>?"}, first["messages"][1]]})]
    (tmp_path / "demo.jsonl").write_text("\n".join([json.dumps(record) for record in good] + bad) + "\n")
    done = script("04", "--run", run, "--out", "4_demo", "--data", tmp_path / "demo.jsonl", "--student", "4_base", *TINY, "--batch", 8, "--val_share", 0)
    assert "Traceback" not in done.stderr
    for words in ("demo.jsonl:13: skipped", "lies outside the data root", "1 images but 2 <image> marks", "nowhere.png is missing", "text.png",
                  "demo.jsonl:18: skipped, no messages, images", "picture tokens of its own"):
        assert words in done.stderr, words
    assert (run / "4_demo/model.safetensors").is_file()


def test_a_folder_without_a_checkpoint_is_one_line(run, tmp_path):
    done = script("04", "--run", run, "--out", "4_none", "--student", tmp_path, check=False)
    assert done.returncode == 2 and "does not load" in done.stderr and "Traceback" not in done.stderr


def test_only_the_tasks_asked_for_are_refined(run, tmp_path):
    records = [json.loads(line) for line in (run / "3_qa/grpo.jsonl").read_text().splitlines()]  # all A2
    data = tmp_path / "some.jsonl"
    data.write_text("".join(json.dumps(record | {"task_type": ("A1", "A2", "D1")[number % 3]}) + "\n" for number, record in enumerate(records)))
    refine = ["05", "--run", run, "--student", "4_base", "--data", data, "--data_root", run, *TINY]
    script(*refine, "--out", "5_some", "--steps", 3, "--prompts", 4, "--group", 2, "--max_new_tokens", 4, "--tasks", "A1", "D1")
    trained = {task for line in (run / "5_some/metrics.jsonl").read_text().splitlines() for task in json.loads(line)["rewards"]}
    assert trained == {"A1", "D1"}
    done = script(*refine, "--out", "5_none", "--tasks", "A1", "A9", check=False)
    assert done.returncode == 2 and "no usable question of A9" in done.stderr and "Traceback" not in done.stderr
