"""The test-time baseline: 06, whose student asks the world model while it answers.

.venv/bin/python tests/coupled.py --run runs/demo --checkpoint base --coupled simulator

takes the settings of 06 and writes what 06 writes, each sample with its "imagined" views, and
imagined/, the runs in which 02 imagined. After MindJourney (arXiv 2507.12508), with the numbers of
its released scripts: from a first picture a step tries every action from every beam; each sub-step
is a view. The VLM scores all new views in one prompt, by two criteria; views of 8 and more go on,
or help to answer.

Departures: its prompts in our words, and the question's own form around the views; scores that
cannot be read are not asked for again, as greedy answers would only repeat (it draws random scores
0..5 then, all below 8, so that its search ends as ours does); a view that two ways reach is one;
equal paths of several questions are imagined once, at a share of their price each.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm
from transformers.hf_argparser import HfArg

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # kernels/
if "06_eval" not in sys.modules:
    spec = importlib.util.spec_from_file_location("06_eval", ROOT / "06_eval.py")
    sys.modules["06_eval"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules["06_eval"])
evaluation = sys.modules["06_eval"]


@dataclass
class Coupled(evaluation.Config):
    coupled: str = HfArg(
        default="simulator", help='a teacher of 02 and its flags, such as "svc --steps 20"'
    )


SEARCH = {"forward": 0.25, "turn_left": 9.0, "turn_right": 9.0}  # sub-steps (meters, degrees)
SUBSTEPS, STEPS, BEAMS, SHOWN, LEAST_SCORE = 3, 3, 2, 18, 8  # SHOWN: views per step at most
CRITERIA = [
    "how well suited it is for exploring on from there in order to answer the question",
    "how helpful it is for answering the question: a view that does not show the answer may still "
    "rule out wrong ones; a picture of bad quality gets a low score, any other a higher one",
]


def extend(walk: tuple, name: str, value: float) -> tuple:
    """The walk and one action more; two of one name in a row become one."""
    if walk and walk[-1][0] == name:
        return (*walk[:-1], (name, walk[-1][1] + value))
    return (*walk, (name, value))


def motion_text(walk: tuple) -> str:
    texts = []
    for name, value in walk:
        verb, unit = ("turn", "degrees") if name.startswith("turn") else ("move", "meters")
        texts.append(f"{verb} {name.split('_')[-1]} {value:g} {unit}")
    return "; ".join(texts)


def motion_poses(actions: list) -> tuple[np.ndarray, list[int]]:
    """c2w [N, 4, 4] from the identity, and the key frames: 0 and the last one of every action."""
    poses, keyframes = [np.eye(4)], [0]
    for name, value in actions:
        most = 5.0 if name.startswith("turn") else 0.2  # degrees or meters per frame
        count = max(1, math.ceil(value / most - 1e-9))
        step = evaluation.motion_pose(name, value / count)
        for _ in range(count):
            poses.append(poses[-1] @ step)
        keyframes.append(len(poses) - 1)
    return np.stack(poses), keyframes


def origin(image: Path, root: Path) -> dict | None:
    """The keys of a trajectory record that say where a picture looks from; None: it is unknown.

    A picture of 02 has a view.json beside it; its pose in a room is start @ c2w[frame]. Any other
    is a photograph, with 54 degrees along its longer side.
    """
    try:
        width, height = evaluation.read_picture(image).size
        tangent = math.tan(math.radians(54 / 2)) * min(1, width / height)
        found = {"source": "real", "room": None, "start": None, "anchor": str(image.resolve())}
        found |= {"width": width, "height": height}
        found |= {"fov_x_deg": 2 * math.degrees(math.atan(tangent))}
        if not (image.parent / "view.json").is_file():
            return found
        view, frame = json.loads((image.parent / "view.json").read_text()), int(image.stem)
        found |= {key: view[key] for key in ("width", "height", "fov_x_deg")}
        if view["room"]:
            x, z, yaw = view["start"]
            pose = evaluation.motion_pose("turn_right", yaw) @ np.array(view["c2w"][frame])
            yaw = math.degrees(math.atan2(pose[0, 2], pose[2, 2]))
            start = [round(x + pose[0, 3], 7), round(z + pose[2, 3], 7), round(yaw, 7)]
            found |= {"source": "simulated", "anchor": None, "room": view["room"], "start": start}
        elif view["teacher"] == "warp" and frame == 0:  # the first view is its photograph
            found["anchor"] = view["anchor"]
        return found
    except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
        print(f"{image}: nothing is imagined from there, {error!r}", file=sys.stderr)
        return None


def imagine(run: Path, tries: list[tuple], starts: dict, root: Path, cfg: Coupled) -> tuple:
    """02 imagines tries (picture, walk, name, part, n) -> {try: n frames or none}, seconds each."""
    lines, pictures = [], list(starts)
    for number, (picture, walk, name, part, n) in enumerate(tries):
        actions = [*walk, *[(name, part)] * n]
        c2w, keyframes = motion_poses(actions)
        line = {"scene_id": f"p{pictures.index(picture):05d}", "traj_id": f"w{number:06d}"}
        line |= {"split": "heldout", "actions": actions, "keyframes": keyframes}
        lines.append(line | {"c2w": (c2w.round(7) + 0.0).tolist()} | starts[picture])
    teacher, *flags = cfg.coupled.split()
    command = [sys.executable, str(ROOT / "02_imagine_views.py")]
    command += ["--run", str(run), "--teacher", teacher, "--keep", "keyframes"]
    command += ["--seed", str(cfg.seed), *flags]
    meta = {"stage": "coupled", "finished": True, "counts": {"trajectories": len(lines)}}
    ours = {key: os.environ[key] for key in os.environ if not key.endswith(("RANK", "WORLD_SIZE"))}
    with evaluation.alone(
        run
    ) as lock:  # 02 inherits it: if only this process is killed, its rerun waits
        if not evaluation.read_meta(run / "2_views").get("finished"):
            for room in {line["room"] for line in lines} - {None}:
                evaluation.save(run / room, (root / room).read_bytes())
            text = "".join(json.dumps(line) + "\n" for line in lines)
            evaluation.save(run / "1_trajectories/trajectories.jsonl", text)
            evaluation.save(run / "1_trajectories/meta.json", json.dumps(meta))
            with (run / "02.log").open("a") as log:
                if subprocess.run(command, stdout=log, pass_fds=[lock], env=ours).returncode:
                    evaluation.stop(
                        f"02 ended with a fault (see {run / '02.log'}): correct --coupled"
                    )
    records = evaluation.read_lines(run / "2_views/views.jsonl", "traj_id", "frames")
    frames = {record["traj_id"]: record["frames"] for _, record in records}
    seen = {}
    for line, one in zip(lines, tries, strict=True):
        seen[one] = [str(run / frame) for frame in frames.get(line["traj_id"], [])[-one[-1] :]]
    return seen, evaluation.read_meta(run / "2_views")["seconds"] / len(lines)


def with_views(record: dict, views: dict[str, str], demand: str = "") -> dict:
    """The question with imagined views {words: picture} behind its own, and a demand at its end."""
    *turns, last, told = record["messages"]
    own, mark, rest = last["content"].rpartition("<image>")
    shown = "".join(f" Imagined from image 1, after {words}: <image>" for words in views)
    content = own + mark + shown + ("\n" if views else "") + rest + demand
    images = [*record["images"], *views.values()]
    return record | {"messages": [*turns, last | {"content": content}, told], "images": images}


def scores_in(response: str) -> list[int] | None:
    """`Output: 3, 9, 0` -> [3, 9, 0]: whole numbers between commas, however many."""
    try:
        return [int(number) for number in response.split("Output:")[:2][-1].split(",")]
    except ValueError:
        return None


@dataclass
class Search:
    """What the test-time baseline knows about a question."""

    question: dict
    beams: list[tuple]  # walks from which the next step goes on
    views: dict = field(default_factory=dict)  # new ones of this step: words -> (walk, picture)
    known: set = field(default_factory=set)  # words of all views so far
    shown: dict = field(default_factory=dict)  # words -> picture, to join the question
    costs: list = field(default_factory=lambda: [evaluation.NOTHING])
    scorings: int = 0  # responses that should be scores
    unparsable: int = 0  # those that are not

    def tries(self) -> list[tuple]:
        """What the next step imagines: every action from every beam, but not back."""
        picture, tries = self.question["record"]["images"][0], []
        back = {"turn_left": "turn_right", "turn_right": "turn_left"}
        for beam, (name, part) in itertools.product(self.beams, SEARCH.items()):
            if not beam or name != back.get(beam[-1][0]):
                tries.append((picture, beam, name, part, SUBSTEPS))
        return tries

    def look(self, seen: dict, seconds: float, networks: bool):
        """Take in the views {try: pictures} that 02 imagined; seconds: this question's share."""
        views, spent = {}, dict.fromkeys(["seconds", "world_seconds"], seconds)
        for one, pictures in seen.items():
            _, walk, name, part, _ = one
            for i, picture in enumerate(pictures, 1):
                end = extend(walk, name, i * part)
                views[motion_text(end)] = end, picture
        self.views = {words: view for words, view in views.items() if words not in self.known}
        self.known |= views.keys()
        spent["views"] = sum(map(len, seen.values()))
        spent["world_flops"] = None if networks and seen else 0  # 02 does not count them
        self.costs.append(evaluation.NOTHING | spent)
        self.beams = []

    def prompts(self) -> list[dict]:
        """The VLM is to score the new views by both criteria."""
        views, n = {words: picture for words, (_, picture) in self.views.items()}, len(self.views)
        asked = []
        for criterion in CRITERIA:
            demand = f"\nDo not answer it yet. Score each of the {n} imagined views from 0 to 9: "
            demand += f"{criterion}. Output a list of {n} scores in the order of the views, "
            demand += "separated by ',', and nothing else. Output: "
            asked.append({"record": with_views(self.question["record"], views, demand)})
        return asked

    def go_on(self, said: list[dict]):
        """On from the views best to explore; the most helpful ones join the question."""
        views, best = list(self.views.items()), []
        for found in said:
            self.costs.append(found.get("cost", evaluation.NOTHING))
            scores = scores_in(found.get("response", ""))
            self.scorings += 1
            self.unparsable += scores is None
            order = sorted(enumerate(scores or []), key=lambda one: -one[1])
            best.append([n for n, score in order if score >= LEAST_SCORE])
        explore, helpful = best
        self.beams = [views[n][1][0] for n in explore[:BEAMS] if n < len(views)]
        for n in [n for n in helpful if n < len(views)][:SHOWN]:
            self.shown[views[n][0]] = views[n][1][1]

    def in_order(self) -> dict:
        """The shown views, by what was done before their last amount, then by that amount."""
        ways = defaultdict(list)
        for words, picture in self.shown.items():
            way, amount, _ = words.rsplit(" ", 2)
            ways[way].append((float(amount), words, picture))
        return {words: picture for own in ways.values() for _, words, picture in sorted(own)}


