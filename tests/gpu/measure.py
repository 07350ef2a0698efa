"""All figures of one card in one call of less than nine minutes: `make gpu`.

    python3 tests/gpu/measure.py                every part, in this order
    python3 tests/gpu/measure.py sft svc        these; the file keeps what it holds of the others
    python3 tests/gpu/measure.py --seva DIR     svc beside its authors' network, from a checkout
    python3 tests/gpu/measure.py --tiny         small shapes on the CPU: does every part run?

  tests      every kernel against float64 (tests/gpu/interpreted)
  bench      the operations of bench.py beside their rivals, forward
  sft        a step of 04, Qwen2.5-VL of 7B's shape, 2 pictures of 1,003,520 pixels, 6 questions
  grpo       a step of 05, the same student: 4 questions about such pictures, 4 responses each
  svc        the sampler of 02 and the network of its teacher: 21 frames of 576 x 576, 50 steps
  backward   the operations of a training step in bench.py, forward and backward
  compiled   svc as 02 --compile runs it

No network, no weights, no installation: a python3 with torch, transformers, triton, einops and
pytest is enough. A part is a process with a time limit (parts.py), so whatever happens to it costs
no other part its figures. A figure is in gpu_<card>.json as soon as it is there; a part that no
longer fits into the time is left out, and the table at the end says so.
"""

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

HERE = Path(__file__).resolve().parent
PARTS = {  # seconds that each may take
    "tests": 120,
    "bench": 150,
    "sft": 120,
    "grpo": 90,
    "svc": 90,
    "backward": 100,
    "compiled": 150,
}
ALL_SECONDS, LEAST_SECONDS = 510, 25  # of the whole; with less left no part is begun


def save(file: Path, report: dict):
    """Write under a temporary name, then rename: whoever is killed leaves the figures so far."""
    part = file.with_name(file.name + ".part")
    part.write_text(json.dumps(report, indent=1))
    os.replace(part, file)


def version_of(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "none"


def run_part(part: str, file: Path, tiny: bool, seva: str, limit_s: float) -> str:
    """A part in its own process; how it ended. What it has started ends with it."""
    command = [sys.executable, str(HERE / "parts.py"), part, str(file), "tiny" * tiny, seva]
    process = subprocess.Popen(command, process_group=0)
    try:
        status = process.wait(limit_s)
        return f"ended with status {status}" if status else "done"
    except subprocess.TimeoutExpired:
        return f"stopped after {limit_s:.0f} s"
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def verdict(value: float | str, target: str, card: str) -> str:
    if isinstance(value, str) or card == "tiny":
        return "not measured"
    sense, bound = target.split()
    met = value >= float(bound) if sense == ">=" else value <= float(bound)
    return "met" if met else "not met"


def table(report: dict) -> str:
    """Markdown, as RESULTS.md shows it: a line per measurement; one per part that is not whole."""
    lines = ["| part | what | figures | targets |", "|---|---|---|---|"]
    for part, found in report["parts"].items():
        for measurement in found["measurements"]:
            values, judged = measurement["values"], []
            for name, target in measurement["targets"].items():
                judged.append(f"{name} {target}: {verdict(values[name], target, report['card'])}")
            shown = [
                f"{name} {value if isinstance(value, str) else format(value, '.4g')}"
                for name, value in values.items()
            ]
            cells = [part, measurement["what"], "; ".join(shown), "; ".join(judged)]
            lines.append("| " + " | ".join(cells) + " |")
        if found["state"] != "done":
            lines.append(f"| {part} | {found['state']} | | |")
    return "\n".join(lines)


def settings() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="All figures of one card in one call.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; none: all")
    parser.add_argument("--seva", default="", help="a checkout of Stable Virtual Camera's code")
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU: a dry run")
    parser.add_argument("--out", default=".", help="folder of gpu_<card>.json")
    parser.add_argument("--seconds", type=float, default=ALL_SECONDS, help="of all parts together")
    arguments = parser.parse_args()
    if unknown := {*arguments.parts} - {*PARTS}:
        parser.error(f"no part is named {' or '.join(sorted(unknown))}: want {', '.join(PARTS)}")
    if arguments.seva and not Path(arguments.seva, "seva/model.py").is_file():
        parser.error(f"--seva {arguments.seva}: holds no seva/model.py")
    return arguments


def main():
    asked, card = settings(), "tiny"
    try:
        import torch
    except ImportError:
        return print(f"{sys.executable} has no torch: nothing is measured")
    if not asked.tiny:
        if not torch.cuda.is_available():
            return print(f"no GPU for {sys.executable}: nothing is measured (--tiny: a dry run)")
        card = torch.cuda.get_device_name()
    os.environ |= {"HF_HUB_OFFLINE": "1"} | ({"CUDA_VISIBLE_DEVICES": ""} if asked.tiny else {})
    file = Path(asked.out, f"gpu_{re.sub(r'[^A-Za-z0-9]+', '_', card)}.json").resolve()
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        report = json.loads(file.read_text()) if asked.parts and file.is_file() else {"parts": {}}
    except (OSError, ValueError) as error:
        sys.exit(f"{file}: {error}: remove it, or choose another --out")
    report["card"] = card
    versions = {name: version_of(name) for name in ("torch", "transformers", "triton")}
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # run_part then ends its process, too
    deadline = time.monotonic() + asked.seconds
    for part in asked.parts or PARTS:
        begun = time.monotonic()
        left_s = deadline - begun
        fits = left_s >= LEAST_SECONDS
        state = "cut off in the middle" if fits else "left out: too little time was left"
        report["parts"][part] = {"state": state, "date": time.strftime("%Y-%m-%d")}
        report["parts"][part] |= {"versions": versions, "measurements": []}
        save(file, report)
        if fits:
            state = run_part(part, file, asked.tiny, asked.seva, min(left_s, PARTS[part]))
            report = json.loads(file.read_text())  # with what the part has measured
            seconds = round(time.monotonic() - begun, 1)
            report["parts"][part] |= {"state": state, "seconds": seconds}
            save(file, report)
    packages = ", ".join(f"{name} {number}" for name, number in versions.items())
    print(f"\n{card}, {packages}; {file}\n\n{table(report)}")


if __name__ == "__main__":
    main()
