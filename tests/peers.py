"""Seconds per step of 04 and 05 beside SFTTrainer and GRPOTrainer of TRL, on the same work.

Same machine, threads, checkpoint (3 million parameters, random), questions, batch, AdamW and
learning rate, float32, every weight trained (in the rows "tower frozen", as the paper's SFT has
it, those of the language model), no gradient checkpointing. Every step trains on the whole
question file, so the loss of the first step must be the same number on both sides. In GRPO no
response ever ends early, so both generate the same number of tokens. Both are checked in every
run. About half of the responses hold a word beyond the reward's limit of 200 characters and earn
-1, the others nothing: advantages and gradients are not 0.

Ours and theirs run by turns, each as a process of its own, `repeats` times. A step lasts from one
line that reports a step to the next: reading and preparing the pictures counts on both sides. The
first `warm` steps do not count; a run counts as the median of the rest, a row of the table as the
median of its runs; the ratio's range is over the pairs of neighbouring runs. `cpu` is the ratio of
the processor seconds of a step, which other work on the machine disturbs less than the clock.

TRL gets what was fastest for it here (PEERS below; --tune measures it again); our scripts run with
--tokens 4096. TRL's packing and padding-free batches refuse pictures, its continuous batching is
not given them, and vLLM has no place on a CPU. Both sides prepare pictures with transformers' PIL
processor (torchvision has no build for this torch).

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
ROOT = HERE.parents[1]
PEER_PYTHON = ROOT / ".venv-peers/bin/python"
QUESTIONS, PROMPTS, GROUP, NEW_TOKENS = 24, 8, 4, 16  # a step of SFT; a step of GRPO
PICTURE = 448, 224  # pixels: 16 x 8 = 128 tokens per picture, 256 per pair
LR, BETAS, WEIGHT_DECAY, KL = 1e-6, (0.9, 0.95), 0.1, 1e-2  # decay and betas: constants of ours
PEERS = {"attention": "sdpa", "sft_rows": 24, "grpo_rows": 32, "workers": 0}
TUNE = [{"attention": "eager"}, {"sft_rows": 6, "grpo_rows": 8}, {"sft_rows": 2, "grpo_rows": 4}]
TUNE += [{"workers": 1}, {"workers": 2}]
ROWS = {  # stage, questions per pair, frozen tower, unit, how many per step, target
    "SFT, 6 questions a pair, tower frozen": ("sft", 6, True, "questions/s", QUESTIONS, 4.0),
    "SFT, 6 questions a pair": ("sft", 6, False, "questions/s", QUESTIONS, 4.0),
    "SFT, 1 question a pair, tower frozen": ("sft", 1, True, "questions/s", QUESTIONS, 1.2),
    "SFT, 1 question a pair": ("sft", 1, False, "questions/s", QUESTIONS, 1.2),
    f"GRPO, {PROMPTS} prompts x {GROUP}": ("grpo", 1, False, "responses/s", PROMPTS * GROUP, 2.5),
}

# The words of stage 3: questions of about 30 tokens, answers of 2 to 10.
TURN, BOX = "turn left 40 degrees", "[620, 300, 740, 610]"
MOVES = "turn right 30 degrees; move forward 1 meters"
LAMP = "The red lamp is at [410, 300, 530, 610] in image 1"
TEXTS = f"""
A3 | Which 2 or 3 actions did the camera do from image 1 to image 2, in order? | {MOVES}
A2 | Which way and how far did the camera turn from image 1 to image 2? | {TURN}
A4 | From image 1 to image 2 the camera did: {TURN}. True or false? | true
D1 | {LAMP}. The camera did: {TURN}. Where is it in image 2? | {BOX}
D3 | {LAMP}, at {BOX} in image 2. Which 1 or 2 actions did the camera do, in order? | {TURN}
D4 | {LAMP}. The camera did: {TURN}. Is the lamp at {BOX} in image 2 the same one? | yes
"""
TEXTS = [line.split(" | ") for line in TEXTS.strip().splitlines()]
LONG = "o" * 201  # one token; no question holds it, see write_checkpoint
# TRL must make of a prompt and its completion, token for token, what our scripts make of it: no
# line break behind <|im_end|>.
CHAT = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% for part in message.content %}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' if part.type == 'image' else part.text }}"
    "{% endfor %}<|im_end|>{% endfor %}"
    "{{ '<|im_start|>assistant\n' if add_generation_prompt }}"
)


# What both sides read


def write_questions(run: Path, name: str, count: int, per_pair: int):
    """`count` questions, `per_pair` about each pair of pictures.

    The pictures are smooth noise, which compresses as a photograph does.
    """
    import numpy as np
    from PIL import Image

    draw, lines = np.random.default_rng(0), []
    for i in range(count):
        images = [f"2_views/{name}/{i // per_pair:03}_{k}.png" for k in (0, 1)]
        for image in images if i % per_pair == 0 else []:
            (run / image).parent.mkdir(parents=True, exist_ok=True)
            dots = Image.fromarray(draw.integers(0, 256, (8, 16, 3), dtype=np.uint8))
            dots.resize(PICTURE, Image.Resampling.BICUBIC).save(run / image)
        task, question, answer = TEXTS[i % len(TEXTS)]
        asked = {"role": "user", "content": "<image><image>" + question}
        messages = [asked, {"role": "assistant", "content": answer}]
        record = {"task_type": task, "scene_id": f"s{i // per_pair}", "images": images}
        lines.append(json.dumps(record | {"messages": messages}) + "\n")
    (run / "3_qa").mkdir(exist_ok=True)
    (run / f"3_qa/{name}.jsonl").write_text("".join(lines))


def write_checkpoint(folder: Path):
    """The tiny student of 04, shaken so that every picture matters, whose responses never end.

    Every token's vector starts with 1, so that the first number of the last hidden state is well
    above 0. The output layer has the same vectors: the end token and those of pictures, which
    start with -4, get no probability; the overlong word, with 1.6, that of many others.
    """
    import torch
    from conftest import load
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    texts = [text for _, *pair in TEXTS for text in pair] + ["user assistant", LONG]
    load("04").build_tiny(folder, texts, seed=0)
    generator, weights = torch.Generator().manual_seed(1), folder / "model.safetensors"
    shaken = {}
    for name, w in load_file(weights).items():
        shaken[name] = w + 0.02 * torch.randn(w.shape, generator=generator)
    embedding = shaken["model.language_model.embed_tokens.weight"]
    embedding[:, 0] = 1
    ids = AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids
    embedding[ids(LONG), 0] = 1.6
    never = ["<|im_end|>", "<|endoftext|>", "<|vision_start|>", "<|image_pad|>", "<|video_pad|>"]
    embedding[ids(never), 0] = -4
    save_file(shaken, weights, metadata={"format": "pt"})
    (folder / "chat_template.jinja").write_text(CHAT)
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"]["size"]["longest_edge"] = PICTURE[0] * PICTURE[1]
    (folder / "processor_config.json").write_text(json.dumps(processor))


# Theirs (runs in .venv-peers)


def overlong(completions, **_) -> list[float]:
    """What the reward of 05 comes to for responses of random words."""
    return [-1.0 if len(said[0]["content"].strip()) > 200 else 0.0 for said in completions]


def their_dataset(run: Path, data: str):
    from datasets import Dataset, Image

    records = []
    for line in (run / data).read_text().splitlines():
        record = json.loads(line)
        user, answer = record["messages"]
        prompt = [user | {"content": user["content"].replace("<image>", "")}]
        images = [str(run / image) for image in record["images"]]
        records.append({"prompt": prompt, "completion": [answer], "images": images})
    # cast: a picture is decoded when a batch is made
    return Dataset.from_list(records).cast_column("images", [Image()])


def theirs(stage: str, run: Path, data: str, steps: int, settings: dict):
    """`steps` steps of TRL; prints a line per step and what TRL logs of the first."""
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer

    class Report(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            print(f"step {state.global_step}", flush=True)

        def on_log(self, args, state, control, logs=None, **_):
            print("first " + json.dumps(logs), flush=True)

    dataset = their_dataset(run, data)
    batch = len(dataset) if stage == "sft" else len(dataset) * GROUP
    rows = settings[f"{stage}_rows"]
    common = {
        "output_dir": str(run / "theirs"),
        "max_steps": steps,
        "per_device_train_batch_size": rows,
        "gradient_accumulation_steps": batch // rows,
        "learning_rate": LR,
        "lr_scheduler_type": "constant",
        "adam_beta1": BETAS[0],
        "adam_beta2": BETAS[1],
        "weight_decay": WEIGHT_DECAY,
        "max_grad_norm": 1.0,
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "dataloader_num_workers": settings["workers"],
        "dataloader_persistent_workers": settings["workers"] > 0,
        "logging_first_step": True,
        "logging_steps": steps + 1,
        "disable_tqdm": True,
        "save_strategy": "no",
        "report_to": "none",
        "model_init_kwargs": {"dtype": "float32", "attn_implementation": settings["attention"]},
    }
    given = {"train_dataset": dataset, "callbacks": [Report()]}
    checkpoint = str(run / "checkpoint")
    if stage == "sft":
        config = SFTConfig(max_length=None, completion_only_loss=True, **common)
        trainer = SFTTrainer(checkpoint, config, **given)
        trainer.model.model.visual.requires_grad_(not settings["frozen"])
    else:
        config = GRPOConfig(
            num_generations=GROUP,
            max_completion_length=NEW_TOKENS,
            temperature=1.0,
            beta=KL,
            loss_type="grpo",
            **common,
        )
        trainer = GRPOTrainer(checkpoint, overlong, config, **given)
    trainer.train()


# The measurement


def our_command(stage: str, run: Path, data: str, steps: int, frozen: bool) -> list:
    # --tokens 4096: as many as TRL's rows, the fastest of those tried
    flags = f"--out ours --student checkpoint --train full --lr {LR} --tokens 4096 "
    flags += f"--save_every 1000000 --checkpointing False --freeze_vision {frozen} "
    if stage == "sft":
        flags += f"--batch {QUESTIONS} --schedule constant --warmup 0 --val_share 0"
    else:
        flags += f"--prompts {PROMPTS} --group {GROUP} --max_new_tokens {NEW_TOKENS} --kl {KL}"
    script = next(ROOT.glob("04*.py" if stage == "sft" else "05*.py"))
    return [sys.executable, script, "--run", run, "--data", data, "--steps", steps, *flags.split()]


def their_command(stage: str, run: Path, data: str, steps: int, settings: dict) -> list:
    command = [PEER_PYTHON, HERE, "--theirs", stage, "--run", run, "--data", data]
    return [*command, "--steps", steps, "--settings", json.dumps(settings)]


def processor_seconds(pid: int) -> float:
    """User and system time of a running process and its finished children (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def timed(command: list, log: Path, warm: int) -> tuple[float, float]:
    """Run a command; the medians of seconds and processor seconds between its lines `step ...`.

    The first `warm` steps do not count.
    """
    own = {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    times, command, errors = [], [*map(str, command)], log.with_suffix(".err")
    with open(log, "w") as out, open(errors, "w") as err:
        pipe = {"stdout": subprocess.PIPE, "stderr": err, "text": True}
        with subprocess.Popen(command, env=os.environ | own, **pipe) as process:
            for line in process.stdout:
                if line.startswith("step"):
                    times.append((time.perf_counter(), processor_seconds(process.pid)))
                out.write(line)
    if process.returncode:
        sys.exit(f"{HERE.name}: {command[1]} failed: see {log} and {errors}")
    clock, cpu = zip(*times[warm - 1 :], strict=True)
    return tuple(
        statistics.median(b - a for a, b in zip(seconds, seconds[1:], strict=False))
        for seconds in (clock, cpu)
    )


def run_ours(stage, run, data, steps, warm, frozen) -> tuple[tuple[float, float], float]:
    """((seconds, processor seconds) per step, what must agree with theirs).

    The latter is the loss of the first SFT step, the mean length of responses in that of GRPO.
    """
    shutil.rmtree(run / "ours", ignore_errors=True)
    seconds = timed(our_command(stage, run, data, steps, frozen), run / "ours.log", warm)
    line = json.loads((run / "ours/metrics.jsonl").read_text().splitlines()[0])
    return seconds, line["loss" if stage == "sft" else "length"]


def run_theirs(stage, run, data, steps, warm, settings) -> tuple[tuple[float, float], float]:
    """The same of TRL."""
    log = run / "theirs.log"
    seconds = timed(their_command(stage, run, data, steps, settings), log, warm)
    logged = [line for line in log.read_text().splitlines() if line.startswith("first ")]
    line = json.loads(logged[0].removeprefix("first "))
    return seconds, float(line["loss" if stage == "sft" else "completions/mean_length"])


def compare(name: str, run: Path, steps: int, warm: int, repeats: int) -> dict:
    """One row: ours and theirs by turns."""
    stage, per_pair, frozen, unit, count, target = ROWS[name]
    data, pairs = f"3_qa/{stage}{per_pair}.jsonl", []
    for k in range(repeats):
        ours, our_first = run_ours(stage, run, data, steps, warm, frozen)
        trl, trl_first = run_theirs(stage, run, data, steps, warm, PEERS | {"frozen": frozen})
        if abs(our_first - trl_first) > 1e-4 * abs(trl_first):
            first = f"the first step gives {our_first} here and {trl_first} in TRL"
            sys.exit(f"{HERE.name}: {name}: {first}: not the same work")
        pairs.append((ours, trl))
        seconds = f"{ours[0]:.3f} s per step, TRL {trl[0]:.3f} s"
        processor = f"processor {ours[1]:.2f} s, {trl[1]:.2f} s"
        print(f"  {name}, {k + 1} of {repeats}: {seconds}; {processor}", flush=True)
    ours, our_cpu, trl, trl_cpu = (
        statistics.median(pair[side][k] for pair in pairs) for side in (0, 1) for k in (0, 1)
    )
    ratios = [theirs[0] / mine[0] for mine, theirs in pairs]
    rates = {"row": name, "unit": unit, "ours": count / ours, "trl": count / trl}
    rates |= {"ratio": trl / ours, "ratio_min": min(ratios), "ratio_max": max(ratios)}
    rates |= {"cpu_ratio": trl_cpu / our_cpu, "target": target}
    return rates | {"seconds": pairs, "first_step": [our_first, trl_first]}


def tune(run: Path, steps: int, warm: int):
    """TRL's seconds per step with PEERS and with each of TUNE's changes to it."""
    for name, (stage, per_pair, frozen, *_) in ROWS.items():
        data = f"3_qa/{stage}{per_pair}.jsonl"
        for change in [{}, *TUNE]:
            settings = PEERS | change
            seconds, _ = run_theirs(stage, run, data, steps, warm, settings | {"frozen": frozen})
            measured = f"{seconds[0]:.3f} s per step, processor {seconds[1]:.2f} s"
            print(f"  TRL, {name}: {measured}, with {settings}", flush=True)


VERSIONS = """
import importlib.metadata, json
names = ("torch", "transformers", "trl")
print(json.dumps({name: importlib.metadata.version(name) for name in names}))
"""


def print_table(rows: list[dict]):
    print(f"\n{'':54}{'ours':>8}{'TRL':>8}{'ratio':>8}  {'range':<14}{'cpu':>6}  target")
    for row in rows:
        rates = f"{row['ours']:>8.2f}{row['trl']:>8.2f}{row['ratio']:>8.2f}"
        spread = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
        met = "met" if row["ratio"] >= row["target"] else "missed"
        end = f"{spread:<14}{row['cpu_ratio']:>6.2f}{row['target']:>8.1f}  {met}"
        print(f"{row['row']:<40}{row['unit']:<14}{rates}  {end}")


def read_arguments() -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add, hidden = parser.add_argument, argparse.SUPPRESS
    add("--run", type=Path, default=Path("runs/peers"), help="folder to write")
    add("--steps", type=int, default=8, help="steps of a run")
    add("--warm", type=int, default=2, help="first steps that do not count")
    add("--repeats", type=int, default=3, help="pairs of runs per row")
    add("--only", default="", help="rows whose name begins so, e.g. GRPO")
    add("--tune", action="store_true", help="measure TRL's settings instead")
    add("--theirs", choices=["sft", "grpo"], help=hidden)  # in the process of run_theirs
    add("--data", help=hidden)
    add("--settings", type=json.loads, help=hidden)
    return parser.parse_args()


def main():
    args = read_arguments()
    if args.theirs:
        return theirs(args.theirs, args.run, args.data, args.steps, args.settings)
    if not PEER_PYTHON.is_file():
        sys.exit(f"{HERE.name}: {PEER_PYTHON} is missing: make peers makes it")
    run = args.run.resolve()
    shutil.rmtree(run, ignore_errors=True)
    write_checkpoint(run / "checkpoint")
    for stage, per_pair, *_ in ROWS.values():
        count = QUESTIONS if stage == "sft" else PROMPTS
        write_questions(run, f"{stage}{per_pair}", count, per_pair)
    if args.tune:
        return tune(run, args.steps, args.warm)
    names = [name for name in ROWS if name.startswith(args.only)]
    rows = [compare(name, run, args.steps, args.warm, args.repeats) for name in names]
    command = [PEER_PYTHON, "-c", VERSIONS]
    asked = subprocess.run(command, capture_output=True, text=True, check=True)
    cores, threads = os.cpu_count(), os.environ.get("OMP_NUM_THREADS", "one per core")
    result = {"rows": rows, "versions": json.loads(asked.stdout), "peer_settings": PEERS}
    result |= {"cores": cores, "threads": threads}
    (run / "peers.json").write_text(json.dumps(result, indent=1))
    print_table(rows)
    print(result["versions"], f"{cores} cores, threads: {threads}; see {run / 'peers.json'}")


if __name__ == "__main__":
    main()
