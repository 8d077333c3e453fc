"""Tests of the report in headless Chromium: no network, no complaint, keyboard alone will do."""

import os
import shutil
from pathlib import Path

import pytest

from mmmem_jax.video import report
from tests.video.report_test import HOSTILE, UNKNOWN, _question, _view

playwright = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the PATH")


@pytest.fixture(scope="module")
def browser():
    with playwright.sync_playwright() as p:
        browser = p.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture
def show(browser, tmp_path):
    """Opens a page as a file. When the test ends, the browser must not have complained of anything
    nor asked for anything else."""
    opened, complaints, requests = [], [], []

    def show(text, **options):
        path = tmp_path / "report.html"
        path.write_text(text, encoding="utf-8")
        page = browser.new_page(**options)
        page.set_default_timeout(5000)
        opened.append(page)
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: complaints.append(dialog.message))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(path.as_uri())
        return page

    yield show
    for page in opened:
        page.close()
    assert complaints == []
    assert requests == [(tmp_path / "report.html").as_uri()] * len(opened)


@pytest.fixture(scope="module")
def text():
    return report.page([_view(), _view("park", 9)], [UNKNOWN, _question()])


def _focused(page) -> str:
    """Id of what has the focus, else its text."""
    return page.evaluate("document.activeElement.id || document.activeElement.textContent")


def test_tab_reaches_everything_in_order(show):
    page = show(report.page([_view(num_clips=9)], [_question()]))
    wanted = page.evaluate(
        """[...document.querySelectorAll("a, button, summary, .item")]
             .filter((e) => e.checkVisibility()).map((e) => e.id || e.textContent)"""
    )
    assert len(wanted) > 35
    page.evaluate(
        """window.reached = [];
           addEventListener("focusin", ({target: e}) => reached.push(e.id || e.textContent))"""
    )
    for _ in wanted:
        page.keyboard.press("Tab")
    assert page.evaluate("reached") == wanted


def test_focus_is_seen(show, text):
    page = show(text)
    style = "getComputedStyle(document.querySelector('#v0-c4 .ring')).stroke"
    before = page.evaluate(style)
    page.focus("#v0-c2")
    page.keyboard.press("ArrowRight")
    assert _focused(page) == "v0-c4"
    assert page.evaluate(style) != before


def test_keys_move_and_select(show, text):
    page = show(text)
    panel = page.locator("#v0 .panel").first
    page.focus("#v0-c0")
    for key, at in {
        "ArrowLeft": "v0-c0",  # the first stays
        "ArrowRight": "v0-c1",
        "End": "v0-c23",
        "ArrowUp": "v0-e5",
        "Home": "v0-e0",
        "ArrowDown": "v0-c0",
    }.items():
        page.keyboard.press(key)
        assert _focused(page) == at
    page.keyboard.press("Enter")
    assert panel.locator("h4").inner_text() == "Clip 0, 0:00–0:10"
    assert "A person and a dog" in panel.inner_text()
    assert panel.locator("svg.frame").count() == 2
    page.keyboard.press("ArrowUp")
    page.keyboard.press(" ")
    assert panel.locator("h4").inner_text() == "Episode 0:00–0:40"
    assert page.locator("#v0 [aria-pressed=true]").count() == 1
    panel.get_by_role("link", name="dog").focus()
    page.keyboard.press("Enter")
    assert _focused(page) == "v0-n1"
    assert "seen with" in panel.inner_text().lower()


def test_the_graph_shows_an_entity_and_its_edges(show, text):
    page = show(text)
    page.get_by_role("button", name="dog: 18 mentions, grounded in 2 episodes").first.click()
    panel = page.locator("#v0 .panel").nth(1)
    assert panel.locator("h4").inner_text() == "dog"
    assert page.locator("#v0 .edge.on").count() == 2


def test_zoom_keeps_the_focus_in_view(show, text):
    page = show(text)
    page.focus("#v0-e4")
    for key, zoom in {"+": "×2", "=": "×4", "-": "×2"}.items():
        page.keyboard.press(key)
        assert page.locator("#v0 output").inner_text() == zoom
    width = page.evaluate("document.querySelector('#v0 .canvas').offsetWidth")
    box = page.locator("#v0-e4 .ring").bounding_box()
    view = page.locator("#v0 .scroll").first.bounding_box()
    assert width == pytest.approx(2 * view["width"])
    assert view["x"] <= box["x"] <= view["x"] + view["width"]
    labels = page.locator("#v0 .axis text").all_inner_texts()
    assert len(labels) > 5
    page.get_by_role("button", name="Fit").first.click()
    assert page.locator("#v0 output").inner_text() == "×1"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1200])
def test_a_picture(show, text, tmp_path, scheme, width):
    """Nothing sticks out of the page; the picture is for who looks."""
    page = show(text, viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.locator("#v0-c8 .ring").click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    folder = Path(os.environ.get("MMMEM_ARTEFACTS") or tmp_path)
    folder.mkdir(parents=True, exist_ok=True)
    page.screenshot(path=folder / f"report-{width}-{scheme}.png", full_page=True)


def test_hostile_text_is_shown_and_not_run(show):
    page = show(report.page([_view(text=HOSTILE)], [_question(HOSTILE)]))
    page.focus("#v0-c1")
    page.keyboard.press("Enter")
    assert "onerror=alert(1)" in page.locator("#v0 .panel").first.inner_text()
    assert page.locator("img").count() == 0


def test_an_empty_memory(show):
    assert "holds no video" in show(report.page([])).inner_text("main")
