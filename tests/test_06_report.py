"""The report in a real browser, from a file: nothing in red on the console, no wider than a phone, hostile text harmless."""
import itertools
import re

import pytest
from browser import CHROMIUM, Browser
from test_06_eval import exam, examine, make_run, truth

HOSTILE = ["<script>document.title = 'taken'; throw 1</script>", "</div></script><img src=x onerror=\"throw 2\">",
           "\u202eright to left\u2066 \u200f", "A" * 10_000_000, "W" * 299,
           "</style><style>.card{display:none}", "\" onmouseover=\"throw 3\" x=\"", "\ud800 \0 \x1b[2J"]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of three exams side by side, the last of which says hostile things; its tag is as long as a tag may reasonably be."""
    run = tmp_path_factory.mktemp("report")
    make_run(run)
    with pytest.MonkeyPatch.context() as patch:
        def cost(number):
            return lambda *args: {"seconds": 0.1 * 10 ** number, "world_seconds": 0.0, "tokens": 3, "prompt_tokens": 9, "views": 0,
                                  "vlm_flops": 10 ** (9 + number), "world_flops": None if number == 2 else 0, "peak_gb": 1.0}
        def half(question, blank):
            return question["truth"] if question["number"] % 2 else "no"

        def hostile(question, blank):
            return HOSTILE[question["number"] % len(HOSTILE)] if question["number"] % 3 else question["truth"]
        examine(run, patch, truth, tag="base", spent=cost(0))
        examine(run, patch, half, tag="base-simulator", spent=cost(1))
        examine(run, patch, hostile, tag="a_hostile_student_with_a_long_name", beside=["base", "base-simulator"], spent=cost(2))
    return run / "6_eval/a_hostile_student_with_a_long_name/report.html"


def test_answers_are_cut_and_the_page_stays_small(page):
    text = page.read_text()
    assert "(10,000,000 characters)" in text and len(text) < 10_000_000 and text.count("<script") == 1
    assert "http" not in text.replace("http-equiv", "") and "\u202e" not in text and "\u200f" not in text


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt-get install chromium")
def test_in_a_browser(page, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        for width in (390, 1440):
            browser.open(page, width)
            assert browser.complaints == []
            assert browser.evaluate("document.title").startswith("Exam of a_hostile")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            assert browser.evaluate("""[...document.querySelectorAll('body *')].filter(e => !e.closest('.wide') &&
                e.getBoundingClientRect().right > innerWidth + 1).length""") == 0
            small = "Math.min(...[...document.querySelectorAll('svg text')].map(e => e.getBoundingClientRect().height))"
            assert browser.evaluate(small) > 10  # pixels: labels can be read
            overlaps = """[...document.querySelectorAll('.plots svg')].flatMap(svg => {
                const boxes = [...svg.querySelectorAll('text[fill]')].map(e => e.getBoundingClientRect());
                return boxes.flatMap((a, i) => boxes.slice(i + 1).filter(b => a.left < b.right && b.left < a.right &&
                    a.top + 2 < b.bottom && b.top + 2 < a.bottom)) }).length"""
            assert browser.evaluate(overlaps) == 0
        cards, shown = "document.querySelectorAll('.card').length", "[...document.querySelectorAll('.card')].filter(c => c.offsetHeight)"

        def choose(**choice):
            for name, value in choice.items():
                browser.evaluate(f"{name}.value = {value!r}; {name}.onchange()")
            return browser.evaluate(f"{shown}.length")
        total = browser.evaluate(cards)
        assert choose() == total > 20
        right, wrong = choose(verdict="right"), choose(verdict="wrong")
        assert right and wrong and right + wrong == total  # of the last exam
        assert choose(exam="0", verdict="right") == total and choose(verdict="wrong") == 0  # base knows all
        found = choose(exam="1", verdict="wrong", task="A1")
        assert 0 < found == browser.evaluate(f"{shown}.filter(c => c.dataset.task == 'A1').length") < 5
        assert browser.evaluate("document.getElementById('shown').textContent") == f"{choose()} shown"
        assert browser.evaluate("document.querySelectorAll('.card li').length") == 3 * total  # each with all three answers
        assert browser.complaints == []


def test_the_plot_leaves_out_what_was_not_counted(page):
    assert page.read_text().count("Not in the plot, their cost is unknown: a_hostile_student_with_a_long_name") == 1


def test_labels_of_equal_points_stand_apart():
    exams = [{"tag": f"student {i}", "right": {"mean": 0.5, "low": 0.4, "high": 0.6}} for i in range(4)]
    svg = exam.price_plot(exams, lambda _: 2.0, "seconds")
    places = [(float(x), float(y)) for x, y in re.findall(r'<text x="([\d.]+)" y="([\d.]+)">student', svg)]
    assert len(places) == 4 and min(abs(a - c) // 150 + abs(b - d) // 12 for (a, b), (c, d) in itertools.combinations(places, 2)) >= 1
    assert max(y for _, y in places) < float(re.search(r'viewBox="0 0 360 (\d+)"', svg)[1])
    assert "<circle" in svg and "unknown" not in svg
    assert "unknown: student 0, student 1" in exam.price_plot(exams, lambda _: None, "seconds")
