"""make ablations: what each part of the method gives, in rooms: students from base/ that differ in one thing, on one exam, three seeds.

Every student is a run folder runs/ablations/VARIANT-SEED, trained by 04 in the three parts of `make demo`, on as many questions as the others (two
lengths apart). The questions come from the same trajectories, imagined by `simulator` and by `warp` (true depth, grey where the first view shows
nothing); all students sit the held-out questions of `simulator`. A finished student is a line of tests/ablations.jsonl, with its hash and scores, and
is not made again: the table can be completed in any number of sittings. With --table it is only printed. On a GPU, or on many cores, --jobs students
are made at once; the arithmetic is float32 everywhere.
"""
import argparse
import functools
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE, LOG = ROOT / "runs/ablations", ROOT / "tests/ablations.jsonl"
FORWARD, INVERSE = ("D1", "D2", "D4"), ("A1", "A2", "A3", "A4", "D3")
TASKS = (*INVERSE[:4], "D1", "D2", "D3", "D4")
MAKE = dict(re.findall(r"^(\w+) *:?= *(.+)$", (ROOT / "Makefile").read_text(), re.MULTILINE))  # the demo's settings
ROOMS = ["--rooms", 4000, "--heldout", 0.15, "--shares", 0.4, 0.3, 0.3, *MAKE["ROOMS"].split()]
SFT = ["--warmup", 0.02, "--mean", "answer", "--recipe", "tiny", "--dtype", "float32"]
REFINE = ["--tasks", "A3", "D1", "D3", "--recipe", "tiny", "--dtype", "float32"]
VARIANTS = {"both": {}, "forward only": {"tasks": FORWARD}, "inverse only": {"tasks": INVERSE}, "warp": {"teachers": ["warp"]},
            "half warp": {"teachers": ["simulator", "warp"]}, "half as long": {"length": 0.5}, "twice as long": {"length": 2}}


def script(number: str, run: Path, *arguments):
    """One stage; what it prints goes to a log beside the run."""
    command = [sys.executable, str(next(ROOT.glob(f"{number}_*.py"))), "--run", str(run), *map(str, arguments)]
    with open(f"{run}.log", "a") as log:
        if subprocess.run(command, stdout=log, stderr=log, cwd=ROOT).returncode:
            sys.exit(f"{' '.join(command)} failed: see {run}.log")


@functools.cache
def views(teacher: str) -> Path:
    """The run folder with a teacher's views, the questions about them and the lesson."""
    run = PLACE / teacher
    PLACE.mkdir(parents=True, exist_ok=True)
    script("01", run, *ROOMS)
    script("02", run, "--keep", "ends", "--teacher", teacher, "--workers", os.cpu_count())
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda name: script("03", run, *MAKE[name].split()), ("QUESTIONS", "LESSON")))
    return run


def training_questions(run: Path, tasks: tuple, teachers: list[str]):
    """questions, lesson and grpo.jsonl of these tasks, static.jsonl to rehearse; of several teachers each has every n-th scene. Picture paths start
    from runs/ablations."""
    run.mkdir(exist_ok=True)
    for name, source in (("questions", "3_qa/sft"), ("lesson", "3_lesson/sft"), ("grpo", "3_qa/grpo"), ("static", "3_qa/static")):
        kept = []
        for number, teacher in enumerate(teachers):
            for line in (views(teacher) / f"{source}.jsonl").read_text().splitlines():
                record = json.loads(line)
                scene = int(hashlib.sha256(record["scene_id"].encode()).hexdigest(), 16)
                if (name == "static" or record["task_type"] in tasks) and scene % len(teachers) == number:
                    kept.append(record | {"images": [f"{teacher}/{image}" for image in record["images"]]})
        (run / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in kept))


def examine(run: Path, checkpoint: str, per_task: int, temperature: int = 0) -> dict:
    """{task: main score} and the means over the tasks of reward and right answers."""
    rooms, tag = views("simulator"), checkpoint[2:] + "-drawn" * temperature
    script("06", run, "--checkpoint", checkpoint, "--tag", tag, "--temperature", temperature, "--questions", rooms / "3_qa/heldout.jsonl",
           "--data_root", rooms, "--train", rooms / "3_qa/sft.jsonl", "--per_task", per_task, "--blank", False, "--dtype", "float32",
           "--tasks", *TASKS)
    results = json.loads((run / f"6_eval/{tag}/results.json").read_text())
    scores = {task: next(iter(results["tasks"][task]["metrics"].values()))["mean"] for task in TASKS}
    rewards = [results["tasks"][task]["metrics"]["reward"]["mean"] for task in TASKS]
    return {"scores": scores, "reward": round(statistics.mean(rewards), 4), "right": results["right"]["mean"]}


