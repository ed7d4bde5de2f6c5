"""The page in a real browser: it renders without a word on the console, in light and dark, wide and narrow, and its parts do what they say.

Needs Debian's `chromium` (or another Chromium on the path) and Playwright's package for Python, which brings no browser of its own here.
"""

import shutil
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from qpc.page import render
from qpc.page.facts import facts
from qpc.report import mean_bits
from tests.page.checkpoints import HOSTILE, hostile, source

playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by Playwright: pip install playwright")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path: apt-get install chromium")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        running = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pages")
    for name in ("llama", "llama_packed", "gemma3", "mlp"):
        (directory / f"{name}.html").write_text(render(source(name)), encoding="utf-8")
    (directory / "hostile.html").write_text(render(hostile()), encoding="utf-8")
    return directory


@pytest.fixture
def visit(browser: Any, pages: Path) -> Iterator[Any]:
    """Open a page; the test fails if the console has said anything by its end, or anything but the file was asked for."""
    said: list[str] = []
    contexts = []

    def call(name: str, scheme: str = "light", width: int = 1280) -> Any:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, reduced_motion="reduce")
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: said.append(request.url) if not request.url.startswith("file://") else None)
        page.on("dialog", lambda dialog: said.append(dialog.message))
        page.goto((pages / f"{name}.html").as_uri())
        page.wait_for_selector("#law > *")
        return page

    yield call
    for context in contexts:
        context.close()
    assert said == []


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["llama", "llama_packed", "gemma3", "mlp"])
def test_it_renders(visit: Any, name: str, scheme: str, width: int) -> None:
    page = visit(name, scheme, width)
    given = facts(source(name))
    assert page.locator(".cell[data-rows]").count() == sum(len(stack["cells"]) for stack in given["stacks"])
    assert page.locator("#rate .point:not(.ring)").count() == 2 * len(given["rate"])
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth"), "nothing is wider than the window"
    assert page.locator("tbody tr[data-row]").count() == len(given["rows"])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_in_cells_can_be_read(visit: Any, scheme: str) -> None:
    """Contrast of the number and its cell, and of text and page, as WCAG 2 counts it (at least 4.5)."""
    page = visit("gemma3", scheme)
    ratios = page.evaluate(
        """() => {
          const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
          const luminance = (colour) => {
            canvas.fillStyle = colour;
            canvas.fillRect(0, 0, 1, 1);
            const [r, g, b] = [...canvas.getImageData(0, 0, 1, 1).data].map((value) => value / 255)
              .map((value) => (value <= 0.04045 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4));
            return 0.2126 * r + 0.7152 * g + 0.0722 * b;
          };
          const ratio = (one, other) => {
            const [dark, bright] = [luminance(one), luminance(other)].sort((a, b) => a - b);
            return (bright + 0.05) / (dark + 0.05);
          };
          const found = [];
          const cell = document.querySelector(".cell[data-rows]:not(.kept)");
          for (let step = 0; step <= 20; step++) {
            cell.style.setProperty("--t", step / 20);
            const style = getComputedStyle(cell);
            found.push(ratio(style.color, style.backgroundColor));
          }
          const card = getComputedStyle(document.querySelector(".card"));
          found.push(ratio(card.color, card.backgroundColor));
          found.push(ratio(getComputedStyle(document.querySelector(".lead")).color, card.backgroundColor));
          return found;
        }"""
    )
    assert len(ratios) == 23 and min(ratios) >= 4.5


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_more_bits_stand_out_more(visit: Any, scheme: str) -> None:
    page = visit("llama", scheme)
    lightness = [
        page.evaluate(
            """(t) => { const cell = document.querySelector(".cell[data-rows]"); cell.style.setProperty("--t", t);
            return Number(getComputedStyle(cell).backgroundColor.match(/oklch\\(([\\d.]+)/)[1]); }""",
            t / 10,
        )
        for t in range(11)
    ]
    steps = [abs(after - before) for before, after in pairwise(lightness)]
    assert sorted(lightness, reverse=scheme == "light") == lightness
    assert max(steps) == pytest.approx(min(steps), rel=0.01), "the ramp is even in lightness"


def test_cells_have_the_bits_of_the_report(visit: Any) -> None:
    page, rows = visit("llama"), source("llama").report.rows
    for cell in page.locator(".cell[data-rows]").all():
        numbers = map(int, cell.get_attribute("data-rows").split())
        assert cell.inner_text() == f"{mean_bits([rows[number] for number in numbers]):.2f}"


