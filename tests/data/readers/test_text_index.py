"""Texts in blocks, and their index by hashes."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from triderm_dist.data.readers import text_index
from triderm_dist.data.readers.text_index import HashIndex, Texts


@given(st.lists(st.binary(max_size=6).map(lambda middle: os.fsdecode(b"photos/" + middle + b".jpg"))))
def test_texts_are_those_that_were_appended(texts: list[str]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_index, "_BLOCK", 3)  # some are in blocks, others wait
        found = Texts()
        for text in texts:
            found.append(text)
        assert len(found) == len(texts) and list(found) == texts
        assert [found[at] for at in range(len(texts))] == texts and found[1:4] == texts[1:4]


@given(st.lists(st.text(max_size=2), max_size=30), st.text(max_size=2))
def test_positions_are_those_of_a_search(texts: list[str], text: str) -> None:
    index = HashIndex.of(texts)
    assert index.positions(text) == [at for at, each in enumerate(texts) if each == text]
    only = [texts.index(each) if texts.count(each) == 1 else -1 for each in (*texts, text) if each in texts]
    assert index.only([each for each in (*texts, text) if each in texts]).tolist() == only
