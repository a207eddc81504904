"""Stage 1 on a Ray cluster of two nodes on this machine: the bytes are those of one process, whoever is lost."""

from __future__ import annotations

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from sparsekd.artifact import read_manifest
from sparsekd.collection import read_collection

pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

Content = Callable[[Path, str], dict[str, bytes]]
SETTINGS = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": secrets.token_hex(32),
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_worker_niceness": "0",  # Ray's 15 lets them starve beside another test
    "RAY_health_check_initial_delay_ms": "1000",  # a lost node is seen within 3 s in place of some 15
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_failure_threshold": "3",
}
RAY = Path(sys.executable).with_name("ray")
ADDRESS = "127.0.0.1:6479"


class Node:
    """One ``ray start``, with room for one worker, and everything it has started."""

    def __init__(self, *arguments: str) -> None:
        options = ["--num-cpus", "1", "--object-store-memory", "80000000", "--disable-usage-stats", "--block"]
        program = [str(RAY), "start", *arguments, *options]
        self._process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def kill(self) -> None:
        """Lose the node at once, as by a power cut."""
        try:
            top = psutil.Process(self._process.pid)
            processes = [*top.children(recursive=True), top]
        except psutil.NoSuchProcess:
            processes = []
        for process in processes:
            try:
                process.kill()
            except psutil.NoSuchProcess:
                continue
        self._process.wait()


def num_nodes() -> int:
    program = "import ray; ray.init(address='auto', log_to_driver=False); print(sum(node['Alive'] for node in ray.nodes()))"
    environment = {**os.environ, "RAY_ADDRESS": ADDRESS}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    return int(done.stdout) if done.returncode == 0 else 0


def wait_for_nodes(number: int) -> None:
    end = time.monotonic() + 120
    while num_nodes() != number:
        assert time.monotonic() < end, f"no {number} nodes after two minutes"
        time.sleep(0.5)


@pytest.fixture(scope="module")
def second_node() -> Iterator[list[Node]]:
    """A cluster of two nodes; whoever kills the second puts another in its place in the list."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in SETTINGS.items():
            patch.setenv(name, value)
        head = Node("--head", "--port", ADDRESS.partition(":")[2], "--node-ip-address", "127.0.0.1", "--include-dashboard", "false")
        wait_for_nodes(1)
        nodes = [Node("--address", ADDRESS)]
        wait_for_nodes(2)
        yield nodes
        for node in [*nodes, head]:
            node.kill()


JUDGE = """
import os, signal, time

def judge(pairs):
    time.sleep({seconds})
    if any(passage == {poison!r} for _, passage in pairs):
        os.kill(os.getpid(), signal.SIGKILL)
    return [float(len(query) % 7 + len(passage) % 97) for query, passage in pairs]
