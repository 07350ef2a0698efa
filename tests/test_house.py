"""The scripts keep their size, their form and their equal copies; see house.py for the limits."""

import re

import house
import pytest


def test_measures_are_within_their_limits():
    table, over = house.report()
    print(table)
    assert not over, "\n".join([table, *over])


def test_marked_blocks_are_identical_and_where_their_marks_say():
    found = {}
    for path in house.SCRIPTS:
        for title, block in house.blocks(path.read_text()).items():
            found.setdefault(title, {})[path.name[:2]] = block
    assert len(found) >= 4
    for title, copies in found.items():
        first = next(iter(copies.values()))
        assert set(copies.values()) == {first}, f"{title} differs: make same"
        assert sorted(copies) == house.BLOCK.match(first)[1].split(", "), title


@pytest.mark.parametrize("path", house.SCRIPTS, ids=lambda path: path.name)
def test_a_script_imports_nothing_from_another_and_hides_nothing(path):
    text = path.read_text()
    modules = re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.M)
    assert not [name for name in modules if name.startswith(("0", "importlib.util", "tests"))]
    assert "noqa" not in text and "fmt: off" not in text


def test_a_block_is_copied_from_the_first_script_that_holds_it(tmp_path, monkeypatch):
    block = "# --- same in 01, 02: x ---\ny = {}\n# --- end: x ---\n"
    for name, value in (("01_a.py", 1), ("02_b.py", 2)):
        (tmp_path / name).write_text("z = 0\n" + block.format(value))
    monkeypatch.setattr(house, "SCRIPTS", sorted(tmp_path.glob("0*.py")))
    house.make_same()
    assert (tmp_path / "02_b.py").read_text() == "z = 0\n" + block.format(1)
