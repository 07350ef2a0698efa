"""With LoRA the product of 04 and 05 is adapter/ over the untouched base: nothing is rounded off.

At a learning rate of 1e-6 weights merged into bfloat16 lose most of what was learned.
"""

import json
import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import lines, load, script, student_of
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from kernels.lora import LoRA, merge_lora
from kernels.generation import generate
from kernels.rows import row_logprobs

sft, refine, evaluation = load("04"), load("05"), load("06")
FAMILIES = pytest.mark.parametrize("family", ["qwen3", "qwen2.5", "qwen3.5"])
LORA = {"train": "lora", "checkpointing": False, "dtype": "float32", "seed": 0, "kl": 0.0}


def settings(**more):
    more = {"freeze_vision": True, "clip_ratio": [0.2], "temperature": 1.0} | more
    return SimpleNamespace(**LORA | more)


def half_base(run, folder, family):
    """A folder with the tiny student of the family, its weights in bfloat16."""
    source, base = student_of(run, folder, family).source, folder / "base"
    shutil.copytree(source, base)
    weights = load_file(base / "model.safetensors")
    weights = {name: weight.bfloat16() for name, weight in weights.items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})
    return base


def loaded(module, folder, dtype=torch.float32):
    return module.load_student(str(folder), dtype, "cpu", "world2vlm", 10**6)


def rows_of(student, run):
    questions = refine.read_questions(run / "3_qa/grpo.jsonl", run)[:2]
    prompts = [refine.open_prompt(student, one) for one in questions]
    texts = ("turn left 40 degrees", "turn right 20 degrees")
    tokens = [student.tokenizer(text + "<|im_end|>")["input_ids"] for text in texts]
    prompts = [prompt | {"tokens": tokens} for prompt in prompts]
    return refine.rows_of(student, prompts, torch.tensor([[1.0, -1.0]] * 2), 10**6)


@torch.no_grad()
def logprobs(student, rows):
    return row_logprobs(student.model.eval(), rows, student.tokenizer.pad_token_id)


def refined(base, run, **more):
    """A student after six steps of 05 at a learning rate of 1e-6, and before."""
    student, cfg = loaded(refine, base), settings(**more)
    refine.choose_trained(student.model, cfg, 8)
    rows = rows_of(student, run)
    before = logprobs(student, rows)
    optimizer = refine.make_adamw(student.model.parameters(), 1e-6)
    for _ in range(6):
        refine.update(student, [], [{"rows": rows}], cfg)
        optimizer.step()
        optimizer.zero_grad()
    return student, rows, before, logprobs(student, rows)


def kept(before, trained, found):
    """The share of the shift that is found again."""
    shift = trained - before
    return float((found - before) @ shift / (shift @ shift))


