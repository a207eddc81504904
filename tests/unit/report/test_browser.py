"""Pages in real headless Chromium: nothing is asked for, nothing complains, everything is painted, nothing runs off the side."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

pytestmark = pytest.mark.slow

COMPLAINTS = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Network.loadingFailed")


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_page_opens_without_a_complaint_and_asks_for_nothing(browser: Any, finished: Any, width: int, dark: bool) -> None:
    browser.open(finished.path, width=width, dark=dark)
    browser.value_of("document.title")  # what comes late has come

    assert [event for event in browser.events if event.get("method") in COMPLAINTS] == []
    asked = [event["params"]["request"]["url"] for event in browser.events if event.get("method") == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith("data:")] == [finished.path.as_uri()]


@pytest.mark.parametrize("width", [360, 390, 768, 1030, 1280])
def test_nothing_runs_off_the_side(browser: Any, finished: Any, width: int) -> None:
    browser.open(finished.path, width=width)

    assert browser.value_of("document.documentElement.scrollWidth") == width
    out = "[...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > innerWidth + 1).length"
    assert browser.value_of(out) == 0


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_every_plot_is_painted(browser: Any, finished: Any, dark: bool) -> None:
    browser.open(finished.path, width=390, dark=dark)
    boxes = browser.value_of(
        "[...document.querySelectorAll('svg')].map(e => { const b = e.getBoundingClientRect();"
        " return [b.x + scrollX, b.y + scrollY, b.width, b.height]; })"
    )

    assert len(boxes) == finished.page.count("<svg ")
    for x, y, width, height in boxes:
        clip = {"x": x, "y": y, "width": width, "height": height, "scale": 1}
        data = browser.ask("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)["data"]
        image = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
        colours = image.getcolors(maxcolors=1 << 24)
        assert colours is not None
        paper = max(colours)[1]
        assert sum(paper) < 150 if dark else sum(paper) > 600
        assert sum(count for count, colour in colours if colour != paper) > 0.01 * width * height


def test_a_page_is_printed_light(browser: Any, finished: Any) -> None:
    browser.open(finished.path, width=800, dark=True, media="print")

    assert browser.value_of("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert browser.value_of("getComputedStyle(document.querySelector('nav')).display") == "none"


def test_the_policy_stops_a_script_that_gets_in_all_the_same(browser: Any, finished: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text(finished.page.replace("</main>", "<script>document.title = 'in'</script></main>"), encoding="utf-8")

    browser.open(page)

    assert browser.value_of("document.title") == "hostile: a sparse student and its teachers"
