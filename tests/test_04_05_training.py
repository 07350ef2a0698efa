"""Stages 4 and 5 as runs: checkpoints are ordinary, killed and parallel runs equal plain ones."""

import hashlib
import json
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from conftest import launch, lines, load, script, write_lines, write_questions
from safetensors.torch import load_file

from kernels.generation import generate_groups

sft, refine = load("04"), load("05")
TINY = ["--train", "full", "--freeze_vision", "False", "--lr", "1e-3"]


def logged(folder, name="loss"):
    return [line[name] for line in lines(folder / "metrics.jsonl")]


def meta(folder):
    return json.loads((folder / "meta.json").read_text())


def one_line(done, *words):
    """A refusal: status 2, and a line with the words instead of a traceback."""
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr


@pytest.mark.parametrize("number, module", [("04", sft), ("05", refine)])
def test_a_first_try_that_wrote_nothing_binds_no_settings(run, tmp_path, number, module):
    base = run / "4_base"
    for name in ("misspelt", "misspelt too"):
        data = f"{name}.jsonl"
        done = script(number, "--run", tmp_path, "--student", base, "--data", data, check=False)
        one_line(done, f"{data} is missing")
        assert "other settings" not in done.stderr
    module.begin(tmp_path / "stage", {"seed": 0})
    assert module.begin(tmp_path / "stage", {"seed": 1})["config"] == {"seed": 1}
    assert meta(tmp_path / "stage")["config"] == {"seed": 1}
    (tmp_path / "stage/.lock_1_of_2").touch()  # another shard is there, or was
    with pytest.raises(SystemExit):
        module.begin(tmp_path / "stage", {"seed": 2})
    assert meta(tmp_path / "stage")["config"] == {"seed": 1}


def test_own_flags_win_over_the_recipe(monkeypatch):
    """And the defaults are the paper's."""
    found = []
    monkeypatch.setattr(sys, "argv", ["04", "--recipe", "tiny", "--lr", "5"])
    sft.run(found.append, sft.Config)
    monkeypatch.setattr(sys, "argv", ["04"])
    sft.run(found.append, sft.Config)
    tiny, paper = found
    assert (tiny.recipe, tiny.lr, tiny.muon_lr, tiny.train) == ("tiny", 5.0, 4e-3, "full")
    assert (paper.lr, paper.lora_rank, paper.batch, paper.muon_lr) == (1e-5, 256, 128, 0)


@pytest.mark.parametrize("module", [sft, refine])
def test_every_recipe_is_understood(monkeypatch, module):
    for recipe in module.RECIPES:
        monkeypatch.setattr(sys, "argv", ["0N", "--recipe", recipe])
        module.run(lambda cfg: None, module.Config)


def test_smooth_numbers(run):
    student = sft.load_student(str(run / "4_base"), torch.float32, "cpu", "eager", 10**6)
    tokenizer, fresh = student.tokenizer, torch.randn(len(student.tokenizer), 128) * 0.02
    sft.order_numbers(fresh, tokenizer, torch.Generator().manual_seed(0))
    vector = {}
    for v in (300, 310, 900):
        token = tokenizer.tokenize(f"[10, {v}, 990, 500]")[1]
        vector[v] = fresh[tokenizer.convert_tokens_to_ids(token)]
    alike = torch.nn.functional.cosine_similarity
    near, far = (alike(vector[300], vector[v], 0) for v in (310, 900))
    assert near > 0.98 and far < 0.6
    ids = tokenizer("[410, 300, 530, 610]")["input_ids"]
    assert len(ids) == 5 and tokenizer.decode(ids) == "[410, 300, 530, 610]"


FRESH = """
import json, sys, torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor
from peft import PeftModel
root, *students = sys.argv[1:]
for student in students:
    folder, *adapter = student.split("+")
    processor = AutoProcessor.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder)
    if adapter:
        model = PeftModel.from_pretrained(model, adapter[0])
    model.eval()
    answers = []
    for line in open(root + "/3_qa/grpo.jsonl"):
        record = json.loads(line)
        text = record["messages"][0]["content"].replace("<image>", "")
        content = [{"type": "image", "image": Image.open(f"{root}/{p}")} for p in record["images"]]
        content.append({"type": "text", "text": text})
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True,
            tokenize=True, return_dict=True, return_tensors="pt")
        out = model.generate(**inputs, max_new_tokens=10, do_sample=False)
        answers.append(out[0, inputs["input_ids"].shape[1]:].tolist())
    print(json.dumps(answers))
"""


