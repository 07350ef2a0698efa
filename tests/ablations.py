"""make ablations: what each part of the method gives, in rooms: students from base/ that differ in one thing, on one exam, three seeds.

Every student is a run folder runs/ablations/VARIANT-SEED, trained by 04 on as many questions as the others (LENGTHS apart). The questions
come from the same trajectories, imagined by `simulator` and by `warp` (true depth, grey where the first view shows nothing); all students sit the
held-out questions of `simulator`. A finished student is a line of tests/ablations.jsonl, with its hash and scores, and is not made again: the
table can be completed in any number of sittings. With --table it is only printed.
"""
import argparse
import hashlib
import json
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE, LOG = ROOT / "runs/ablations", ROOT / "tests/ablations.jsonl"
FORWARD, INVERSE = ("D1", "D2", "D4"), ("A1", "A2", "A3", "A4", "D3")
TASKS = (*INVERSE[:4], "D1", "D2", "D3", "D4")
ROOMS = ["--rooms", 4000, "--room_px", 84, "--same_label_share", 1, "--twins", 2, "--twins_alike", True, "--twin_gap_m", 0.6, "--objects", 6, 8,
         "--heldout", 0.15, "--shares", 0.4, 0.3, 0.3, "--move_m", 0.4, 1.6, "--move_grid_m", 0.4, "--turn_deg", 10, 40]
QUESTIONS = ["--box_step", 10, "--caps", "A4=1", "D1=2", "D2=1", "D3=2", "D4=4", "S1=1", "S2=0.6", "S3=0.6", "S4=0.4", "S6=4"]
SFT = ["--student", ROOT / "base", "--rehearse_share", 0.15, "--warmup", 0.02, "--recipe", "tiny"]
REFINE = ["--steps", 300, "--recipe", "tiny"]
VARIANTS = {"both": {}, "forward only": {"tasks": FORWARD}, "inverse only": {"tasks": INVERSE}, "warp": {"teachers": ["warp"]},
            "half warp": {"teachers": ["simulator", "warp"]}, "half as long": {"length": 0.5}, "twice as long": {"length": 2}}


def script(number: str, run: Path, *arguments):
    """One stage; what it prints goes to a log beside the run."""
    command = [sys.executable, str(next(ROOT.glob(f"{number}_*.py"))), "--run", str(run), *map(str, arguments)]
    with open(f"{run}.log", "a") as log:
        if subprocess.run(command, stdout=log, stderr=log, cwd=ROOT).returncode:
            sys.exit(f"{' '.join(command)} failed: see {run}.log")


def views(teacher: str) -> Path:
    """The run folder with a teacher's views and the questions about them."""
    run = PLACE / teacher
    PLACE.mkdir(parents=True, exist_ok=True)
    for number, arguments in (("01", ROOMS), ("02", ["--keep", "ends", "--teacher", teacher]), ("03", QUESTIONS)):
        script(number, run, *arguments)
    return run


def training_questions(run: Path, tasks: tuple, teachers: list[str]):
    """questions.jsonl of these tasks and static.jsonl to rehearse; of several teachers each has every n-th scene. Picture paths start from runs/ablations."""
    run.mkdir(exist_ok=True)
    for name, source in (("questions", "sft"), ("static", "static")):
        kept = []
        for number, teacher in enumerate(teachers):
            for line in (views(teacher) / f"3_qa/{source}.jsonl").read_text().splitlines():
                record = json.loads(line)
                scene = int(hashlib.sha256(record["scene_id"].encode()).hexdigest(), 16)
                if (name == "static" or record["task_type"] in tasks) and scene % len(teachers) == number:
                    kept.append(record | {"images": [f"{teacher}/{image}" for image in record["images"]]})
        (run / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))


def examine(run: Path, checkpoint: str, per_task: int) -> dict:
    """{task: main score} and the means over the tasks of reward and right answers."""
    rooms = views("simulator")
    script("06", run, "--checkpoint", checkpoint, "--questions", rooms / "3_qa/heldout.jsonl", "--data_root", rooms, "--train", rooms / "3_qa/sft.jsonl",
           "--per_task", per_task, "--blank", False, "--tasks", *TASKS)
    results = json.loads((run / f"6_eval/{checkpoint[2:]}/results.json").read_text())
    scores = {task: next(iter(results["tasks"][task]["metrics"].values()))["mean"] for task in TASKS}
    rewards = [results["tasks"][task]["metrics"]["reward"]["mean"] for task in TASKS]
    return {"scores": scores, "reward": round(statistics.mean(rewards), 4), "right": results["right"]["mean"]}


def student(variant: str, seed: int, steps: int, per_task: int) -> dict:
    """Train and examine one student; `both` is refined too."""
    how, run = VARIANTS[variant], PLACE / f"{variant.replace(' ', '-')}-{seed}"
    training_questions(run, how.get("tasks", TASKS), how.get("teachers", ["simulator"]))
    data = ["--data", run / "questions.jsonl", "--data_root", PLACE, "--seed", seed]
    steps = round(steps * how.get("length", 1))
    script("04", run, *data, "--rehearse", run / "static.jsonl", "--steps", steps, *SFT)
    line = {"variant": variant, "seed": seed, "steps": steps, "sft": examine(run, "4_sft", per_task),
            "sha256": hashlib.sha256((run / "4_sft/model.safetensors").read_bytes()).hexdigest()}
    if variant == "both":
        script("05", run, *data, *REFINE)
        line["refined"] = examine(run, "5_refine", per_task)
        script("06", run, "--compare", "sft", "refine")
        line["refined minus sft"] = json.loads((run / "6_eval/compare.json").read_text())["tasks"]["all"]["reward"]
    return line


def table(lines: list[dict]) -> str:
    """Mean over the seeds, with the range where there are several."""
    rows = [["variant", "seeds", *TASKS, "reward", "range"]]
    for variant in VARIANTS:
        for stage in ("sft", "refined"):
            own = [line[stage] for line in lines if line["variant"] == variant and stage in line]
            if own:
                rewards = [one["reward"] for one in own]
                rows.append([variant + " refined" * (stage == "refined"), str(len(own)),
                             *(f"{statistics.mean(one['scores'][task] for one in own):.3f}" for task in TASKS),
                             f"{statistics.mean(rewards):.4f}", f"{min(rewards):.4f} to {max(rewards):.4f}"])
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--steps", type=int, default=800, help="SFT steps of 128 questions, the same for all but the two lengths")
    parser.add_argument("--per_task", type=int, default=250, help="held-out questions a task")
    parser.add_argument("--table", action="store_true", help="only print what is known")
    options = parser.parse_args()
    lines = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.is_file() else []
    for seed in options.seeds * (not options.table):
        for variant in options.variants:
            if not any((line["variant"], line["seed"]) == (variant, seed) for line in lines):
                print(f"{variant}, seed {seed}", flush=True)
                lines.append(student(variant, seed, options.steps, options.per_task))
                with LOG.open("a") as log:
                    log.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
