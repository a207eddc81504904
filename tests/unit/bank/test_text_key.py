from __future__ import annotations

import hashlib

import numpy as np
import pytest

from sparsekd.bank.text_key import text_keys


def test_key_is_the_first_sixteen_bytes_of_sha256() -> None:
    keys = text_keys(["", "größe"])

    assert keys.dtype == np.uint64
    assert keys[1].astype("<u8").tobytes() == hashlib.sha256("größe".encode()).digest()[:16]
    assert keys[0].astype("<u8").tobytes() == hashlib.sha256(b"").digest()[:16]


def test_texts_that_differ_in_white_space_case_or_normal_form_have_different_keys() -> None:
    texts = ["a b", "a  b", "a b ", "A b", "a b\n", "é", "e\N{COMBINING ACUTE ACCENT}"]

    assert len({bytes(key) for key in text_keys(texts)}) == len(texts)


def test_no_texts_give_no_keys() -> None:
    assert text_keys([]).shape == (0, 2)


def test_text_that_is_not_unicode_is_refused_with_its_position() -> None:
    with pytest.raises(ValueError, match=r"text 1 .*not valid Unicode: surrogates not allowed at character 3"):
        text_keys(["fine", "bad\ud800"])