@FAMILIES
@pytest.mark.parametrize("frozen", [True, False])
def test_06_loads_what_05_learned(run, tmp_path, family, frozen):
    """Log-probabilities to 1e-3 and 95 % of the shift; merged into bfloat16 most of it is lost."""
    base = half_base(run, tmp_path, family)
    student, rows, before, trained = refined(base, run, freeze_vision=frozen)
    out = tmp_path / "5_refine"
    refine.save_student(student, out, torch.bfloat16, 0, False)
    assert not (out / "model.safetensors").exists()
    again = logprobs(loaded(evaluation, out), rows)
    assert (again - trained).abs().max() < 1e-3 and (trained - before).abs().max() > 1e-5
    assert abs(kept(before, trained, again) - 1) < 0.05
    # and on a GPU, where the base stays in bfloat16 beside float32 adapters
    half, questions = (
        loaded(evaluation, out, torch.bfloat16),
        refine.read_questions(run / "3_qa/grpo.jsonl", run),
    )
    prompts = [refine.open_prompt(half, one) for one in questions[:3]]
    assert len(generate(half, prompts, 4)) == 3
    for name, p in student.model.named_parameters():
        p.data = p.data if ".lora_" in name else p.data.bfloat16()
    assert merge_lora(student.model) < 0.1
    merged = {name: w.float() for name, w in student.model.state_dict().items()}
    plain = loaded(refine, base)
    plain.model.load_state_dict(merged)
    assert kept(before, trained, logprobs(plain, rows)) < 0.8
    # a second refinement goes on from there, and its adapter stands alone over the base
    more = loaded(refine, out)
    refine.choose_trained(more.model, settings(), 3)
    assert torch.equal(logprobs(more, rows), again)
    refine.save_student(more, tmp_path / "6", torch.bfloat16, 0, False)
    assert torch.equal(logprobs(loaded(evaluation, tmp_path / "6"), rows), again)
    config = json.loads((tmp_path / "6/adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["r"] == 8


@FAMILIES
@pytest.mark.parametrize("frozen", [True, False])
def test_peft_and_we_load_each_others_adapters(run, tmp_path, family, frozen):
    base = half_base(run, tmp_path, family)
    student, rows, _, trained = refined(base, run, freeze_vision=frozen)
    refine.save_student(student, tmp_path / "ours", torch.bfloat16, 0, False)
    plain = loaded(refine, base)
    theirs = PeftModel.from_pretrained(plain.model, str(tmp_path / "ours/adapter"))
    model = theirs.base_model.model
    assert (
        logprobs(SimpleNamespace(model=model, tokenizer=plain.tokenizer), rows) - trained
    ).abs().max() < 1e-5

    whole = None if frozen else ["visual"]
    config = LoraConfig(
        r=4,
        lora_alpha=12,
        target_modules=r".*language_model.*(q|up)_proj",
        modules_to_save=whole,
        init_lora_weights=False,
    )
    plain = loaded(refine, base)
    theirs = get_peft_model(plain.model, config)
    expected = logprobs(
        SimpleNamespace(model=theirs.base_model.model, tokenizer=plain.tokenizer), rows
    )
    theirs.save_pretrained(tmp_path / "theirs/adapter")
    path = tmp_path / "theirs/adapter/adapter_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": str(base)})
    )
    for module in (sft, refine, evaluation):
        found = logprobs(loaded(module, tmp_path / "theirs"), rows)
        assert torch.allclose(found, expected, atol=1e-5)


