"""Pages of runs and of data in a real browser: all is drawn, nothing is asked of a network, nothing goes wrong."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from opentau_train.errors import EXIT_OK
from opentau_train.tools import inspect, report
from tests.browser import Page, browser, opened
from tests.program import TOY, train_here

pytestmark = pytest.mark.slow

HOSTILE = "a<img src=x onerror=window.pwned=1>\"'<script>window.pwned=1<_script> é 引"


@pytest.fixture(scope="module")
def port():
    with browser() as number:
        yield number


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """{what: a page of it}: two short runs, one with a hostile name, and their data."""
    folder = tmp_path_factory.mktemp("pages")
    words = [*TOY, "trainer.steps=4", "validation.every=2", "validation.max_samples_per_group=4"]
    words += ["flight_recorder=true", "validation.evaluators=[loss,action]", "validation.evaluator.action.num_plots=2"]
    runs = [train_here([*words, f"optimizer.lr={lr}"], folder / name) for lr, name in ((1e-3, "one"), (1e-4, "two"))]
    runs[1] = runs[1].rename(folder / HOSTILE)
    (runs[1] / "quarantine.jsonl").write_text('{"dataset": "</td><script>window.pwned=1</script>", "episode": 1}\n')
    made = {"runs": folder / "runs.html", "data": folder / "data.html"}
    assert report.main([*map(str, runs), "--out", str(made["runs"])]) == EXIT_OK
    cache = f"paths.cache_dir={folder / 'cache'}"
    assert inspect.main([*TOY, cache, "--clips", "2", "--out", str(made["data"])]) == EXIT_OK
    return made


def brightness(picture: bytes) -> float:
    return float(np.median(np.asarray(Image.open(io.BytesIO(picture)).convert("L"))))


CHARTS = """[...document.querySelectorAll('.chart')].map((chart) => ({
  title: chart.parentElement.querySelector('figcaption').textContent,
  curves: [...chart.querySelectorAll('.scatterlayer .trace')].filter((t) => t.querySelector('path')).length,
  outside: (chart.querySelector('svg') ?? chart).getBoundingClientRect().right - chart.getBoundingClientRect().right,
  axes: [...chart.querySelectorAll('.xtitle, .ytitle')].map((t) => t.textContent),
}))"""


def drawn(page: Page) -> list[dict]:
    """The charts of a page, once those that are in sight are drawn."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => setTimeout(done, 100)))")
    return page.evaluate(CHARTS)


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_of_runs_draws_every_chart_and_asks_for_nothing(pages, port, dark):
    with opened(port, pages["runs"], dark=dark, size=(1280, 9000)) as page:
        charts = drawn(page)
        assert page.said == [] and page.asked == [pages["runs"].as_uri()]
        assert len(charts) > 20 and all(chart["curves"] >= 1 and chart["outside"] < 1 for chart in charts)
        titles = {chart["title"]: chart for chart in charts}
        assert titles["Training loss"]["curves"] == 2
        assert titles["Training loss"]["axes"] == ["optimizer step", "loss"]
        assert all(len(chart["axes"]) == 2 for chart in charts), "a name on each axis"
        assert any("episode" in title for title in titles), "sampled chunks"
        assert page.evaluate("window.pwned") is None and page.evaluate("document.images.length") == 0
        assert (brightness(page.screenshot()) < 60) == dark


def chosen(name: str, value: str) -> str:
    """The script of who chooses `value` in the page's control `name`."""
    place = f"document.getElementById('{name}')"
    return f"{place}.value = '{value}'; {place}.dispatchEvent(new Event('input'))"


def test_a_reader_hides_a_run_and_chooses_the_axes(pages, port):
    with opened(port, pages["runs"]) as page:
        assert HOSTILE in page.evaluate("document.querySelectorAll('button[data-series]')[1].textContent")
        page.evaluate("document.querySelectorAll('button[data-series]')[1].click()")
        page.evaluate(chosen("axis", "hours"))
        page.evaluate("document.getElementById('log').click()")
        page.evaluate(chosen("smooth", "0.6"))
        chart = next(c for c in drawn(page) if c["title"] == "Held-out loss")
        assert chart["axes"][0] == "hours of training" and chart["curves"] == 1
        kind = "document.getElementById('chart-0').layout.yaxis.type"
        assert page.evaluate(kind) == "log" and page.said == []
        page.evaluate("document.querySelectorAll('button[data-series]')[1].click()")
        page.evaluate("document.getElementById('chart-0').scrollIntoView(false)")
        assert next(c for c in drawn(page) if c["title"] == "Held-out loss")["curves"] == 2
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        assert next(c for c in drawn(page) if c["title"].startswith("Training loss"))["axes"] == []
        page.evaluate("document.querySelector('[aria-label=\"Training loss\"]').scrollIntoView()")
        assert next(c for c in drawn(page) if c["title"] == "Training loss")["curves"] == 4, "as they are, and smoothed"


def test_on_paper_the_charts_fit_the_sheet(pages, port):
    with opened(port, pages["runs"]) as page:
        assert page.pdf().startswith(b"%PDF")
        page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
        width = page.evaluate("document.body.getBoundingClientRect().width")
        assert width < 700 and all(-2 < chart["outside"] < 1 for chart in page.evaluate(CHARTS)), "as wide as its place"
        page.evaluate("window.dispatchEvent(new Event('afterprint'))")
        assert page.evaluate("document.body.getBoundingClientRect().width") > 1000 and page.said == []


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_the_page_of_data_is_drawn_without_a_script(pages, port, dark):
    with opened(port, pages["data"], dark=dark) as page:
        assert page.said == [] and page.asked[0] == pages["data"].as_uri()
        assert all(address.startswith("data:image/") for address in page.asked[1:])
        assert page.evaluate("document.querySelectorAll('figure > svg rect.bar').length") > 200
        assert page.evaluate("[...document.images].every((i) => i.complete && i.naturalWidth > 0)")
        assert page.evaluate("document.images.length") == 4 + 2 * 2 * 2 + 2 * 2, "samples; two cameras, and one"
        assert page.evaluate("document.body.scrollWidth <= window.innerWidth") and not page.evaluate(
            "document.scripts.length"
        )
        assert (brightness(page.screenshot()) < 60) == dark


@pytest.mark.parametrize("what", ["runs", "data"])
def test_a_script_that_gets_into_a_page_does_not_run(pages, port, what):
    with opened(port, pages[what]) as page:
        code = "const s = document.createElement('script'); s.textContent = 'window.pwned = 1'; document.body.append(s)"
        page.evaluate(code)
        page.evaluate("document.body.insertAdjacentHTML('beforeend', '<img src=x onerror=\"window.pwned = 1\">')")
        page.evaluate("new Promise((done) => setTimeout(done, 200))")
        assert page.evaluate("window.pwned") is None and "Content Security Policy" in " ".join(page.said)
