"""The report in a real browser, from a file: nothing in red on the console, no wider than a phone,
hostile text harmless; and the plot."""

import re

import pytest
from browser import CHROMIUM, Browser
from test_06_eval import evaluate, evaluation, make_run, truth

HOSTILE = ["<script>document.title = 'taken'; throw 1</script>", '" onmouseover="throw 3" x="']
HOSTILE += ['</div></script><img src=x onerror="throw 2">', "</style><style>div{display:none}"]
HOSTILE += ["\u202eright to left\u2066 \u200f", "\ud800 \0 \x1b[2J", "A" * 10_000_000, "W" * 299]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """The report of three students side by side, the last of which says hostile things."""
    run = tmp_path_factory.mktemp("report")
    make_run(run)

    def half(question, blank):
        return question["truth"] if question["number"] % 2 else "no"

    def hostile(question, blank):
        number = question["number"]
        return HOSTILE[number % len(HOSTILE)] if number % 3 else question["truth"]

    tags = ["base", "base-simulator", "a_hostile_student_with_a_long_name"]
    for i, (tag, says) in enumerate(zip(tags, (truth, half, hostile), strict=True)):
        with pytest.MonkeyPatch.context() as patch:
            cost = {"seconds": 0.1 * 10**i, "world_flops": None if i == 2 else 0}
            evaluate(run, patch, says, cost, tag=tag, beside=tags[:i])
    return run / "6_eval" / tags[-1] / "report.html"


def test_answers_are_cut_and_the_page_stays_small(page):
    text = page.read_text()
    assert (
        "(10,000,000 characters)" in text and len(text) < 10_000_000 and text.count("<script") == 1
    )
    assert "http" not in text.replace("http-equiv", "")
    assert "\u202e" not in text and "\u200f" not in text
    unknown = r"of the world model</td>.*<td>-</td><td></td></tr>"  # not counted
    assert len(re.findall(unknown, text)) == 1


@pytest.mark.skipif(not CHROMIUM, reason="no Chromium here")
def test_in_a_browser(page, tmp_path):
    with Browser(tmp_path / "profile") as browser:
        for width in (390, 1440):
            browser.open(page, width)
            browser.evaluate("document.querySelectorAll('details').forEach(e => e.open = true)")
            assert browser.complaints == []
            assert browser.evaluate("document.title").startswith("Evaluation of a_hostile")
            assert browser.evaluate("document.documentElement.scrollWidth") <= width
            outside = "[...document.querySelectorAll('body *')].filter(e => !e.closest('table') && "
            outside += "e.getBoundingClientRect().right > innerWidth + 1).length"
            assert browser.evaluate(outside) == 0
            broken = "[...document.images].filter(e => !e.complete || !e.naturalWidth).length"
            assert browser.evaluate("document.images.length") > 20
            assert browser.evaluate(broken) == 0
            plot = "document.querySelector('.plot').getBoundingClientRect().width"
            assert browser.evaluate(plot) > 300  # pixels: 4.2 inches of print can be read
        cards = "document.querySelectorAll('.cards > div').length"
        wrong = "document.querySelectorAll('.cards .wrong').length"
        assert 0 < browser.evaluate(wrong) < browser.evaluate(cards) < 14 * 8
        assert browser.complaints == []


def test_names_in_the_plot_do_not_hide_each_other():
    """Equal points: the names stand in a legend below."""
    right = {"mean": 0.5, "low": 0.4, "high": 0.6, "blank": {"mean": 0.2}}
    students = [{"tag": f"student {i}", "right": right} for i in range(4)]
    plot = evaluation.draw([one | {"cost": {"seconds": 2.0}} for one in students])
    again = evaluation.draw([one | {"cost": {"seconds": 2.0}} for one in students])
    text = plot.decode()
    assert text.startswith("<?xml") and plot == again
    comments = re.findall(r"<!-- (.*?) -->", text)  # what is written, in matplotlib's paths
    assert [name for name in comments if name.startswith("student")] == [
        f"student {i}" for i in range(4)
    ]
    assert "blank" in comments and "constant" not in comments
