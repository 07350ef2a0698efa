"""make ablations: what each part of the method gives, in rooms. Students differ in one thing.

Every student is a run folder runs/ablations/VARIANT-SEED, trained from base/ as in `make demo`, on
as many questions as the others (two lengths apart). The questions come from the same trajectories,
imagined by the rows of TEACHERS; all students answer the same held-out questions about exact views,
that of `fill` is refined by GRPO and, for a control, goes on with SFT for as many seconds; it also
answers about rooms of another world, with other furniture, tints, walls and floors.
A finished student is a line of tests/ablations.jsonl, with its hash and scores, and is not made
again: the table can be completed in any number of sittings; --table only prints it. On a GPU, or on
many cores, --jobs students are made at once. The arithmetic is float32 everywhere.
"""

import argparse
import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PLACE, LOG = ROOT / "runs/ablations", ROOT / "tests/ablations.jsonl"
FORWARD, INVERSE = ("D1", "D2", "D4"), ("A1", "A2", "A3", "A4", "D3")
TASKS = ("A1", "A2", "A3", "A4", "D1", "D2", "D3", "D4")
ROOMS = 1000
FILL = {"teacher": "warp", "fill": "base/world", "heldout_teacher": "simulator"}
TEACHERS = {  # the settings of 01, 02 and 03
    "fill": ({}, FILL, {}),
    "simulator": ({}, {}, {}),
    "warp": ({}, {"teacher": "warp", "heldout_teacher": "simulator"}, {"max_holes": 1}),
    "another world": ({"world": "other"}, {}, {}),
}
VARIANTS = {
    "fill": {},
    "simulator": {"teachers": ["simulator"]},
    "warp": {"teachers": ["warp"]},
    "half simulator, half fill": {"teachers": ["simulator", "fill"]},
    "forward only": {"tasks": FORWARD},
    "inverse only": {"tasks": INVERSE},
    "open and choice": {"questions": "3_choice"},
    "twice as long": {"length": 2},
    "four times as long": {"length": 4},
    "simulator, twice as long": {"teachers": ["simulator"], "length": 2},
    "half of each, twice as long": {"teachers": ["simulator", "fill"], "length": 2},
}
STAGES = {"sft": "", "refined": " refined", "more": " and as many seconds of SFT"}
STAGES["elsewhere"] = " refined, in another world"


def script(number: str, run: Path, recipe: str, **flags):
    """One stage; what it prints goes to a log beside the run."""
    command = [sys.executable, next(ROOT.glob(f"{number}_*.py")), "--run", run, "--recipe", recipe]
    for name, value in flags.items():
        command += [f"--{name}", *(value if isinstance(value, (list, tuple)) else [value])]
    command = [*map(str, command)]
    with open(f"{run}.log", "a") as log:
        if subprocess.run(command, stdout=log, stderr=log, cwd=ROOT).returncode:
            sys.exit(f"{' '.join(command)} failed: see {run}.log")


@functools.cache
def views(teacher: str) -> Path:
    """The run folder with a teacher's views and the questions about them, open and as choices."""
    run, (sampling, imagining, asking) = PLACE / teacher.replace(" ", "-"), TEACHERS[teacher]
    PLACE.mkdir(parents=True, exist_ok=True)
    script("01", run, "tiny", rooms=ROOMS, **sampling)
    script("02", run, "exact", workers=os.cpu_count(), **imagining)
    script("03", run, "tiny", **asking)
    script("03", run, "tiny", out="3_choice", formats=["open", "choice"], **asking)
    return run


def training_questions(run: Path, how: dict):
    """Write the questions of these tasks, and static ones to rehearse, into a student's folder.

    Of several teachers each has every n-th scene. Picture paths start from runs/ablations.
    """
    run.mkdir(exist_ok=True)
    tasks, teachers = how.get("tasks", TASKS), how.get("teachers", ["fill"])
    for name in ("sft", "static", "grpo"):
        kept, source = [], f"{how.get('questions', '3_qa')}/{name}"
        for number, teacher in enumerate(teachers):
            for line in (views(teacher) / f"{source}.jsonl").read_text().splitlines():
                record = json.loads(line)
                scene = int(hashlib.sha256(record["scene_id"].encode()).hexdigest(), 16)
                asked = name == "static" or record["task_type"] in tasks
                if asked and scene % len(teachers) == number:
                    images = [f"{teacher}/{image}" for image in record["images"]]
                    kept.append(json.dumps(record | {"images": images}) + "\n")
        (run / f"{name}.jsonl").write_text("".join(kept))


def evaluate(run: Path, checkpoint: str, temperature: int, per_task: int, where="simulator"):
    """{task: main score} and the means over the tasks of reward and right answers."""
    rooms, tag = views(where), checkpoint[2:] + "-drawn" * temperature
    tag += "-elsewhere" * (where != "simulator")
    script(
        "06",
        run,
        "tiny",
        checkpoint=checkpoint,
        tag=tag,
        temperature=temperature,
        questions=rooms / "3_qa/heldout.jsonl",
        data_root=rooms,
        per_task=per_task,
        dtype="float32",
    )
    results = json.loads((run / f"6_eval/{tag}/results.json").read_text())
    metrics = {task: results["tasks"][task]["metrics"] for task in TASKS}
    reward = statistics.mean(metrics[task]["reward"]["mean"] for task in TASKS)
    scores = {task: next(iter(metrics[task].values()))["mean"] for task in TASKS}
    return {"scores": scores, "reward": round(reward, 4), "right": results["right"]["mean"]}


