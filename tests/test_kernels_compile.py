"""Every kernel compiles for Hopper without a GPU, 16-bit forward attention for every card with its
matrix instruction, and no forward kernel spills. `make compile-kernels` compiles all for all.
"""

import os
import re

import pytest
from conftest import script
from gpu import compile as ahead

pytest.importorskip("triton", reason="triton is published for Linux only: kernels compile there")


SIXTEEN_BIT = "forward bf16"


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    """Most of the table, by two processes that do not interpret, whatever this one does."""
    jobs = [(name, target) for name in ahead.all_cases() for target in ahead.TARGETS]
    jobs = [(name, target) for name, target in jobs if target == "sm_90" or SIXTEEN_BIT in name]
    interpret = os.environ.pop("TRITON_INTERPRET", None)
    try:
        return ahead.compile_all(jobs)
    finally:
        if interpret is not None:
            os.environ["TRITON_INTERPRET"] = interpret


def test_every_kernel_on_hopper_and_attention_on_every_card(rows):
    found = {(row["kernel"], row["target"]) for row in rows}
    wanted = {(name, "sm_90") for name in ahead.all_cases()}
    forward = [name for name in ahead.all_cases() if SIXTEEN_BIT in name]
    assert len(forward) == 8
    assert found == wanted | {(name, target) for name in forward for target in ahead.TARGETS}
    assert not ahead.faults(rows), "\n" + "\n".join(ahead.faults(rows))
    forward = {row["kernel"].split()[0] for row in rows if "forward" in row["kernel"]}
    assert forward == {"attention", "temporal", "rays"}


def test_sixteen_bit_attention_uses_each_card_s_matrix_instruction(rows):
    """A forward attention that fell back to scalar products would be right and ten times slower."""
    own = {"sm_80": "mma", "sm_90": "wgmma", "sm_100": "tcgen05", "gfx942": "mfma"}
    for row in rows:
        if row["kernel"].startswith(("attention forward bf16", "temporal forward bf16")):
            assert own[row["target"]] in row["matrix"].split("+"), row


def test_two_programs_of_a_training_step_fit_a_multiprocessor(rows):
    """Hopper's has 65,536 registers and 228 KiB of shared memory, of which a program takes 1 more.

    One computes while the other waits for memory.
    """
    student = re.compile("attention (dq|dkdv) bf16 D=128 causal")
    found = [r for r in rows if r["target"] == "sm_90" and student.match(r["kernel"])]
    assert len(found) == 6
    for row in found:
        threads = 32 * ahead.all_cases()[row["kernel"]][-1]["num_warps"]
        assert row["spilled"] == 0, row
        assert 2 * threads * row["registers"] <= 65536, row
        assert 2 * (row["shared"] + 1024) <= 228 << 10, row


def test_decoding_spills_nothing(rows):
    found = [r for r in rows if r["kernel"].startswith("attention few")]
    assert len(found) == 2 and not any(row["spilled"] for row in found)


def test_tables_show_every_row(rows):
    head, *plain = ahead.table(rows).splitlines()
    assert head.split() == list(ahead.COLUMNS)
    for row, line in zip(rows, plain, strict=True):
        assert row["kernel"] in line and row["target"] in line
    rows = [row for row in rows if SIXTEEN_BIT in row["kernel"]]
    lines = ahead.markdown(rows).splitlines()
    assert len(lines) == 2 + 8
    assert all(line.count("|") == 2 + len(ahead.TARGETS) for line in lines)


GOOD = {
    "kernel": "attention forward bf16 D=64",
    "target": "sm_90",
    "registers": 100,
    "spilled": 0,
    "shared": 4096,
    "matrix": "wgmma",
}


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"kernel": "attention backward bf16 D=64", "spilled": 8, "matrix": "mma"},
        {"kernel": "attention forward fp32 D=64", "matrix": "none"},
        {"target": "sm_80", "matrix": "mma"},
    ],
)
def test_what_is_no_fault(change):
    assert ahead.faults([GOOD | change]) == []


@pytest.mark.parametrize(
    "change, said",
    [
        ({"spilled": 8}, "spills 8 bytes"),
        ({"matrix": "mma"}, "no wgmma"),
        ({"target": "gfx942", "shared": 70000}, "shared memory"),
        ({"error": "CompilationError: boom"}, "boom"),
    ],
)
def test_faults_are_found(change, said):
    [line] = ahead.faults([GOOD | change])
    assert said in line


def test_command_names_its_errors():
    env = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    unknown = script("tests/gpu/compile", "--only", "nothing", check=False, env=env)
    assert unknown.returncode == 1 and "'nothing'" in unknown.stderr
    assert "Traceback" not in unknown.stderr
    env["TRITON_INTERPRET"] = "1"
    interpreted = script("tests/gpu/compile", check=False, env=env)
    assert interpreted.returncode == 1 and "unset TRITON_INTERPRET" in interpreted.stderr
