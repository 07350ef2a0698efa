"""What every attack uses: a script run with a fault planted in it, small runs to attack, the tally.

A script runs as under `python 0N_....py`, but in a fork of this process, which has imported torch
and transformers already: a case costs what the stage does, not the five seconds of a start. This
process itself computes nothing: a fork loses the threads of arithmetic.
"""

import json
import multiprocessing.util
import os
import re
import resource
import selectors
import shutil
import signal
import sys
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

# One thread, before torch is imported: forks lose the others.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"

import safetensors.torch

sys.path.insert(1, str(Path(__file__).parents[1]))
from warm import SCRIPTS, become, warm_up  # noqa: E402, F401

MEMORY = 12 * 2**30  # bytes of address space of an attacked process: a bomb shall hurt nobody else
# A student of four million weights: trained by 04 and 05, asked by 06.
TRAIN = "--student 4_base --train full --freeze_vision False --lr 1e-3 --no_checkpointing "
ASK = "--checkpoint 4_base --tag tiny --max_new_tokens 3 "


# --- the tally ---


@dataclass
class Row:
    """One line of the table."""

    attack: str
    tried: int = 0
    survived: int = 0
    lost: int = 0  # good records that are missing in the output
    tracebacks: int = 0
    complaints: list = field(default_factory=list)

    def case(self, name: str, faults: list[str], *outcomes, lost: int = 0):
        """A case survives without faults, without lost records and without tracebacks."""
        texts = [outcome.err for outcome in outcomes]
        traced = [text[-1500:] for text in texts if "Traceback (most recent call last)" in text]
        said = [*faults, *traced, *[f"{lost} records lost"] * bool(lost)]
        self.tried += 1
        self.survived += not said
        self.lost += lost
        self.tracebacks += len(traced)
        if said:
            self.complaints.append(f"{self.attack}, {name}: {'; '.join(said)}")


# --- running a script ---


@dataclass
class Outcome:
    status: int  # exit status; -9: killed
    out: str
    err: str
    seconds: float

    def refusal(self, *words: str) -> list[str]:
        """Faults of a refusal, which is status 2 and a line by the script with all `words`."""
        lines = [line for line in self.err.splitlines() if re.search(r"0[1-6]_\w+\.py: ", line)]
        line = lines[0] if lines else ""
        faults = [f"{word!r} is not in {line!r}" for word in words if word not in line]
        return faults if self.status == 2 else [f"status {self.status}, not 2", *faults]

    def success(self) -> list[str]:
        return [f"status {self.status}: {self.err.strip()[-600:]}"] if self.status else []


def run(stage, folder, flags="", *more, plant=None, kill_after_s=None, limit_s=300) -> Outcome:
    """A stage on `folder`, after plant() in its process; killed `kill_after_s` or when it hangs.

    flags: one string, split at spaces; more: arguments that may hold spaces.
    """
    arguments = ["--run", str(folder), *flags.split(), *map(str, more)]
    pipes, started = [os.pipe(), os.pipe()], time.time()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if not pid:
        become(SCRIPTS[stage], arguments, partial(limited, plant), [write for _, write in pipes])
    said = {read: b"" for read, _ in pipes}
    end = started + (limit_s if kill_after_s is None else kill_after_s)
    with selectors.DefaultSelector() as selector:
        for read, write in pipes:
            os.close(write)
            selector.register(read, selectors.EVENT_READ)
        while selector.get_map():
            ready = selector.select(max(0, end - time.time()))
            if not ready:
                os.kill(pid, signal.SIGKILL)
                end = started + 1e6
            for key, _ in ready:
                if chunk := os.read(key.fd, 65536):
                    said[key.fd] += chunk
                else:
                    selector.unregister(key.fd)
                    os.close(key.fd)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    out, err = (text.decode(errors="replace") for text in said.values())
    return Outcome(status, out, err, time.time() - started)


def limited(plant):
    """What comes first in an attacked process: a bound on its memory, then the fault."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    if plant:
        plant()


# --- faults in the file system ---

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")


def changes(folder: Path, meet):
    """Call meet(n, event, path) before the n-th change below `folder` by this process.

    A change is a file opened to write, a rename, a deletion or a new folder. safetensors writes
    from Rust, out of Python's sight: its function is wrapped to announce its file.
    """
    prefix, count = str(folder.resolve()), 0

    def hook(event, arguments):
        nonlocal count
        if event not in CHANGES or not isinstance(arguments[0], (str, os.PathLike)):
            return
        if event == "open" and not (isinstance(arguments[2], int) and arguments[2] & WRITES):
            return
        path = os.path.realpath(os.fspath(arguments[0]))
        if path == prefix or path.startswith(prefix + os.sep):
            count += 1
            meet(count - 1, event, path)

    serialize = safetensors.torch.serialize_file

    def announced(tensors, filename, **more):
        sys.audit("open", os.fspath(filename), "wb", os.O_WRONLY | os.O_CREAT)
        return serialize(tensors, filename, **more)

    safetensors.torch.serialize_file = announced
    sys.addaudithook(hook)


def record_changes(folder: Path, log: Path):
    """plant: note every change as [event, path, size before, size after].

    The size after an event shows at the next one, or at the end.
    """
    pending, into = [], os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    def size(path) -> int:
        return os.path.getsize(path) if os.path.isfile(path) else 0

    def flush():
        if pending:
            event, path, before = pending.pop()
            os.write(into, (json.dumps([event, path, before, size(path)]) + "\n").encode())

    def meet(number, event, path):
        flush()
        pending.append((event, path, size(path) if event == "open" else 0))

    def flush_and_end():
        flush()
        end()

    changes(folder, meet)
    end, multiprocessing.util._exit_function = multiprocessing.util._exit_function, flush_and_end


def limit_size(before: int, after: int):
    """The next write of a file between these sizes ends halfway: the kernel refuses the rest."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (before + (after - before) // 2,) * 2)