def fresh_answers(run, *students):
    """Of folders, and of a base with an adapter as "base+adapter"; without any code of ours."""
    command = [sys.executable, "-c", FRESH, *map(str, [run, *students])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_checkpoint_and_adapter_give_the_same_answers_in_a_fresh_process(run):
    """Our loader, AutoModel on the merged folder and peft's adapter over the base agree.

    The base answers otherwise.
    """
    lora = "--out 4_lora --student 4_base --lora_rank 8 --lr 3e-2 --steps 8 --val_share 0 --merge"
    script("04", "--run", run, *lora.split())
    student = sft.load_student(str(run / "4_lora"), torch.float32, "cpu", "eager", 10**6)
    questions = refine.read_questions(run / "3_qa/grpo.jsonl", run)
    prompts = [refine.open_prompt(student, one) for one in questions]
    ours = [response for (response,) in generate_groups(student, prompts, 10)]
    merged, base = run / "4_lora", run / "4_base"
    of_merged, of_adapter, of_base = fresh_answers(run, merged, f"{base}+{merged}/adapter", base)
    assert of_merged == of_adapter == ours != of_base


# --- killed, resumed, parallel ---

STAGES = {
    "04": "--student 4_base --steps 8 --batch 12 --val_share 0 --save_every 2",
    "05": "--student 4_base --steps 4 --prompts 4 --group 3 --max_new_tokens 8 --save_every 1 "
    "--baseline greedy --scale batch",
}


def arguments(run, stage, out):
    return ["--run", run, "--out", out, *TINY, *STAGES[stage].split()]


@pytest.fixture(scope="session")
def undisturbed(run):
    """The losses of one plain run of each stage."""
    for stage in STAGES:
        script(stage, *arguments(run, stage, f"{stage}_plain"))
    return {stage: logged(run / f"{stage}_plain") for stage in STAGES}


@pytest.mark.parametrize("stage", STAGES)
def test_killed_and_resumed_run_goes_on_with_the_same_losses(run, undisturbed, stage):
    out, settings = run / f"{stage}_killed", arguments(run, stage, f"{stage}_killed")
    process = launch(stage, *settings)
    while not (out / "metrics.jsonl").is_file() or len(lines(out / "metrics.jsonl")) < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert "resumed after step" in script(stage, *settings).stdout
    assert logged(out) == undisturbed[stage]
    plain = run / f"{stage}_plain/model.safetensors"
    assert (out / "model.safetensors").read_bytes() == plain.read_bytes()
    assert not list(out.glob("step_*"))
    assert "nothing to do" in script(stage, *settings).stdout
    one_line(script(stage, *settings, "--seed", 7, check=False), "seed was 0, now 7")


def test_the_command_and_the_hashes_of_log_and_weights_are_in_meta(run, undisturbed):
    out = run / "04_plain"
    assert "--out 04_plain" in meta(out)["command"]
    sums = meta(out)["sha256"]
    assert {*sums} == {"model.safetensors", "metrics.jsonl"}
    for name, digest in sums.items():
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest


def test_weights_saved_in_bfloat16_are_those_of_float32_rounded(run, undisturbed):
    script("04", *arguments(run, "04", "4_half"), "--save_dtype", "bfloat16")
    folders = (run / "04_plain", run / "4_half")
    whole, half = (load_file(folder / "model.safetensors") for folder in folders)
    assert len(half) == len(whole)
    assert all(torch.equal(half[name], weight.bfloat16()) for name, weight in whole.items())
    student = sft.load_student(str(run / "4_half"), torch.float32, "cpu", "world2vlm", 10**6)
    assert student.model.dtype == torch.float32


UNKNOWN = [("04", "--dtype", "bf16"), ("04", "--schedule", "linear"), ("05", "--train", "qlora")]


@pytest.mark.parametrize("stage,flag,value", [*UNKNOWN, ("06", "--dtype", "float8")])
def test_an_unknown_choice_is_one_line(tmp_path, stage, flag, value):
    done = script(stage, "--run", tmp_path, flag, value, check=False)
    one_line(done, f"argument {flag}: invalid choice: '{value}'")


@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_train_to_the_same_loss(run, undisturbed, stage):
    out = f"{stage}_two"
    torchrun = stage == "04"  # itself; 05 begins with the same lines, and meets its variables
    script(stage, *arguments(run, stage, out), processes=2, fresh=torchrun)
    assert np.allclose(logged(run / out), undisturbed[stage], atol=1e-4)
    if stage == "05":
        for name in ("truncated", "equal", "spread", "entropy"):
            assert np.allclose(logged(run / out, name), logged(run / "05_plain", name), atol=1e-3)
        rewards = (logged(run / folder, "reward") for folder in (out, "05_plain"))
        assert np.allclose(*rewards, atol=1e-4)
    # All processes end in peace: as a user's do, for a fork ends so suddenly that the other may be
    # connecting still.
    again = script(stage, *arguments(run, stage, out), processes=2, fresh=True)
    assert again.stdout.count("nothing to do") == 1


FEW = {
    "04": "--steps 4 --batch 3 --val_share 0",
    "05": "--steps 4 --prompts 2 --group 3 --max_new_tokens 6 --kl 0.1",
}


@pytest.fixture(scope="session")
def broken_pictures(run):
    """A question file of which every other picture list holds a file that is no picture."""
    (run / "no_picture.png").write_text("not a picture")
    records = lines(run / "3_qa/sft.jsonl")
    for record in records:
        if int(record["scene_id"][1:]) % 2:
            record["images"] = [record["images"][0], "no_picture.png"]
    write_lines(run / "3_qa/broken.jsonl", records)
    return "3_qa/broken.jsonl"


@pytest.mark.parametrize("stage", FEW)
def test_a_process_without_rows_keeps_step_with_the_others(run, broken_pictures, stage):
    """A batch is one group, for two and three processes; some pictures open on none, or one."""
    usual = ["--run", run, "--student", "4_base", "--data", broken_pictures, *FEW[stage].split()]
    usual += TINY if stage == "04" else ["--lr", 1e-3]
    found = []
    for processes in (1, 2, 3):
        out = f"{stage}_few{processes}"
        done = script(stage, *usual, "--out", out, processes=processes)
        assert "skipped" in done.stderr and "Traceback" not in done.stderr
        found.append(logged(run / out))
    assert np.allclose(found[0], found[1], atol=1e-4) and np.allclose(found[0], found[2], atol=1e-4)


def test_small_micro_batches_and_no_sharing_give_the_same_losses(run, undisturbed):
    script("04", *arguments(run, "04", "04_micro"), "--tokens", 100)
    script("04", *arguments(run, "04", "04_alone"), "--no_share")
    assert np.allclose(logged(run / "04_micro"), undisturbed["04"], atol=1e-4)
    assert np.allclose(logged(run / "04_alone"), undisturbed["04"], atol=1e-4)


# --- what is read ---


def test_published_format_trains_and_bad_records_are_named(run, tmp_path):
    """The World2VLM demo's layout: marks on lines of their own, no key beside the three needed.

    Some lines are broken.
    """
    data = tmp_path / "demo.jsonl"
    write_questions(data, tmp_path, scenes=4)
    good = lines(data)
    for record in good:
        del record["scene_id"]
        asks = record["messages"][0]
        asks["content"] = asks["content"].replace("<image>", "<image>\n")
    (tmp_path / "text.png").write_text("not a picture")
    first, answer = good[0], good[0]["messages"][1]
    picture_token = {"role": "user", "content": "<image><image><|image_pad|>?"}
    write_lines(data, good)
    bad = [
        first | {"images": ["../outside.png"] * 2},
        first | {"images": first["images"][:1]},
        first | {"images": ["nowhere.png"] * 2},
        first | {"images": ["text.png"] * 2},
        {"task_type": "A1"},
        first | {"messages": [picture_token, answer]},
    ]
    bad = [json.dumps(first)[:40], *map(json.dumps, bad)]
    data.write_text("\n".join([data.read_text().rstrip(), *bad]) + "\n")
    settings = ["--student", "4_base", *TINY, "--batch", 8, "--val_share", 0]
    done = script("04", "--run", run, "--out", "4_demo", "--data", data, *settings)
    assert "Traceback" not in done.stderr
    for words in (
        "demo.jsonl:13: skipped",
        "lies outside the data root",
        "1 images but 2 <image> marks",
        "nowhere.png is missing",
        "text.png",
        "demo.jsonl:18: skipped, not a JSON object with task_type, messages, images",
        "demo.jsonl line 19: skipped, the text holds picture tokens of its own",
    ):
        assert words in done.stderr, words
    assert (run / "4_demo/model.safetensors").is_file()


def test_a_second_file_fills_its_share_of_every_batch(run):
    files = [[[{}] * 3] * 50, [[{}] * 2] * 9]
    cfg = sft.Config(batch=100)
    mixed = sft.mixed_batches(files, cfg)
    sizes = [len(group) for _ in range(6) for group in next(mixed)]
    assert (sizes.count(3), sizes.count(2)) == (170, 45)  # whole groups of 6 x 85 and 6 x 15
    plain = sft.mixed_batches(files[:1], cfg)
    assert [len(next(plain)) for _ in range(3)] == [34, 33, 33]


def test_a_folder_without_a_checkpoint_is_one_line(run, tmp_path):
    settings = ["--run", run, "--out", "4_none", "--student", tmp_path]
    one_line(script("04", *settings, check=False), "does not load")


def test_only_the_tasks_asked_for_are_refined(run, tmp_path):
    records = lines(run / "3_qa/grpo.jsonl")  # all A2
    for number, record in enumerate(records):
        record["task_type"] = ("A1", "A2", "D1")[number % 3]
    write_lines(tmp_path / "some.jsonl", records)
    settings = ["--run", run, "--student", "4_base", *TINY, "--data_root", run]
    settings += ["--data", tmp_path / "some.jsonl"]
    few = "--out 5_some --steps 3 --prompts 4 --group 2 --max_new_tokens 4 --tasks A1 D1"
    script("05", *settings, *few.split())
    assert {task for rewards in logged(run / "5_some", "rewards") for task in rewards} == {
        "A1",
        "D1",
    }
    none = script("05", *settings, "--out", "5_none", "--tasks", "A1", "A9", check=False)
    one_line(none, "no usable question of A9")
