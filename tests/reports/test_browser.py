"""Reports in a real browser: headless Chromium."""

import base64
import importlib.util
import time
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from headless_browser import CHROMIUM, DRIVER, Browser

from dmjd.config.recipes import folder
from dmjd.data.sources.base import Source
from dmjd.images.preprocess import Preprocess
from dmjd.reports.clock import Clock
from dmjd.reports.facts import FINISHED, RunFacts
from dmjd.reports.report import page_of
from dmjd.reports.sample import Sample

pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER and importlib.util.find_spec("selenium")),
    reason="needs Chromium, chromedriver and selenium",
)

NUM_EMBEDDINGS, NUM_RUNS = 50_000, 20


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.quit()


@pytest.fixture
def page(both) -> Path:
    return both


@pytest.fixture
def shown(browser, page) -> None:
    """The page is open; tests that take this change nothing in it."""
    if browser.driver.current_url != page.as_uri():
        browser.open(page)


def fits(browser) -> bool:
    return browser.run("document.documentElement.scrollWidth <= innerWidth")


def test_nothing_is_requested_and_nothing_fails(browser, page):
    browser.complaints(), browser.requests()
    browser.open(page)
    assert browser.complaints() == []
    assert browser.requests() == [page.as_uri()]
    assert fits(browser)
    images = "[...document.images]"
    count = browser.run(f"{images}.length")
    assert count > 30
    assert browser.run(f"Promise.all({images}.map(i => i.decode())).then(done => done.length)") == count
    assert browser.run(f"{images}.every(i => i.naturalWidth > 0 && i.alt.trim())")
    assert browser.run("[...document.querySelectorAll('.js-plotly-plot')].every(p => p.getAttribute('aria-label'))")
    assert browser.run("document.querySelectorAll('.js-plotly-plot').length") >= 7


@pytest.mark.usefixtures("shown")
def test_names_are_text(browser, finished):
    assert browser.run("document.querySelector('#summary th[scope=row]').textContent") == finished.name
    assert browser.run("document.querySelectorAll('img[src=x], b img, h1 script').length") == 0
    legend = browser.run("document.querySelector('#scatter .legend').textContent")
    assert "<img src=x onerror=aler" in legend
    assert '[b]it\'s "q"[b]' in legend


@pytest.mark.usefixtures("shown")
def test_hovering_shows_a_thumbnail(browser):
    browser.run("document.getElementById('map').scrollIntoView()")
    x, y = browser.run(POINT)
    assert browser.run("document.getElementById('tip').hidden")
    for step in range(3):  # as a mouse moves
        browser.hover(x - 2 + step, y)
        time.sleep(0.05)
    browser.wait("!document.getElementById('tip').hidden", seconds=10)
    tip = "document.getElementById('tip')"
    assert "label: " in browser.run(f"{tip}.textContent")
    background = f"getComputedStyle({tip}.firstElementChild).backgroundImage"
    assert browser.run(f"{background}.startsWith('url(\"data:image/jpeg')")
    size = "(async () => { const i = new Image(); i.src = %s.slice(5, -2); await i.decode(); return i.naturalWidth })()"
    assert browser.run(size % background) == 32 * 64
    browser.hover(5, 5)
    browser.wait(f"{tip}.hidden", seconds=10)


# Where the first point of the map is on the screen.
POINT = """(() => {
  const plot = document.getElementById("scatter"), box = plot.getBoundingClientRect(), layout = plot._fullLayout;
  const trace = plot.data[0];
  return [box.left + layout.xaxis._offset + layout.xaxis.l2p(trace.x[0]),
          box.top + layout.yaxis._offset + layout.yaxis.l2p(trace.y[0])];
})()"""


