"""The run's page in a real browser without a network: it opens from a file and draws everything without complaint."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from launcher.cli.app import main
from launcher.report.history import History
from launcher.report.plots import plots
from tests.browser import Browser, find_chromium
from tests.reports import made_plan, write_run

CHROMIUM = find_chromium()
STEPS = 100
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium-headless-shell")


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of a run in which everything has happened."""
    run_dir = tmp_path_factory.mktemp("browser") / "run"
    verdict = {"kind": "finished", "step": STEPS, "message": f"finished {STEPS} steps"}
    write_run(run_dir, STEPS, verdict=verdict)
    assert main(["report", str(run_dir)]) == 0
    return run_dir / "report.html"


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    assert CHROMIUM is not None
    with Browser(CHROMIUM, tmp_path_factory.mktemp("profile")) as browser:
        yield browser


@pytest.mark.parametrize(("width", "dark"), [(1280, False), (390, True)])
def test_every_plot_is_drawn_without_a_complaint(report: Path, browser: Browser, width: int, dark: bool) -> None:
    browser.open(report, width, dark=dark)
    assert browser.complaints() == []
    assert browser.requests() == [report.resolve().as_uri()], "nothing but the page itself"
    expected = {f"plot-{plot.id}": len(plot.lines) for plot in plots(made_plan(report.parent), History(report.parent))}
    assert len(expected) == 17
    curves = "figure => [figure.id, [...figure.querySelectorAll('path.curve')].map(path => path.getTotalLength())]"
    drawn = browser.value(f"[...document.querySelectorAll('figure.plot')].map({curves})")
    assert {name: len(lengths) for name, lengths in drawn} == expected
    assert all(length > 50 for _, lengths in drawn for length in lengths), "each over a part of its plot"
    outside = (
        "[...document.querySelectorAll('figure.plot')].filter(figure => [...figure.querySelectorAll('.curve, text')]"
        ".some(one => { const b = one.getBoundingClientRect(), f = figure.getBoundingClientRect();"
        " return b.right > f.right + 16 || b.left < f.left - 8 || b.bottom > f.bottom + 1 || b.height === 0 }))"
        ".map(figure => figure.id)"
    )
    flat = {f"plot-{name}" for name in ("memory", "cpu", "host_memory", "gpu", "gpu_memory", "power")}
    assert set(browser.value(outside)) <= flat, "curves lie in their plots; a level line has no height"
    assert browser.value("document.documentElement.scrollWidth <= innerWidth"), "nothing makes the page scroll sideways"
    page = browser.value("getComputedStyle(document.body).backgroundColor")
    assert page == ("rgb(13, 17, 23)" if dark else "rgb(255, 255, 255)")
    names = browser.value(
        "[...document.querySelectorAll('svg')].map(svg => svg.getAttribute('aria-label') || svg.ariaHidden)"
    )
    assert all(names)
    assert report.stat().st_size < 3_000_000


def test_values_show_at_the_pointer_and_by_the_arrow_keys(report: Path, browser: Browser) -> None:
    browser.open(report, 1280)
    place = "(() => { const b = document.querySelector('#plot-lr svg').getBoundingClientRect(); return [b.x, b.y] })()"
    browser.value("document.querySelector('#plot-lr').scrollIntoView()")
    x, y = browser.value(place)
    browser.hover(x + 54, y + 40)
    tip = "document.querySelector('#plot-lr .tip.shown').innerText"
    assert browser.value(tip).split("\n") == ["step 1", "learning rate 1.98e-4"]
    arrow = "new KeyboardEvent('keydown', {key: 'ArrowRight'})"
    for _ in range(30):
        browser.value(f"document.querySelector('#plot-lr svg').dispatchEvent({arrow})")
    assert int(browser.value(tip).split("\n")[0].removeprefix("step ")) > 30
    before = browser.value("document.querySelector('#plot-loss path.curve').getAttribute('d')")
    browser.value("document.querySelector('#plot-loss button').click()")
    assert browser.value("document.querySelector('#plot-loss path.curve').getAttribute('d')") != before
    assert browser.complaints() == []


def test_settings_are_searched(report: Path, browser: Browser) -> None:
    browser.open(report, 1280)
    rows = "[...document.querySelectorAll('#settings tbody tr')]"
    shown = f"{rows}.filter(row => !row.hidden).map(row => row.cells[0].innerText)"
    assert len(browser.value(shown)) > 100
    browser.value("search.value = 'optimizer tiny.yaml'; search.dispatchEvent(new Event('input'))")
    assert browser.value(shown) == ["optimizer.lr"]


def test_a_script_of_anybody_elses_does_not_run_and_is_complained_of(
    report: Path, browser: Browser, tmp_path: Path
) -> None:
    """That the tests above can fail, and that the page's policy holds where its escaping would not."""
    text = report.read_text(encoding="utf-8")
    other = "<script>document.title = 'taken over'</script><img src='http://example.org/x.png'>"
    (tmp_path / "spoilt.html").write_text(text.replace("<header", other + "<header", 1), encoding="utf-8")
    browser.open(tmp_path / "spoilt.html", 1280)
    assert browser.value("document.title") == "made up: finished"
    assert len(browser.complaints()) >= 2
    assert all("Content Security Policy" in complaint for complaint in browser.complaints())