B = "model.language_model.layers.0.mlp.up_proj.lora_B"
FAULTS = {
    "kind": "no plain LoRA: LOHA",
    "scale": "no plain LoRA: LORA use_rslora",
    "missing": f"misshapen or unknown: ['{B}']",
    "more": "misshapen or unknown: ['base_model.model.x']",
    "shape": f"misshapen or unknown: ['{B}']",
    "NaN": f"misshapen or unknown: ['{B}']",
    "no base": "nowhere",
    "no config": "adapter_config.json",
    "half a file": "does not load",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_of_an_adapter_is_one_line(run, tmp_path, capsys, fault):
    student = student_of(run, tmp_path)
    refine.choose_trained(student.model, settings(), 2)
    refine.save_student(student, tmp_path, torch.float32, 0, False)
    path, weights = (
        tmp_path / "adapter/adapter_config.json",
        tmp_path / "adapter/adapter_model.safetensors",
    )
    config, tensors = json.loads(path.read_text()), load_file(weights)
    key = f"base_model.model.{B}.weight"
    if fault in ("kind", "scale", "no base"):
        config |= {
            "kind": {"peft_type": "LOHA"},
            "scale": {"use_rslora": True},
            "no base": {"base_model_name_or_path": "/nowhere"},
        }[fault]
    elif fault == "missing":
        del tensors[key]
    elif fault == "more":
        tensors["base_model.model.x"] = tensors[key].clone()
    elif fault == "shape":
        tensors[key] = tensors[key][1:].clone()
    elif fault == "NaN":
        tensors[key][0] = torch.nan
    save_file(tensors, weights)
    path.write_text(json.dumps(config))
    if fault == "no config":
        path.unlink()
    elif fault == "half a file":
        weights.write_bytes(weights.read_bytes()[:100])
    for module in (sft, refine, evaluation):
        with pytest.raises(SystemExit) as ended:
            loaded(module, tmp_path)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and FAULTS[fault] in said and said.count("\n") == 1, said


def test_an_adapter_goes_from_stage_to_stage(run):
    """04 --student, 05, 06 --checkpoint; --train full and --merge end as ordinary checkpoints."""
    usual = ["--run", run, "--lr", 1e-3, "--steps", 2]
    first = [
        "--out",
        "4_first",
        "--student",
        "4_base",
        "--lora_rank",
        4,
        "--batch",
        6,
        "--val_share",
        0,
    ]
    script("04", *usual, *first)
    assert not (run / "4_first/model.safetensors").exists()
    said = script(
        "04", *usual, *first, "--out", "4_second", "--student", "4_first", "--merge"
    ).stdout
    assert " 0 parameters trained" not in said
    assert "merged: " in said and "% of the adapted weights moved" in said
    assert (run / "4_second/model.safetensors").is_file()
    answers = ["--prompts", 2, "--max_new_tokens", 6]
    script(
        "05", *usual, *answers, "--student", "4_second", "--freeze_vision", False, "--out", "5_lora"
    )
    meta = json.loads((run / "5_lora/meta.json").read_text())
    assert meta["base"] == str(run / "4_base") and meta["parent"]["base"] == meta["base"]
    config = json.loads((run / "5_lora/adapter/adapter_config.json").read_text())
    assert config["r"] == 4 and config["modules_to_save"] == ["model.visual"]
    base = load_file(run / "4_base/model.safetensors")
    tower = {
        name: w
        for name, w in load_file(run / "5_lora/adapter/adapter_model.safetensors").items()
        if "visual" in name
    }
    moved = [
        not torch.equal(w, base[name.removeprefix("base_model.model.")])
        for name, w in tower.items()
    ]
    assert len(tower) == sum("visual" in name for name in base) and sum(moved) > 0.9 * len(tower)
    script(
        "06",
        "--run",
        run,
        "--checkpoint",
        "5_lora",
        "--questions",
        "3_qa/grpo.jsonl",
        "--pictures",
        "shown",
    )
    script(
        "04",
        *usual,
        "--train",
        "full",
        "--student",
        "5_lora",
        "--out",
        "4_full",
        "--batch",
        6,
        "--val_share",
        0,
    )
    assert (run / "4_full/model.safetensors").is_file() and not (run / "4_full/adapter").exists()
    two = ["--student", "4_first", "--freeze_vision", False, "--kl", 0.1, *answers]
    for processes in (1, 2):
        script("05", *usual, *two, "--out", f"5_of{processes}", processes=processes)
    losses = [[line["loss"] for line in lines(run / f"5_of{n}/metrics.jsonl")] for n in (1, 2)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert len(load_file(run / "5_of1/adapter/adapter_model.safetensors")) == len(
        load_file(run / "5_of2/adapter/adapter_model.safetensors")
    )


COUNTING = """
import os
from transformers import PreTrainedModel
load = PreTrainedModel.from_pretrained.__func__
def counted(kind, *arguments, **options):
    with open(os.environ["LOADS"], "a") as file:
        file.write("x")
    return load(kind, *arguments, **options)
PreTrainedModel.from_pretrained = classmethod(counted)
"""


@pytest.mark.parametrize("processes", [1, 2])
def test_05_reads_the_weights_once_in_one_process(run, tmp_path, processes):
    env = os.environ | {"LOADS": str(tmp_path / "loads")}
    flags = f"--out 5_loads{processes} --student 4_base --steps 1 --prompts 2 --max_new_tokens 4"
    script("05", "--run", run, *flags.split(), processes=processes, env=env, plant=COUNTING)
    assert (tmp_path / "loads").read_text() == "x"


def test_full_training_starts_from_the_merged_weights(run, tmp_path):
    student = student_of(run, tmp_path)
    refine.choose_trained(student.model, settings(), 4)
    for layer in student.model.modules():
        if isinstance(layer, LoRA):
            torch.nn.init.normal_(layer.lora_B, std=0.02)
    rows = rows_of(student, run)
    applied = logprobs(student, rows)
    student.model.requires_grad_(True)  # as a student is loaded
    refine.choose_trained(student.model, settings(train="full", freeze_vision=False), 4)
    assert torch.allclose(logprobs(student, rows), applied, atol=1e-4)
    assert all(p.requires_grad for p in student.model.parameters())
    assert not any(isinstance(layer, LoRA) for layer in student.model.modules())