def student(variant: str, seed: int, steps: list[int], per_task: int) -> dict:
    """Train and examine one student; `both` is refined too. `steps`: SFT before, in and after the lesson, then GRPO."""
    how, run = VARIANTS[variant], PLACE / f"{variant.replace(' ', '-')}-{seed}"
    print(f"{variant}, seed {seed}: {run}.log tells how far it is", flush=True)
    training_questions(run, how.get("tasks", TASKS), how.get("teachers", ["simulator"]))
    first, lesson, rest = (round(number * how.get("length", 1)) for number in steps[:3])
    place = ["--data_root", PLACE]
    mixture = [*place, "--data", run / "questions.jsonl", "--rehearse", run / "static.jsonl", "--rehearse_share", 0.15]
    script("04", run, *mixture, "--out", "4_first", "--student", ROOT / "base", "--steps", first, "--seed", f"1{seed}", *SFT)
    script("04", run, *place, "--data", run / "lesson.jsonl", "--out", "4_lesson", "--student", "4_first", "--steps", lesson, "--seed", seed,
           "--schedule", "constant", *SFT)
    script("04", run, *mixture, "--student", "4_lesson", "--steps", rest, "--seed", seed, *SFT)
    exams = [("4_sft", 0)]
    if variant == "both":
        script("05", run, *place, "--data", run / "grpo.jsonl", "--steps", steps[3], "--seed", seed, *REFINE)
        exams += [("5_refine", 0), ("4_sft", 1), ("5_refine", 1)]
    with ThreadPoolExecutor(len(exams)) as pool:
        sft, *refined = pool.map(lambda exam: examine(run, exam[0], per_task, exam[1]), exams)
    line = {"variant": variant, "seed": seed, "steps": [first, lesson, rest], "sft": sft,
            "sha256": hashlib.sha256((run / "4_sft/model.safetensors").read_bytes()).hexdigest()}
    if refined:
        line["refined"] = refined[0]
        for name, how in (("", "greedy"), ("-drawn", "drawn")):
            script("06", run, "--compare", f"sft{name}", f"refine{name}")
            compared = json.loads((run / "6_eval/compare.json").read_text())["tasks"]
            line[f"refined minus sft, {how}"] = {task: one["reward"] for task, one in compared.items()}
    return line


def table(lines: list[dict]) -> str:
    """Means over the seeds and their range; then, seed by seed, what GRPO changed in the mean reward and in the task that lost most."""
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
    written = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    for line in lines:
        for name in [name for name in line if name.startswith("refined minus sft")]:
            change, worst = line[name]["all"], min(TASKS, key=lambda task: line[name][task]["mean"])
            written.append(f"{line['variant']}, seed {line['seed']}, {name}: {change['mean']:+.4f} (p {change['p']:.3f}), "
                           f"least {line[name][worst]['mean']:+.4f} ({worst})")
    return "\n".join(written)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--steps", type=int, nargs=4, default=[350, 450, 450, 150], help="SFT before, in and after the lesson (two lengths apart), GRPO")
    parser.add_argument("--per_task", type=int, default=600, help="held-out questions a task")
    parser.add_argument("--jobs", type=int, default=1, help="students made at once")
    parser.add_argument("--table", action="store_true", help="only print what is known")
    options = parser.parse_args()
    lines = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.is_file() else []
    missing = [(variant, seed) for seed in options.seeds * (not options.table) for variant in options.variants
               if not any((line["variant"], line["seed"]) == (variant, seed) for line in lines)]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // options.jobs)))
    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(views, {teacher for variant, _ in missing for teacher in ["simulator", *VARIANTS[variant].get("teachers", [])]}))
        students = {pool.submit(student, *one, options.steps, options.per_task): one for one in missing}
        for done in as_completed(students):
            lines.append(done.result())
            print("{}, seed {}: finished".format(*students[done]), flush=True)
            with LOG.open("a") as log:
                log.write(json.dumps(lines[-1]) + "\n")
    print(table(lines))


if __name__ == "__main__":
    main()
