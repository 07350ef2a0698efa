"""Ours against TRL's trainers: the seconds of a step of 04_train_sft.py and SFTTrainer, of 05_train_refine.py and GRPOTrainer.

Same machine, threads, checkpoint (3 million parameters, random), questions, batch, AdamW and learning rate, float32, every weight trained
(in the rows "tower frozen", as the paper's SFT has it, those of the language model), no gradient checkpointing. Every step trains on the whole question file, so that the loss of the first step must be the same number on both
sides; in GRPO no response ever ends early, so that both generate the same number of tokens. Both are checked in every run. About half of
the responses hold a word beyond the reward's limit of 200 characters and earn -1, the others nothing: advantages and gradients are not 0.

Ours and theirs run by turns, each as a process of its own, `repeats` times. A step lasts from the line that reports the step before to the
line that reports it: reading and preparing the pictures counts on both sides. The first `warm` steps do not count; a run counts as the
median of the rest, a row of the table as the median of its runs; the ratio's range is over the pairs of neighbouring runs. `cpu` is the
ratio of the processor seconds of a step, which other work on the machine disturbs less than the clock.

TRL gets what was fastest for it here (PEERS below; --tune measures it again); our scripts run with --tokens 4096. TRL's packing and
padding-free batches refuse pictures, its continuous batching is not given them, and vLLM has no place on a CPU. Both sides prepare
pictures with transformers' PIL processor (torchvision has no build for this torch).

Run     make peers        (makes .venv-peers, where TRL is; ours runs in .venv)
"""
import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve()
PEER_PYTHON = HERE.parents[1] / ".venv-peers/bin/python"
QUESTIONS, PROMPTS, GROUP, NEW_TOKENS = 24, 8, 4, 16          # a step of SFT; a step of GRPO
PICTURE = 448, 224                                           # pixels: 16 x 8 = 128 tokens of a picture, 256 of a pair
LR, BETAS, WEIGHT_DECAY, KL = 1e-6, (0.9, 0.95), 0.1, 1e-2
PEERS = {"attention": "sdpa", "sft_rows": 24, "grpo_rows": 32, "workers": 0}
TUNE = [{"attention": "eager"}, {"sft_rows": 6, "grpo_rows": 8}, {"sft_rows": 2, "grpo_rows": 4}, {"workers": 1},
        {"workers": 2}]
ROWS = {"SFT, 6 questions a pair, tower frozen": ("sft", 6, True, "questions/s", QUESTIONS, 4.0),  # stage, questions a pair, frozen, unit,
        "SFT, 6 questions a pair": ("sft", 6, False, "questions/s", QUESTIONS, 4.0),               # how many a step, target
        "SFT, 1 question a pair, tower frozen": ("sft", 1, True, "questions/s", QUESTIONS, 1.2),
        "SFT, 1 question a pair": ("sft", 1, False, "questions/s", QUESTIONS, 1.2),
        f"GRPO, {PROMPTS} prompts x {GROUP}": ("grpo", 1, False, "responses/s", PROMPTS * GROUP, 2.5)}

# The words of stage 3: questions of about 30 tokens, answers of 2 to 10.
TEXTS = [("A3", "Which 2 or 3 actions did the camera do from image 1 to image 2, in order?",
          "turn right 30 degrees; move forward 1 meters"),
         ("A2", "Which way and how far did the camera turn from image 1 to image 2?", "turn left 40 degrees"),
         ("A4", "From image 1 to image 2 the camera did: turn left 40 degrees. True or false?", "true"),
         ("D1", "The red lamp is at [410, 300, 530, 610] in image 1. The camera did: turn left 40 degrees. Where is it in image 2?",
          "[620, 300, 740, 610]"),
         ("D3", "The red lamp is at [410, 300, 530, 610] in image 1, at [620, 300, 740, 610] in image 2. Which 1 or 2 actions did the "
          "camera do, in order?", "turn left 40 degrees"),
         ("D4", "The red lamp is at [410, 300, 530, 610] in image 1. The camera did: turn left 40 degrees. Is the lamp at [620, 300, 740, "
          "610] in image 2 the same one?", "yes")]
LONG = "o" * 201                                               # one token; no question holds it, see write_checkpoint
# What TRL makes of a prompt and its completion must be, token for token, what our scripts make of it: no line break behind <|im_end|>.
CHAT = ("{% for message in messages %}<|im_start|>{{ message.role }}\n{% for part in message.content %}{{ '<|vision_start|><|image_pad|>"
        "<|vision_end|>' if part.type == 'image' else part.text }}{% endfor %}<|im_end|>{% endfor %}{{ '<|im_start|>assistant\n' if "
        "add_generation_prompt }}")