def search_views(questions: list[dict], load, folder: Path, root: Path, cfg: Coupled) -> tuple:
    """The questions with imagined views among their pictures and their "cost"; and counts."""
    starts, searches, asked = {}, [], []
    for question in questions:
        first = question["record"]["images"][0]
        if "video" in question:
            with suppress(OSError, ValueError):  # `prompts_of` will name it
                evaluation.cut_frames(
                    question["video"], Path(first).parent, len(question["images"])
                )
        if first not in starts:
            starts[first] = origin(Path(first), root)
        searches.append(Search(question, [()] if starts[first] else []))
    networks = not re.match(r"(simulator|warp|pan)(?!.*--(depth|fill))", cfg.coupled)
    scoring = replace(cfg, temperature=0, max_new_tokens=8 + 3 * BEAMS * len(SEARCH) * SUBSTEPS)
    for step in range(1, STEPS + 1):  # each is one call of 02 for all questions
        run = folder / "imagined" / str(step)
        wanted = [search.tries() for search in searches]
        users = Counter(itertools.chain(*wanted))  # questions share equal ones, and their price
        if not users:
            break
        seen, seconds = imagine(run, [*users], starts, root, cfg)
        for search, own in zip(searches, wanted, strict=True):
            price = sum(seconds / users[one] for one in own)
            search.look({one: seen[one] for one in own}, price, networks)
        looking = [search for search in searches if search.views]
        for start in tqdm(range(0, len(looking), cfg.batch), unit="batch", desc=f"step {step}"):
            batch = looking[start : start + cfg.batch]
            demands = [demand for search in batch for demand in search.prompts()]
            file = run / "scores" / f"{start}_{cfg.batch}.json"  # so that a killed search goes on
            if not file.is_file():
                prompts = evaluation.prompts_of(load(), demands, False)
                evaluation.save(
                    file, json.dumps(evaluation.respond(load(), demands, prompts, scoring))
                )
            said = iter(json.loads(file.read_text()))
            for search in batch:
                search.go_on([next(said) for _ in CRITERIA])
    for search in searches:
        shown = search.in_order()
        paths = {words: os.path.relpath(path, folder) for words, path in shown.items()}
        more = {"record": with_views(search.question["record"], shown)}
        more |= {"imagined": list(paths.items()), "cost": evaluation.total_cost(search.costs)}
        asked.append(search.question | more)
    counts = {"imagined views shown": sum(len(search.shown) for search in searches)}
    counts["questions without them"] = sum(not search.shown for search in searches)
    counts["scorings"] = sum(search.scorings for search in searches)
    counts["scorings unparsable"] = sum(search.unparsable for search in searches)
    return asked, counts


def main(cfg: Coupled):
    if cfg.shard != "0/1" or not cfg.coupled:
        evaluation.stop("the search wants --coupled TEACHER, and goes without --shard")
    names = [re.sub(r"^\d+_", "", Path(cfg.checkpoint).name), cfg.coupled.split()[0]]
    names += [cfg.benchmark] * (cfg.benchmark != "heldout")
    evaluation.main(replace(cfg, tag=cfg.tag or "-".join(names)), search_views)


if __name__ == "__main__":
    evaluation.run(main, Coupled)
