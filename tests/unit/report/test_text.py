"""What is left of a text before a page shows it."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparsekd.report.text import visible, without_paths


@given(st.text())
def test_what_is_visible_can_be_written_and_turns_nothing(text: str) -> None:
    shown = visible(text)

    shown.encode("utf-8")
    assert not any(ord(character) < 0x20 and character not in "\n\t" for character in shown)
    assert not set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069") & set(shown)


def test_letters_of_every_script_stay() -> None:
    text = "Ärger שלום مرحبا 中文 นี้ 👩‍🔬 a\u00a0b"

    assert visible(text) == text


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred", "␛[31mred"),
        ("a\ud800b", "a⟨U+D800⟩b"),
        ("a\u2028b\nc\td", "a\nb\nc\td"),
        ("\x7f\x85", "␡⟨U+0085⟩"),
    ],
)
def test_each_kind_of_character_is_shown_its_way(text: str, shown: str) -> None:
    assert visible(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("python pipeline/evaluate.py /tmp/exp/x.toml", "python pipeline/evaluate.py …/x.toml"),
        ('{"path": "/home/me/data/nf"}', '{"path": "…/nf"}'),
        ("['/srv/a', '/srv/b']", "['…/a', '…/b']"),
        ("~/models/x", "…/x"),
        (r"C:\Users\me\x.toml", "…/x.toml"),
        ("/root", "…/root"),
        ("data/collections/nf and 3 / 4 and a/b", "data/collections/nf and 3 / 4 and a/b"),
        ("org/model@main package:gt-all", "org/model@main package:gt-all"),
        ("/srv/data: no such folder; see /etc/x.", "…/data: no such folder; see …/x."),
        ("run.cache=/tmp/h/report/cache", "run.cache=…/cache"),
    ],
)
def test_absolute_paths_are_cut_to_their_last_part(text: str, shown: str) -> None:
    assert without_paths(text) == shown


def test_the_name_of_the_machine_is_left_out() -> None:
    assert socket.gethostname() not in without_paths(f".tmp-x-{socket.gethostname()}-7")
