"""Pieces that recur in several scripts are the same in each."""
import re

import pytest
from conftest import ROOT

SCRIPTS = sorted(ROOT.glob("0[1-6]_*.py"))
BLOCK = re.compile(r"^# --- same in ([\d, ]+): (.*?) ---\n.*?^# --- end.*? ---\n", re.S | re.M)


def test_shared_blocks_are_identical():
    found = {}
    for path in SCRIPTS:
        for block in BLOCK.finditer(path.read_text()):
            found.setdefault(block[2], {})[path.name[:2]] = block[0]
    assert len(found) >= 5
    for title, copies in found.items():
        assert len(set(copies.values())) == 1, f"{title} differs between {', '.join(copies)}"
        stated = re.match(r"# --- same in ([\d, ]+):", next(iter(copies.values())))[1].split(", ")
        assert sorted(copies) == stated, f"{title} is in {sorted(copies)}, its mark says {stated}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_scripts_import_nothing_from_each_other(path):
    assert not re.search(r"^\s*(from|import) (0|importlib)", path.read_text().replace("from importlib.metadata import version", ""), re.M)