def test_the_theme_follows_the_system_and_the_button(browser, page):
    theme, back = "document.documentElement.dataset.theme", "getComputedStyle(document.body).backgroundColor"
    text = "document.querySelector('.js-plotly-plot').layout.font.color"
    seen = []
    for system in ("dark", "light"):
        browser.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": system}])
        browser.open(page)
        for expected in (system, "light" if system == "dark" else "dark"):
            assert browser.run(theme) == expected
            seen.append((expected, browser.run(back), browser.run(text)))
            browser.run("document.getElementById('theme').click()")
    browser.command("Emulation.setEmulatedMedia", features=[])
    assert len(set(seen)) == 2
    assert len({back for _, back, _ in seen}) == len({text for _, _, text in seen}) == 2


def test_controls_redraw(browser, page):
    browser.open(page)
    browser.run("(() => { axis.value = 'minutes'; axis.dispatchEvent(new Event('change')) })()")
    assert browser.run("document.querySelector('.plot').layout.xaxis.title.text") == "minutes"
    browser.run("document.querySelector('#legend button').click()")
    assert browser.run("document.querySelector('.plot').data.map(t => t.visible)") == [False, True]
    browser.run("(() => { coloring.value = '-1'; coloring.dispatchEvent(new Event('change')) })()")
    assert browser.run("scatter.data.length") == 1
    assert browser.complaints() == []


def test_a_narrow_window_and_paper(browser, page):
    browser.open(page, width=400)
    assert fits(browser)
    assert browser.run("[...document.images].every(i => i.getBoundingClientRect().right <= innerWidth)")
    browser.open(page)
    pdf = base64.b64decode(browser.command("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")
    assert len(pdf) > 50_000
    assert browser.complaints() == []


class ManyImages(Source):
    """Black images with labels, in three folders."""

    in_chans = 3
    name = "many"
    classes: ClassVar[list[str]] = ["<script>alert(1)</script>", "[/b]", *(f"class {i}" for i in range(28))]
    labels = np.arange(NUM_EMBEDDINGS) % 30

    def __len__(self) -> int:
        return NUM_EMBEDDINGS

    def stored(self, index: int) -> np.ndarray:
        return np.zeros((32, 32, 3), np.uint8)

    def describe(self, index: int) -> str:
        return f"/data/images/{'abc'[index % 3]}/photograph_{index:06d}.jpg"


def large_page() -> str:
    rng = np.random.default_rng(0)
    features = torch.from_numpy(rng.normal(size=(NUM_EMBEDDINGS, 32)).astype(np.float32))
    tiles = rng.integers(0, 256, (1500, 64, 64, 3), dtype=np.uint8)  # noise, which JPEG compresses worst
    sample = Sample(ManyImages(), Preprocess((32, 32)), features, torch.arange(NUM_EMBEDDINGS), tiles, [])
    names = ("loss", "mim", "vis", "lr", "images_per_s", "data_wait", "grad_norm", "effective_rank", "held_out_loss")
    runs = []
    for number in range(NUM_RUNS):
        values = rng.normal(size=(600, len(names)))
        lines = [
            {"step": 20 * i, "epoch": i / 100, "seconds": 3.0 * i} | dict(zip(names, row, strict=True))
            for i, row in enumerate(values.tolist())
        ]
        config = folder("/data/images", f"/runs/{number}")
        runs.append(
            RunFacts(Path(f"/runs/{number}"), f"run {number}", config, FINISHED, {"evaluations": {}}, {}, lines)
        )
    return page_of(runs, {}, sample, {}, Clock(0.0))


@pytest.mark.slow
def test_many_embeddings_and_runs_open_quickly(browser, tmp_path):
    file = tmp_path / "large.html"
    file.write_text(large_page(), encoding="utf-8")
    assert file.stat().st_size < 20e6
    browser.open(file)
    assert browser.run("performance.getEntriesByType('navigation')[0].loadEventEnd") < 3000
    assert browser.run("scatter.data.reduce((n, t) => n + t.x.length, 0)") == NUM_EMBEDDINGS
    assert browser.run("document.querySelector('.plot').data.length") == NUM_RUNS
    legend = browser.run("document.querySelector('#scatter .legend').textContent")
    assert "<script>alert(1)</scrip…" in legend
    assert "[/b]" in legend
    assert browser.complaints() == []
