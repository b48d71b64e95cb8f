"""The report as a reader meets it, in a Chromium: `CHROMIUM=/path/to/chromium python -m pytest -m browser`."""

from __future__ import annotations

import io
import os
import re
import shutil

import numpy as np
import pytest

from llmselect.report import write_report
from reported import large_run

pytestmark = pytest.mark.browser
FOUND = [shutil.which(name) for name in ("chromium", "google-chrome", "chromium-browser")]
CHROMIUM = os.environ.get("CHROMIUM") or next(filter(None, FOUND), None)
# How many pixels of the map are drawn on: read from a copy, as reading the canvas itself would slow it down.
INK = """() => {
  const map = document.querySelector('canvas'), copy = new OffscreenCanvas(map.width, map.height).getContext('2d');
  copy.drawImage(map, 0, 0);
  return copy.getImageData(0, 0, map.width, map.height).data.filter((value, i) => i % 4 === 3 && value).length;
}"""


@pytest.fixture(scope="module")
def file(tmp_path_factory, tiny_model):
    """The report of a synthetic run of 3,000 rows, 150 of them selected by each method."""
    return write_report(large_run(tmp_path_factory.mktemp("browser") / "run", tiny_model, 3000, budget=150))


@pytest.fixture(params=["light", "dark"])
def opened(request, file):
    """The page in a browser without a network; what its console says must stay empty."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("no Chromium on the path; name one in $CHROMIUM")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_context(offline=True, color_scheme=request.param, viewport={"width": 1200, "height": 900}).new_page()
        told, asked = [], []
        page.on("console", lambda message: told.append(message.text))
        page.on("pageerror", lambda error: told.append(str(error)))
        page.on("request", lambda one: asked.append(one.url))
        page.goto(file.as_uri())
        yield page
        browser.close()
        assert told == [] and asked == [file.as_uri()]


def numbers(page, column: int) -> list[float]:
    cells = page.locator(f"#explorer tbody tr[data-at] td:nth-child({column})").all_inner_texts()
    return [float(cell.replace(",", "").replace("–", "nan")) for cell in cells]


def test_rows_are_searched_sorted_turned_and_opened(opened):
    opened.select_option("#view", label="scored")
    assert opened.locator("#explorer .note").first.inner_text() == "All 150 rows that scored selected."
    assert numbers(opened, 1) == list(range(1, 21))
    assert numbers(opened, 2) == sorted(numbers(opened, 2), reverse=True)
    opened.get_by_role("button", name="Next").click()
    assert numbers(opened, 1) == list(range(21, 41))
    opened.get_by_role("button", name="tokens").click()
    assert numbers(opened, 4) == sorted(numbers(opened, 4)) and numbers(opened, 4)[0] < numbers(opened, 4)[-1]
    opened.get_by_role("button", name="tokens").click()
    assert numbers(opened, 4) == sorted(numbers(opened, 4), reverse=True)
    assert opened.locator("th[aria-sort=descending]").inner_text() == "tokens"
    source = opened.locator("#explorer tbody tr[data-at] td:nth-child(3)").first.inner_text()
    opened.get_by_role("searchbox").fill(source)
    assert set(opened.locator("#explorer tbody tr[data-at] td:nth-child(3)").all_inner_texts()) >= {source}
    opened.get_by_role("searchbox").fill("no such text anywhere")
    assert numbers(opened, 1) == [] and opened.get_by_text("0 rows, page 1 of 1").is_visible()
    opened.get_by_role("searchbox").fill("")
    opened.select_option("#view", label="near")
    opened.locator("#explorer tbody .open").first.click()
    why = opened.locator("tr.detail").inner_text()
    assert "nearest target example" in why and "cosine" in why and "Why" in why
    opened.get_by_label("Which rows").select_option("rejects")
    assert opened.locator("#explorer .note").first.inner_text() == "The rows that near left, those of the best scores."
    assert len(numbers(opened, 2)) == 20 and np.isnan(numbers(opened, 1)).all()


def test_the_keyboard_reaches_rows_and_map(opened):
    opened.select_option("#view", label="near")
    opened.get_by_role("button", name="rank").focus()
    for _ in range(5):  # over the other headings to the first row
        opened.keyboard.press("Tab")
    opened.keyboard.press("Enter")
    assert opened.locator("tr.detail").count() == 1
    assert opened.evaluate("document.activeElement.getAttribute('aria-expanded')") == "true"
    opened.keyboard.press("Enter")
    assert opened.locator("tr.detail").count() == 0
    opened.locator("canvas").focus()
    opened.keyboard.press("ArrowRight")
    assert "rank 1," in opened.locator(".told").inner_text()
    opened.keyboard.press("ArrowLeft")
    assert "rank 150," in opened.locator(".told").inner_text()
    opened.keyboard.press("Enter")
    assert opened.locator("#explorer tbody tr[data-at]:has(.open[aria-expanded=true]) td").first.inner_text() == "150"
    assert re.search(r"page 8 of 8", opened.locator("#explorer .controls").inner_text())


def test_the_map_shows_the_row_under_the_pointer_and_hides_sources(opened):
    box = opened.locator("canvas").bounding_box()
    opened.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert re.search(r"^s\d+, (not selected|rank \d+), [\d,]+ tokens: \d+ ", opened.locator(".told").inner_text())
    before = opened.evaluate(INK)
    opened.get_by_role("button", name="s0", exact=True).click()
    assert opened.get_by_role("button", name="s0", exact=True).get_attribute("aria-pressed") == "false"
    assert 0 < opened.evaluate(INK) < before


def test_a_narrow_screen_shows_the_text_of_rows_and_scrolls_down_only(opened):
    opened.set_viewport_size({"width": 400, "height": 900})
    opened.select_option("#view", label="near")
    button = opened.locator("#explorer tbody .open").first
    assert button.bounding_box()["width"] > 300
    button.click()
    assert opened.locator("tr.detail").bounding_box()["width"] > 300
    assert opened.evaluate("document.documentElement.scrollWidth") == 400
    small = "(text) => text.getBBox().height * text.getScreenCTM().a"  # as it stands on the screen
    assert min(opened.locator("svg text").evaluate_all(f"(all) => all.map({small})")) > 9


def test_every_part_is_drawn_in_both_schemes(opened):
    for part in ("results", "map", "explorer", "sources", "distributions", "overlap", "method"):
        assert opened.locator(f"#{part} > div").inner_text().strip(), part
    assert opened.locator("#distributions svg").count() == 2 and opened.locator("#overlap td").count() == 9
    widths = opened.evaluate("[...document.querySelectorAll('#sources .track i')].map((i) => i.getBoundingClientRect().width)")
    assert max(widths) > 20, "shares have a length"
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(opened.screenshot(full_page=True)))
    bright = np.asarray(image.convert("L")).mean()
    assert bright > 200 if opened.evaluate("matchMedia('(prefers-color-scheme: light)').matches") else bright < 60