def die_at(folder: Path, moment: int, halfway: tuple[int, int] | None):
    """plant: die before a change; with (size before, size after) in the midst of its write.

    Beyond the limit on the size of a file a process gets SIGXFSZ in its write call and ends.
    """

    def meet(number, event, path):
        if number == moment and halfway is None:
            os.kill(os.getpid(), signal.SIGKILL)
        elif number == moment:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            limit_size(*halfway)

    changes(folder, meet)


def fail_from(folder: Path, moment: int, number: int):
    """plant: from a change on every one raises OSError(number): a disk turned read-only."""

    def meet(at, event, path):
        if at >= moment:
            raise OSError(number, os.strerror(number), path)

    changes(folder, meet)


def full_at(folder: Path, moment: int, before: int, after: int):
    """plant: the disk is full in the midst of the write after a change (EFBIG), and later."""

    def meet(number, event, path):
        if number == moment:
            limit_size(before, after)

    changes(folder, meet)


# --- runs to attack ---

STAGES = {  # tiny, and with every kind of file that a stage writes
    "01": "--rooms 3 --room_px 56 --room_trajectories 3 --same_label_share 1 --heldout 0.3",
    "02": "--keep ends --workers 1",
    "03": "--box_step 10",
    "04": TRAIN + "--steps 3 --batch 6 --save_every 1 --val_share 0.4",
    "05": TRAIN + "--steps 3 --prompts 2 --group 2 --max_new_tokens 4 --save_every 1",
    "06": ASK + "--batch 4 --per_task 1",
}
OUT = {"01": "1_trajectories", "02": "2_views", "03": "3_qa"}
OUT |= {"04": "4_sft", "05": "5_refine", "06": "6_eval/tiny"}
STUDENTS = ("04", "05", "06")
NEEDS = {"01": [], "02": ["1_trajectories"], "03": ["1_trajectories", "2_views"]}
NEEDS |= dict.fromkeys(STUDENTS, ["2_views", "3_qa", "4_base"])


def change_log(whole: Path, stage: str) -> Path:
    return whole.parent / f"changes_{stage}.jsonl"


def build(folder: Path) -> Path:
    """An undisturbed run of 01 to 06, its changes logged; 4_base is a student after one step."""
    base = TRAIN + "--out 4_base --student tiny --steps 1 --batch 4 --val_share 0"
    folder.mkdir()
    for stage, flags in [*STAGES.items()][:3] + [("04", base)] + [*STAGES.items()][3:]:
        note = partial(record_changes, folder, change_log(folder, stage))
        done = run(stage, folder, flags, plant=note)
        if done.status:
            raise SystemExit(f"stage {stage} fails undisturbed: {done.err[-3000:]}")
    return folder


def before(stage: str, whole: Path, folder: Path) -> Path:
    """A fresh run as far as `whole` was before `stage`; its files are links to those of `whole`."""
    folder.mkdir(parents=True)
    for name in NEEDS[stage]:
        shutil.copytree(whole / name, folder / name, copy_function=os.link)
    return folder


def records(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


# What time and speed decide; a command holds the name of its folder.
SPEEDS = ["seconds", "rollout_seconds", "tokens_s", "questions_s", "responses_s", "tflops", "mfu"]
SPEEDS += ["peak_gb", "cost", "command", "sha256"]
DRAWN = ("curves.png", "report.html", "accuracy_cost.svg")  # they show those speeds
LOGS = ("meta.json", "results.json", "metrics.jsonl", "samples.jsonl")


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below `folder`, less what time and speed decide."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            data = b"" if path.name in DRAWN else path.read_bytes()
            if path.name in LOGS:
                parts = [data] if path.suffix == ".json" else data.splitlines()
                data = json.dumps([timeless(part) for part in parts]).encode()
            found[str(path.relative_to(folder))] = data
    return found


def timeless(part):
    """A record less its speeds; half a line, where a run has just been stopped, as it is."""
    if isinstance(part, bytes):
        try:
            return timeless(json.loads(part))
        except ValueError:
            return part.hex()
    if isinstance(part, dict):
        return {key: timeless(value) for key, value in part.items() if key not in SPEEDS}
    return part


def differences(folder: Path, expected: dict[str, bytes]) -> list[str]:
    found, faults = contents(folder), []
    for name in sorted({*found, *expected}):
        if name not in found:
            faults.append(f"{name} is missing")
        elif name not in expected:
            faults.append(f"{name} is left over")
        elif found[name] != expected[name]:
            faults.append(f"{name} differs")
    return faults
