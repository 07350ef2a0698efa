"""tests/same_losses.py passes equal losses only, and says what looks like another processor."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("same_losses.py")
LOGGED = [7.1, 5.2, 4.0, 3.3, 3.1, 2.9]


def changed(**shares):
    """LOGGED with the losses of some steps, s1 the first, larger by a share."""
    return [loss * (1 + shares.get(f"s{step}", 0)) for step, loss in enumerate(LOGGED, 1)]


@pytest.mark.parametrize(
    ("again", "status", "told"),
    [
        (LOGGED, 0, "6 losses, 6 equal"),
        (LOGGED[:4], 0, "4 losses, 4 equal"),
        (changed(s3=1e-7, s4=-3e-5, s5=2e-3, s6=0.02), 1, "from step 3 on, by 1e-07"),
        (changed(s1=1e-4, s2=1e-4), 1, "not those"),  # another seed, another rate
        (changed(s3=1e-7, s4=0.1), 1, "not those"),
        ([], 1, "not those"),
    ],
)
def test_only_equal_losses_pass(tmp_path, again, status, told):
    for name, losses in (("logged", LOGGED), ("again", again)):
        (tmp_path / name).mkdir()
        lines = [json.dumps({"loss": loss}) + "\n" for loss in losses]
        (tmp_path / name / "metrics.jsonl").write_text("".join(lines))
    command = [sys.executable, SCRIPT, tmp_path / "logged", tmp_path / "again"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == status and told in done.stdout + done.stderr
    assert ("rounds" in done.stdout) == told.startswith("from")