"""
TEACHER = """[[teachers]]
name = "mine"
kind = "callable"
function = "judges:judge"
identity = {v = "1"}
"""
ON_RAY = ("run.runner=ray", f"run.address='{ADDRESS}'", "run.workers=2")


Place = Callable[..., Any]


@pytest.fixture
def make_place(make_workplace: Place) -> Place:
    """Return ``make_place(seconds, dense=False)``: a workplace whose teacher takes so long a shard."""

    def make(seconds: float = 0.0, dense: bool = False) -> Any:
        place = make_workplace()
        if not dense:
            place.mine_by_bm25_alone()
        path = place.folder / "recipe.toml"
        recipe = path.read_text(encoding="utf-8")
        path.write_text(recipe[: recipe.index("[[teachers]]")] + TEACHER + recipe[recipe.index("[labels]") :], encoding="utf-8")
        (place.folder / "judges.py").write_text(JUDGE.format(seconds=seconds, poison=""), encoding="utf-8")
        return place

    return make


def start(place: Any, *overrides: str) -> Any:
    return place.start("teacher_scores", *ON_RAY, *overrides, **SETTINGS)


def finished(place: Any, process: Any) -> Path:
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return Path(place.folder / stdout.splitlines()[-1])


def banked_rows(place: Any) -> int:
    """Rows over all segments: a pair that two workers scored counts twice."""
    manifests = [json.loads(path.read_text(encoding="utf-8")) for path in (place.cache / "bank" / "scores").glob("*/manifest.json")]
    return sum(segment["rows"] for manifest in manifests for segment in manifest["segments"])


def wait_for_scores(place: Any, process: Any) -> None:
    while not banked_rows(place):
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def assert_bytes_of_one_process(place: Any, folder: Path, alone: Any, content_of: Content) -> None:
    expected = alone.folder / alone.run("teacher_scores").folder
    assert folder.name == expected.name
    assert content_of(folder, "*.arrow") == content_of(expected, "*.arrow")
    assert read_manifest(folder)["files"] == read_manifest(expected)["files"]
    assert banked_rows(place) == banked_rows(alone)


def test_the_cluster_gives_the_bytes_of_one_process(second_node: list[Node], make_place: Place, content_of: Content) -> None:
    place = make_place(dense=True)

    folder = finished(place, start(place))

    assert_bytes_of_one_process(place, folder, make_place(dense=True), content_of)
    assert not list(place.cache.glob(".seen-by-all-*"))


def test_a_lost_driver_run_again_redoes_nothing(second_node: list[Node], make_place: Place, content_of: Content) -> None:
    place = make_place(seconds=0.3)
    process = start(place)
    wait_for_scores(place, process)

    process.send_signal(signal.SIGKILL)
    process.communicate()
    folder = finished(place, start(place))

    assert_bytes_of_one_process(place, folder, make_place(), content_of)


def test_the_shards_of_a_lost_node_run_elsewhere(second_node: list[Node], make_place: Place, content_of: Content) -> None:
    place = make_place(seconds=0.3)
    process = start(place)
    wait_for_scores(place, process)

    second_node.pop().kill()
    folder = finished(place, process)
    second_node.append(Node("--address", ADDRESS))
    wait_for_nodes(2)

    assert_bytes_of_one_process(place, folder, make_place(), content_of)
    assert not list(place.cache.glob(".seen-by-all-*"))


def test_a_passage_that_kills_is_named_with_exit_3(second_node: list[Node], make_place: Place) -> None:
    place = make_place()
    recipe = tomllib.loads((place.folder / "recipe.toml").read_text(encoding="utf-8"))
    collection = read_collection(Path(recipe["collection"]["path"]))
    poison = collection.passages[next(iter(next(iter(collection.qrels["train"].values()))))]
    (place.folder / "judges.py").write_text(JUDGE.format(seconds=0, poison=poison), encoding="utf-8")

    process = start(place, "run.shard_pairs=1")
    stdout, stderr = process.communicate(timeout=500)

    assert process.returncode == 3, stderr
    assert str(place.cache) not in stdout  # where Ray says that a worker died
    num_ill, num_pairs = map(int, re.findall(r"error: teacher mine: (\d+) of (\d+) are in quarantine", stderr)[0])
    assert repr(poison[:80]) in stderr
    assert banked_rows(place) == num_pairs - num_ill


def test_what_no_node_can_hold_is_refused(second_node: list[Node], make_place: Place) -> None:
    place = make_place()

    process = start(place, "run.threads=3")
    _, stderr = process.communicate(timeout=300)

    assert process.returncode == 2, stderr
    assert "error: [run] a worker needs 3 CPUs and 0 GPUs, and no node of the Ray cluster has them (1 CPUs" in stderr


def test_an_address_where_nobody_answers_is_refused(second_node: list[Node], make_place: Place) -> None:
    place = make_place()

    process = start(place, "run.address='127.0.0.1:6480'")
    _, stderr = process.communicate(timeout=300)

    assert process.returncode == 2, stderr
    assert "error: [run] address = '127.0.0.1:6480': no Ray cluster answers there" in stderr