def seconds_of(folder: Path) -> list[float]:
    """Of each step of a training."""
    return [json.loads(line)["seconds"] for line in (folder / "metrics.jsonl").open()]


def student(variant: str, seed: int, steps: list[int], per_task: int) -> dict:
    """Train and evaluate one student; that of `fill` goes on. steps: of SFT, of GRPO."""
    how, run = VARIANTS[variant], PLACE / f"{variant.replace(' ', '-')}-{seed}"
    print(f"{variant}, seed {seed}: {run}.log tells how far it is", flush=True)
    training_questions(run, how)
    length = round(steps[0] * how.get("length", 1))
    place = {"data_root": PLACE, "dtype": "float32"}
    questions = [run / "sft.jsonl", run / "static.jsonl"]
    place |= {"seed": seed}
    script("04", run, "tiny", student=ROOT / "base", data=questions, steps=length, **place)
    weights = (run / "4_sft/model.safetensors").read_bytes()
    line = {"variant": variant, "seed": seed, "steps": length}
    line["sha256"] = hashlib.sha256(weights).hexdigest()
    if variant != "fill":
        return line | {"sft": evaluate(run, "4_sft", 0, per_task)}
    script("05", run, "tiny", data=run / "grpo.jsonl", steps=steps[1], **place)
    more = round(sum(seconds_of(run / "5_refine")) / statistics.median(seconds_of(run / "4_sft")))
    place |= {"student": "4_sft", "out": "4_more"}
    script("04", run, "tiny", data=questions, steps=more, **place)
    evaluations = [("4_sft", 0, per_task), ("5_refine", 0, per_task), ("4_more", 0, per_task)]
    evaluations += [("5_refine", 0, per_task, "another world")]
    evaluations += [("4_sft", 1, per_task), ("5_refine", 1, per_task)]
    with ThreadPoolExecutor(3) as pool:
        sft, refined, other, elsewhere, *_ = pool.map(lambda one: evaluate(run, *one), evaluations)
    line |= {"sft": sft, "refined": refined, "more": other, "elsewhere": elsewhere}
    for ending, how in (("", "greedy"), ("-drawn", "drawn")):
        script("06", run, "paper", compare=[f"sft{ending}", f"refine{ending}"])
        name = f"compare_sft{ending}_refine{ending}.json"
        compared = json.loads((run / "6_eval" / name).read_text())["tasks"]
        changes = line[f"refined minus sft, {how}"] = {}
        for task, one in compared.items():
            reward = one["reward"]
            changes[task] = {"n": one["n"], "a": reward["a"]["mean"], "b": reward["mean"]}
            changes[task] |= reward["above_a"]  # mean, low, high and p of the difference
    return line


def scores_table(lines: list[dict]) -> str:
    """Means over the seeds, and the range of the mean reward."""
    rows = [["variant", "seeds", *TASKS, "reward", "range"]]
    for variant in VARIANTS:
        for stage, words in STAGES.items():
            own = [line[stage] for line in lines if line["variant"] == variant and stage in line]
            if own:
                rewards = [one["reward"] for one in own]
                means = [statistics.mean(one["scores"][task] for one in own) for task in TASKS]
                row = [variant + words, str(len(own))]
                row += [f"{mean:.3f}" for mean in means]
                row += [f"{statistics.mean(rewards):.4f}"]
                rows.append([*row, f"{min(rewards):.4f} to {max(rewards):.4f}"])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def changes_by_grpo(lines: list[dict]) -> str:
    """Per seed the change of the mean reward, and of the task that lost most."""
    written = []
    for line in lines:
        for name in [name for name in line if name.startswith("refined minus sft")]:
            change = line[name]
            _, worst = min((change[task]["mean"], task) for task in TASKS)
            mean = f"{change['all']['mean']:+.4f} (p {change['all']['p']:.3f})"
            least = f"least {change[worst]['mean']:+.4f} ({worst})"
            written.append(f"{line['variant']}, seed {line['seed']}, {name}: {mean}, {least}")
    return "\n".join(written)


def main():
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    add = parser.add_argument
    add("--seeds", type=int, nargs="*", default=[0, 1, 2])
    add("--variants", nargs="*", default=list(VARIANTS), choices=VARIANTS)
    add(
        "--steps", type=int, nargs=2, default=[300, 40], help="of SFT (some lengths apart), of GRPO"
    )
    add("--per_task", type=int, default=600, help="held-out questions per task")
    add("--jobs", type=int, default=1, help="students made at once")
    add("--table", action="store_true", help="only print what is known")
    options = parser.parse_args()
    lines = [json.loads(line) for line in LOG.read_text().splitlines()] if LOG.is_file() else []
    known = {(line["variant"], line["seed"]) for line in lines}
    wanted = [(variant, seed) for seed in options.seeds for variant in options.variants]
    missing = [] if options.table else [one for one in wanted if one not in known]
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, os.cpu_count() // options.jobs)))
    with ThreadPoolExecutor(options.jobs) as pool:
        taught = [VARIANTS[variant].get("teachers", ["fill"]) for variant, _ in missing]
        needed = {*sum(taught, []), "simulator", "another world"} if missing else ()
        list(pool.map(views, needed))
        students = [pool.submit(student, *one, options.steps, options.per_task) for one in missing]
        for done in as_completed(students):
            line = done.result()
            lines.append(line)
            print(f"{line['variant']}, seed {line['seed']}: finished", flush=True)
            with LOG.open("a") as log:
                log.write(json.dumps(line) + "\n")
    print(scores_table(lines), changes_by_grpo(lines), sep="\n")


if __name__ == "__main__":
    main()