def test_groups_are_outlined(visit: Any) -> None:
    groups = {row.group for row in source("llama").report.rows if len(row.group) > 1}
    page = visit("llama")
    frames = [frame.bounding_box() for frame in page.locator(".outline").all()]
    assert len(frames) == len(groups) > 0
    rows = [row.name for row in source("llama").report.rows]
    for group in groups:
        boxes = [page.locator(f'.cell[data-rows="{rows.index(name)}"]').bounding_box() for name in group]
        assert any(all(_inside(box, frame) for box in boxes) for frame in frames)


def _inside(box: dict[str, float], frame: dict[str, float]) -> bool:
    across = frame["x"] <= box["x"] and box["x"] + box["width"] <= frame["x"] + frame["width"]
    return across and frame["y"] <= box["y"] and box["y"] + box["height"] <= frame["y"] + frame["height"]


def test_another_measure_is_shown(visit: Any) -> None:
    page = visit("llama")
    report = source("llama").report
    page.get_by_role("radio", name="Time").click()
    assert page.get_by_role("radio", name="Time").get_attribute("aria-checked") == "true"
    shown = [float(text) for text in page.locator(".cell[data-rows] span").all_inner_texts()]
    assert sum(shown) == pytest.approx(1e6 * (report.latency_s or 0.0), rel=0.05)
    page.keyboard.press("ArrowLeft")
    assert page.get_by_role("radio", name="Size").get_attribute("aria-checked") == "true"


def test_details_by_pointer_and_by_keyboard(visit: Any) -> None:
    page, rows = visit("llama"), source("llama").report.rows
    tip = page.locator("#tip")
    assert tip.is_hidden()
    page.locator('.cell[data-rows="1"]').hover()
    assert rows[1].name in tip.inner_text() and f"{rows[1].bits:.3f}" in tip.inner_text()
    lit = {int(row) for row in page.locator(".point.lit").evaluate_all("all => all.map((each) => each.dataset.row)")}
    assert {rows[row].name for row in lit} == set(rows[1].group)
    page.locator("h1").hover()
    assert tip.is_hidden()
    page.locator('.cell[data-rows="0"]').focus()
    assert rows[0].name in tip.inner_text()
    page.keyboard.press("ArrowDown")
    assert rows[1].name in tip.inner_text(), "the next kind of the same layer"
    page.keyboard.press("Escape")
    assert tip.is_hidden()
    page.locator(".box[data-row]").last.focus()
    page.wait_for_timeout(100)
    assert tip.is_visible(), "though the focus has scrolled the page"


def test_the_grid_can_be_reached_and_left_by_tab(visit: Any) -> None:
    page = visit("llama")
    page.get_by_role("radio", name="Bits").focus()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.classList.contains('cell')")
    page.keyboard.press("Tab")
    assert not page.evaluate("document.activeElement.classList.contains('cell')"), "one stop for all cells"


def test_the_table_is_sorted_and_filtered(visit: Any) -> None:
    page, rows = visit("llama"), source("llama").report.rows
    for column, values in (("sensitivity", [row.sensitivity or 0.0 for row in rows]), ("bits", [row.bits for row in rows])):
        for direction in (False, True):
            page.get_by_role("button", name=column, exact=True).click()
            order = [int(row) for row in page.locator("tbody tr[data-row]").evaluate_all("all => all.map((each) => each.dataset.row)")]
            found = [values[index] for index in order]
            assert found == sorted(values, reverse=direction)
    assert page.locator("th[aria-sort]").count() == 1
    page.get_by_role("searchbox").fill("LAYERS.1 down")
    assert page.locator("tbody tr[data-row]:visible").count() == 1
    assert page.locator("#count").inner_text() == f"1 of {len(rows)} linears"


def test_one_kind_alone(visit: Any) -> None:
    page = visit("llama")
    page.locator("#kinds button").first.click()
    left = page.locator(".point:not(.dim)").evaluate_all("all => [...new Set(all.map((each) => each.dataset.kind))]")
    assert left == [page.locator("#kinds button").first.get_attribute("data-only")]
    page.locator("#kinds button").first.click()
    assert page.locator(".point.dim").count() == 0


def test_the_block_is_drawn_with_the_colours_of_its_cells(visit: Any) -> None:
    page = visit("llama")
    for box in page.locator(".box.coloured").all():
        row = box.get_attribute("data-row")
        fill = box.locator("rect").evaluate("(each) => getComputedStyle(each).fill")
        assert fill == page.locator(f'.cell[data-rows="{row}"]').evaluate("(each) => getComputedStyle(each).backgroundColor")


def test_hostile_names_are_text(visit: Any) -> None:
    page = visit("hostile")
    assert page.locator("img").count() == 0
    assert page.locator("h1").inner_text() == HOSTILE
    page.locator('.cell[data-rows="0"]').hover()
    assert HOSTILE in page.locator("#tip").inner_text()
    page.locator("[data-tip]").last.hover()
    assert HOSTILE in page.locator("#tip").inner_text()