# What both sides read ------------------------------------------------------------------------------------------------------------------

def write_questions(run: Path, name: str, count: int, a_pair: int):
    """`count` questions, `a_pair` about each pair of pictures (smooth noise, which compresses as a photograph does)."""
    import numpy as np
    from PIL import Image
    draw, lines = np.random.default_rng(0), []
    for i in range(count):
        images = [f"2_views/{name}/{i // a_pair:03}_{k}.png" for k in (0, 1)]
        if i % a_pair == 0:
            for image in images:
                (run / image).parent.mkdir(parents=True, exist_ok=True)
                dots = Image.fromarray(draw.integers(0, 256, (8, 16, 3), dtype=np.uint8))
                dots.resize(PICTURE, Image.Resampling.BICUBIC).save(run / image)
        task, question, answer = TEXTS[i % len(TEXTS)]
        lines.append({"task_type": task, "scene_id": f"s{i // a_pair}", "images": images, "messages": [
            {"role": "user", "content": "<image><image>" + question}, {"role": "assistant", "content": answer}]})
    (run / "3_qa").mkdir(exist_ok=True)
    (run / f"3_qa/{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def write_checkpoint(folder: Path):
    """The tiny student of 04 with weights shaken so that every picture matters, a common chat format, and no end of a response.

    Every token's vector starts with 1, so that the first number of the last hidden state is well above 0. The output layer has the same
    vectors: the end token and those of pictures, which start with -4, get a probability of nothing, the overlong word, with 1.6, that of
    many others.
    """
    import torch
    from conftest import load
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer
    load("04").build_tiny(folder, [text for _, *texts in TEXTS for text in texts] + ["user assistant", LONG], seed=0)
    generator, weights, tokenizer = torch.Generator().manual_seed(1), folder / "model.safetensors", AutoTokenizer.from_pretrained(folder)
    shaken = {name: w + 0.02 * torch.randn(w.shape, generator=generator) for name, w in load_file(weights).items()}
    embedding = shaken["model.language_model.embed_tokens.weight"]
    embedding[:, 0] = 1
    embedding[tokenizer.convert_tokens_to_ids(LONG), 0] = 1.6
    never = ["<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|image_pad|>", "<|video_pad|>"]
    embedding[tokenizer.convert_tokens_to_ids(never), 0] = -4
    save_file(shaken, weights, metadata={"format": "pt"})
    (folder / "chat_template.jinja").write_text(CHAT)
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["size"]["longest_edge"] = PICTURE[0] * PICTURE[1]
    (folder / "processor_config.json").write_text(json.dumps(processor))


# Theirs (runs in .venv-peers) ------------------------------------------------------------------------------------------------------------

def theirs(stage: str, run: Path, data: str, steps: int, settings: dict):
    """`steps` steps of SFTTrainer or GRPOTrainer; prints a line a step and what TRL logs of the first."""
    from datasets import Dataset, Image
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    class Report(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            print(f"step {state.global_step}", flush=True)

        def on_log(self, args, state, control, logs=None, **_):
            print("first " + json.dumps(logs), flush=True)

    records = []
    for line in (run / data).read_text().splitlines():
        record = json.loads(line)
        question, answer = (message["content"] for message in record["messages"])
        records.append({"prompt": [{"role": "user", "content": question.replace("<image>", "")}],
                        "completion": [{"role": "assistant", "content": answer}],
                        "images": [str(run / image) for image in record["images"]]})
    dataset = Dataset.from_list(records).cast_column("images", [Image()])  # decoded when a batch is made
    batch, rows = (len(records), settings["sft_rows"]) if stage == "sft" else (len(records) * GROUP, settings["grpo_rows"])
    common = dict(
        output_dir=str(run / "theirs"), max_steps=steps, per_device_train_batch_size=rows, gradient_accumulation_steps=batch // rows,
        learning_rate=LR, lr_scheduler_type="constant", adam_beta1=BETAS[0], adam_beta2=BETAS[1], weight_decay=WEIGHT_DECAY,
        max_grad_norm=1.0, bf16=False, use_cpu=True, gradient_checkpointing=False, dataloader_num_workers=settings["workers"],
        dataloader_persistent_workers=settings["workers"] > 0, logging_first_step=True, logging_steps=steps + 1, disable_tqdm=True,
        save_strategy="no", report_to="none",
        model_init_kwargs={"dtype": "float32", "attn_implementation": settings["attention"]})
    if stage == "sft":
        trainer = SFTTrainer(str(run / "checkpoint"), SFTConfig(max_length=None, completion_only_loss=True, **common),
                             train_dataset=dataset, callbacks=[Report()])
        trainer.model.model.visual.requires_grad_(not settings["frozen"])
    else:
        def overlong(completions, **_):  # what 05's reward comes to for responses of random words
            return [-1.0 if len(said[0]["content"].strip()) > 200 else 0.0 for said in completions]

        trainer = GRPOTrainer(str(run / "checkpoint"), overlong, GRPOConfig(
            num_generations=GROUP, max_completion_length=NEW_TOKENS, temperature=1.0, beta=KL, loss_type="grpo", **common),
            train_dataset=dataset, callbacks=[Report()])
    trainer.train()


# The measurement -------------------------------------------------------------------------------------------------------------------------

def our_command(stage: str, run: Path, data: str, steps: int, frozen: bool) -> list:
    common = ["--run", run, "--out", "ours", "--student", "checkpoint", "--data", data, "--steps", steps, "--train", "full", "--lr", LR,
              "--warmup", 0, "--weight_decay", WEIGHT_DECAY, "--save_every", 10**6, "--log_every", 1, "--checkpointing", "False", "--tokens", 4096]  # as TRL's rows: the fastest of those tried
    if stage == "sft":
        return [next(HERE.parents[1].glob("04*.py")), *common, "--batch", QUESTIONS, "--freeze_vision", frozen, "--schedule", "constant",
                "--val_share", 0]
    return [next(HERE.parents[1].glob("05*.py")), *common, "--prompts", PROMPTS, "--group", GROUP, "--max_new_tokens", NEW_TOKENS,
            "--kl", KL]


def processor_seconds(pid: int) -> float:
    """User and system time of a running process and its finished children (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def timed(command: list, log: Path, warm: int) -> tuple[float, float]:
    """Run a command; the medians of seconds and processor seconds between its lines that begin with `step`, but the first `warm`."""
    times, environment = [], os.environ | {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    command = [*map(str, command)]
    with open(log, "w") as file, open(log.with_suffix(".err"), "w") as errors, \
            subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment) as process:
        for line in process.stdout:
            if line.startswith("step"):
                times.append((time.perf_counter(), processor_seconds(process.pid)))
            file.write(line)
    if process.returncode:
        sys.exit(f"{HERE.name}: {command[1]} failed: see {log} and {log.with_suffix('.err')}")
    steps = [(after[0] - before[0], after[1] - before[1]) for before, after in zip(times[warm - 1:], times[warm:])]
    return tuple(map(statistics.median, zip(*steps)))


def first_step(stage: str, run: Path, log: Path | None) -> float:
    """What must agree: the loss of the first SFT step, the mean length of a response in the first GRPO step. `log` is TRL's."""
    if log is None:
        line = json.loads((run / "ours/metrics.jsonl").read_text().splitlines()[0])
        return line["loss" if stage == "sft" else "length"]
    line = next(json.loads(line.removeprefix("first ")) for line in log.read_text().splitlines() if line.startswith("first "))
    return float(line["loss" if stage == "sft" else "completions/mean_length"])


def run_ours(stage: str, run: Path, data: str, steps: int, warm: int, frozen: bool) -> tuple[tuple[float, float], float]:
    """((seconds, processor seconds) of a step, what `first_step` reads)."""
    shutil.rmtree(run / "ours", ignore_errors=True)
    seconds = timed([sys.executable, *our_command(stage, run, data, steps, frozen)], run / "ours.log", warm)
    return seconds, first_step(stage, run, None)


def run_theirs(stage: str, run: Path, data: str, steps: int, warm: int, settings: dict) -> tuple[tuple[float, float], float]:
    seconds = timed([PEER_PYTHON, HERE, "--theirs", stage, "--run", run, "--data", data, "--steps", steps,
                     "--settings", json.dumps(settings)], run / "theirs.log", warm)
    return seconds, first_step(stage, run, run / "theirs.log")


def compare(name: str, run: Path, steps: int, warm: int, repeats: int) -> dict:
    """One row: ours and theirs by turns."""
    stage, a_pair, frozen, unit, count, target = ROWS[name]
    data = f"3_qa/{stage}{a_pair}.jsonl"
    pairs = []
    for k in range(repeats):
        ours, our_first = run_ours(stage, run, data, steps, warm, frozen)
        trl, trl_first = run_theirs(stage, run, data, steps, warm, PEERS | {"frozen": frozen})
        if abs(our_first - trl_first) > 1e-4 * abs(trl_first):
            sys.exit(f"{HERE.name}: {name}: the first step gives {our_first} here and {trl_first} in TRL: not the same work")
        pairs.append((ours, trl))
        print(f"  {name}, {k + 1} of {repeats}: {ours[0]:.3f} s a step, TRL {trl[0]:.3f} s; processor {ours[1]:.2f} s, {trl[1]:.2f} s",
              flush=True)
    (ours, our_cpu), (trl, trl_cpu) = (map(statistics.median, zip(*side)) for side in zip(*pairs))
    ratios = [theirs[0] / mine[0] for mine, theirs in pairs]
    return {"row": name, "unit": unit, "ours": count / ours, "trl": count / trl, "ratio": trl / ours, "ratio_min": min(ratios),
            "ratio_max": max(ratios), "cpu_ratio": trl_cpu / our_cpu, "target": target,
            "seconds": pairs, "first_step": [our_first, trl_first]}


def tune(run: Path, steps: int, warm: int):
    """TRL's seconds a step with PEERS and with each of TUNE's changes to it."""
    for name, (stage, a_pair, frozen, *_) in ROWS.items():
        for change in [{}, *TUNE]:
            seconds, _ = run_theirs(stage, run, f"3_qa/{stage}{a_pair}.jsonl", steps, warm, PEERS | change | {"frozen": frozen})
            print(f"  TRL, {name}: {seconds[0]:.3f} s a step, processor {seconds[1]:.2f} s, with {PEERS | change}", flush=True)


def versions() -> dict:
    asked = "import importlib.metadata as m, json; print(json.dumps({n: m.version(n) for n in ('torch', 'transformers', 'trl')}))"
    return json.loads(subprocess.run([PEER_PYTHON, "-c", asked], capture_output=True, text=True, check=True).stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, default=Path("runs/peers"), help="folder for the questions, the checkpoint and peers.json")
    parser.add_argument("--steps", type=int, default=8, help="steps of a run")
    parser.add_argument("--warm", type=int, default=2, help="first steps that do not count")
    parser.add_argument("--repeats", type=int, default=3, help="pairs of runs a row")
    parser.add_argument("--only", default="", help="rows whose name begins so, e.g. GRPO")
    parser.add_argument("--tune", action="store_true", help="measure TRL's settings instead")
    parser.add_argument("--theirs", choices=["sft", "grpo"], help=argparse.SUPPRESS)
    parser.add_argument("--data", help=argparse.SUPPRESS)
    parser.add_argument("--settings", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.theirs:  # this process was started by run_theirs
        return theirs(args.theirs, args.run, args.data, args.steps, args.settings)
    if not PEER_PYTHON.is_file():
        sys.exit(f"{HERE.name}: {PEER_PYTHON} is missing: make peers makes it")
    run = args.run.resolve()
    shutil.rmtree(run, ignore_errors=True)
    write_checkpoint(run / "checkpoint")
    for stage, a_pair, _, _, count, _ in ROWS.values():
        write_questions(run, f"{stage}{a_pair}", count if stage == "sft" else PROMPTS, a_pair)
    if args.tune:
        return tune(run, args.steps, args.warm)
    rows = [compare(name, run, args.steps, args.warm, args.repeats) for name in ROWS if name.startswith(args.only)]
    result = {"rows": rows, "versions": versions(), "peer_settings": PEERS, "cores": os.cpu_count(),
              "threads": os.environ.get("OMP_NUM_THREADS", "one a core")}
    (run / "peers.json").write_text(json.dumps(result, indent=1))
    print(f"\n{'':40}{'':14}{'ours':>8}{'TRL':>8}{'ratio':>8}  {'range':<14}{'cpu':>6}  target")
    for row in rows:
        spread, met = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}", "met" if row["ratio"] >= row["target"] else "missed"
        print(f"{row['row']:<40}{row['unit']:<14}{row['ours']:>8.2f}{row['trl']:>8.2f}{row['ratio']:>8.2f}  "
              f"{spread:<14}{row['cpu_ratio']:>6.2f}{row['target']:>8.1f}  {met}")
    print(", ".join(f"{name} {number}" for name, number in result["versions"].items())
          + f"; {result['cores']} cores, threads: {result['threads']}; written to {run / 'peers.json'}")


if __name__ == "__main__":
    main()
