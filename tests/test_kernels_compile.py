"""Every kernel compiles for every card without a GPU; no forward kernel spills; 16-bit forward attention uses Hopper's wgmma."""
import os
import subprocess
import sys

import pytest
from conftest import ROOT

pytest.importorskip("triton", reason="triton is published for Linux only: kernels are compiled there")

from kernels import compile as ahead


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """The whole table, compiled in two processes that do not interpret, whatever this one does."""
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        return ahead.compile_all()
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def test_every_kernel_on_every_card(rows):
    assert {(row["kernel"], row["target"]) for row in rows} == {(name, target) for name in ahead.all_cases() for target in ahead.TARGETS}
    assert not ahead.faults(rows), "\n" + "\n".join(ahead.faults(rows))
    for file in ahead.FILES:
        assert any(row["kernel"].startswith(file) and "forward" in row["kernel"] for row in rows), f"kernels/{file}.py has no forward case"


def test_sixteen_bit_attention_uses_each_card_s_matrix_instruction(rows):
    """A forward attention that fell back to scalar multiplication would be right and ten times too slow."""
    own = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for row in rows:
        if row["kernel"].startswith(("attention forward bf16", "temporal forward bf16")):
            assert own[row["target"]] in row["matrix"].split("+"), row


def test_tables_show_every_row(rows):
    plain, markdown = ahead.table(rows).splitlines(), ahead.markdown(rows).splitlines()
    assert len(plain) == 1 + len(rows) and all(row["kernel"] in line and row["target"] in line for row, line in zip(rows, plain[1:]))
    assert len(markdown) == 2 + len(ahead.all_cases()) and all(line.count("|") == 2 + len(ahead.TARGETS) for line in markdown)


def test_faults_are_found():
    """Each thing that must not be, once."""
    good = {"kernel": "attention forward bf16 D=64", "target": "sm_90", "registers": 100, "spilled": 0, "shared": 4096, "matrix": "wgmma"}
    backward = good | {"kernel": "attention backward bf16 D=64", "spilled": 8, "matrix": "mma"}
    single = good | {"kernel": "attention forward fp32 D=64", "matrix": "none"}
    assert ahead.faults([good, backward, single, good | {"target": "sm_80", "matrix": "mma"}]) == []
    assert "spills 8 bytes" in ahead.faults([good | {"spilled": 8}])[0]
    assert "no wgmma" in ahead.faults([good | {"matrix": "mma"}])[0]
    assert "shared memory" in ahead.faults([good | {"target": "gfx942", "shared": 70000}])[0]
    assert "boom" in ahead.faults([{"kernel": "attention forward bf16 D=64", "target": "sm_90", "error": "CompilationError: boom"}])[0]


def test_command_names_its_errors():
    def run(*arguments, **variables):
        environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"} | variables
        command = [sys.executable, "-m", "kernels.compile", *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)

    unknown = run("--only", "nothing")
    assert unknown.returncode == 1 and "'nothing'" in unknown.stderr and "Traceback" not in unknown.stderr
    interpreted = run(TRITON_INTERPRET="1")
    assert interpreted.returncode == 1 and "unset TRITON_INTERPRET" in interpreted.stderr
