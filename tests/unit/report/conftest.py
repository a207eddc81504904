"""A finished tiny experiment over hostile texts, a page's elements, and headless Chromium spoken to over DevTools' pipe."""

from __future__ import annotations

import base64
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from sparsekd.experiment import Experiment
from sparsekd.plan import Plan
from sparsekd.provenance import heard_warnings
from sparsekd.recipe import Recipe
from sparsekd.report.experiment import ExperimentFacts, read_experiment
from sparsekd.report.page import write_report


class Browser:
    """One tab. Every event that arrives is kept in ``events``."""

    def __init__(self, program: str, profile: Path) -> None:
        to_browser, self._out = os.pipe()
        self._in, from_browser = os.pipe()
        arguments = [
            *("--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"),
            *("--disable-background-networking", "--no-first-run", f"--user-data-dir={profile}", "about:blank"),
        ]
        # DevTools reads from descriptor 3 and writes to 4.
        self._process = subprocess.Popen(
            ["bash", "-c", f'exec "$@" 3<&{to_browser} 4>&{from_browser}', "bash", program, *arguments],
            pass_fds=(to_browser, from_browser),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(to_browser)
        os.close(from_browser)
        self._buffer, self._number, self.events = b"", 0, list[dict[str, Any]]()
        targets = self._ask("Target.getTargets", session=None)["targetInfos"]
        target = next(each["targetId"] for each in targets if each["type"] == "page")
        self._session = self._ask("Target.attachToTarget", session=None, targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.ask(f"{domain}.enable")

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        return self._ask(method, session=self._session, **parameters)

    def _ask(self, method: str, session: str | None, **parameters: Any) -> dict[str, Any]:
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while (answer := self._read()).get("id") != self._number:
            self.events.append(answer)
        assert "error" not in answer, answer
        return dict(answer["result"])

    def _read(self) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            part = os.read(self._in, 1 << 16)
            assert part, "the browser ended"
            self._buffer += part
        message, _, self._buffer = self._buffer.partition(b"\0")
        return dict(json.loads(message))

    def open(self, page: Path, *, width: int = 1280, dark: bool = False, media: str = "") -> None:
        """Load a file at a width, in light or dark, on a screen or as for print; return when it has loaded."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=900, deviceScaleFactor=1, mobile=width < 600)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.ask("Emulation.setEmulatedMedia", media=media, features=[scheme])
        self.events.clear()
        self.ask("Page.navigate", url=page.resolve().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._read())
        painted = "new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))"
        self.ask("Runtime.evaluate", expression=painted, awaitPromise=True)  # on a busy machine the width follows the load

    def value_of(self, expression: str) -> Any:
        """Return the value of an expression in the page, as the debugger reads it: the page's own policy forbids its scripts."""
        return self.ask("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG."""
        data = self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        path.write_bytes(base64.b64decode(data))

    def close(self) -> None:
        self._process.terminate()
        self._process.wait(timeout=20)
        os.close(self._in)
        os.close(self._out)


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    """Headless Chromium; skips where there is none (Debian: the package ``chromium``)."""
    program = shutil.which("chromium") or shutil.which("chromium-browser")
    if program is None:
        pytest.skip("no chromium on this machine; Debian's package of that name has it")
    started = Browser(program, tmp_path_factory.mktemp("chromium"))
    yield started
    started.close()


SHOWN = '<script>alert(1)</script><img src=x onerror="alert(2)"> {{ 7 * 7 }} & &amp; \u05e9\u05dc\u05d5\u05dd $x_1$ '
HOSTILE = SHOWN + "\u202egnp.exe\u0000\u0007"
"""Put before every passage: markup, a template, right-to-left letters, a character that turns what follows, NUL and BEL."""
HOSTILE_IDS = {"q19": "-rf<b>", "sky-2": "../../<i>x</i>", "sky-3": "007"}
"""What a query and two passages that are judged for it are called instead."""
RECIPE: dict[str, Any] = {
    "labels": {"num_negatives": 2, "calibration": {"kind": "zscore"}},
    "training": {"loss": "SparseDistillKLDivLoss", "max_steps": 6, "batch_size": 4, "dev_steps": 3, "learning_rate": 1e-3},
}


@pytest.fixture(scope="session")
def make_plan(tmp_path_factory: pytest.TempPathFactory, sample_folder: Path, tiny_encoder_folder: Path) -> Callable[..., Plan]:
    """Return ``make(cache, overrides, **sections)``: the sample collection with hostile texts, two teachers, a tiny student."""
    folder = tmp_path_factory.mktemp("report") / "hostile"
    shutil.copytree(sample_folder, folder)
    for name, before in (("corpus.jsonl", HOSTILE), ("queries.jsonl", "<b>bold</b> ")):
        rows = [json.loads(line) for line in (folder / name).read_text(encoding="utf-8").splitlines()]
        rows = [{**row, "_id": HOSTILE_IDS.get(row["_id"], row["_id"]), "text": before + row["text"]} for row in rows]
        if name == "corpus.jsonl":
            rows[0]["text"] += "x" * (1 << 20)  # bread-1
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    for path in (folder / "qrels").iterdir():
        judged = [[HOSTILE_IDS.get(word, word) for word in line.split("\t")] for line in path.read_text("utf-8").splitlines()]
        path.write_text("".join("\t".join(words) + "\n" for words in judged), encoding="utf-8")

    def make(cache: Path, overrides: Sequence[str] = (), **sections: Any) -> Plan:
        document: dict[str, Any] = {
            "collection": {"path": str(folder)},
            "mining": {
                "miners": [
                    {"kind": "bm25", "quota": 3},
                    {"kind": "dense", "model": str(tiny_encoder_folder), "max_length": 64, "quota": 3},
                ]
            },
            "teachers": [
                {"name": "tiny", "kind": "dense", "model": str(tiny_encoder_folder), "max_length": 64},
                {"name": "lexical", "kind": "bm25"},
            ],
            **RECIPE,
            "student": {"model": str(tiny_encoder_folder), "max_length": 64, "initial_active_dims": 60},
            "run": {"cache": str(cache), "threads": 1},
            **sections,
        }
        return Plan(Recipe.model_validate(document), tuple(overrides))

    return make


class Finished(NamedTuple):
    """An experiment that has come to its end, its facts and its page."""

    experiment: Experiment
    facts: ExperimentFacts
    path: Path

    @property
    def page(self) -> str:
        return self.path.read_text(encoding="utf-8")


@pytest.fixture(scope="session")
def finished(make_plan: Callable[..., Plan], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """Everything made once, by the stages themselves."""
    from sparsekd.evaluation.evaluate import evaluate

    heard_warnings().messages[:] = ["a warning with an id that nothing breaks: " + "x" * 300]  # and none of other tests
    experiment = Experiment(make_plan(tmp_path_factory.mktemp("finished") / "cache", ["training.max_steps=6"]))
    evaluate(experiment)
    heard_warnings().messages.clear()
    path = write_report(experiment)
    return Finished(experiment, read_experiment(experiment), path)


class Elements(HTMLParser):
    """What a page is made of: (tag, attributes) of every element, text, and whether every element that opens closes in its turn."""

    VOID = frozenset({"meta", "link", "br", "img"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attributes}))
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attributes}))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag, self.getpos()

    def handle_data(self, data: str) -> None:
        self.text += data

    def values_of(self, attribute: str) -> list[str]:
        return [attributes[attribute] for _, attributes in self.found if attribute in attributes]

    def tags(self) -> set[str]:
        return {tag for tag, _ in self.found}


@pytest.fixture(scope="session")
def elements_of() -> type[Elements]:
    return Elements
