"""Traced text is `str` to the letter, and each of its characters is the one of the source that it names."""

import itertools
import json
import pickle
import random

import pytest

from jaxsft.chat.provenance import UNKNOWN, Traced, dump_json, dump_python, holds_traced, join, trace, trace_values

SOURCES = {1: "  ab c\n d </think> x  ", 2: "", 3: "zz<think>q</think>", 4: 'he said "hé\n\\" it\'s 🦊', 5: "k'ey"}


def assert_traced(text, plain):
    """Equal to `plain`, still traced, and true about its characters."""
    assert text == plain and type(text) is Traced and sum(length for length, _, _ in text.runs) == len(text)
    at = 0
    for length, source, offset in text.runs:
        if source:
            assert str.__getitem__(text, slice(at, at + length)) == SOURCES[source][offset : offset + length]
        at += length


@pytest.fixture(params=range(40))
def pair(request):
    """A traced text of several sources, and the same as plain text."""
    random.seed(request.param)
    parts = [random.choice(["L", trace(SOURCES[s], s)]) for s in random.choices([1, 2, 3], k=4)] + [trace("zz", 3)]
    return join(parts), "".join(str.__str__(part) for part in parts)


def test_cutting_keeps_the_places(pair):
    text, plain = pair
    for start, stop in itertools.product((None, 0, 1, 3, -4, -99), (None, 0, 2, 7, -1, 99)):
        assert_traced(text[start:stop], plain[start:stop])
    assert_traced(text[-1], plain[-1])
    assert text[::-1] == plain[::-1] and "".join(text) == plain and list(text) == list(plain)
    with pytest.raises(IndexError):
        text[len(plain)]
    with pytest.raises(TypeError):
        text["key"]


@pytest.mark.parametrize("chars", [None, " \n", "zL"])
def test_trimming_keeps_the_places(pair, chars):
    text, plain = pair
    for name in ("strip", "lstrip", "rstrip"):
        assert_traced(getattr(text, name)(chars), getattr(plain, name)(chars))


@pytest.mark.parametrize("sep", [None, " ", "</think>", "q"])
def test_splitting_keeps_the_places(pair, sep):
    text, plain = pair
    for count, name in itertools.product((-1, 0, 1, 2), ("split", "rsplit")):
        for part, expected in zip(getattr(text, name)(sep, count), getattr(plain, name)(sep, count), strict=True):
            assert_traced(part, expected)
    if sep:
        for name in ("partition", "rpartition"):
            for part, expected in zip(getattr(text, name)(sep), getattr(plain, name)(sep), strict=True):
                assert_traced(part, expected)
    for keep in (False, True):
        for part, expected in zip(text.splitlines(keep), plain.splitlines(keep), strict=True):
            assert_traced(part, expected)


def test_joining_keeps_the_places(pair):
    text, plain = pair
    assert_traced(text + "x", plain + "x")
    assert_traced("x" + text, "x" + plain)
    assert_traced(text * 2, plain * 2)
    assert_traced(text.replace(" ", "_"), plain.replace(" ", "_"))
    assert_traced(text.replace(" ", trace("zz", 3), 1), plain.replace(" ", "zz", 1))
    assert_traced(text.join(["a", trace("zz", 3)]), plain.join(["a", "zz"]))
    assert_traced(text.removesuffix("zz").removeprefix("L"), plain.removesuffix("zz").removeprefix("L"))


def test_another_case_keeps_the_places_where_the_length_stays():
    assert trace("abc", 9).upper().runs == ((3, 9, 0),)
    assert trace("straße", 9).upper().runs == ((7, UNKNOWN, 0),)  # Nothing is known of "STRASSE".


def test_json_is_that_of_the_standard_library_with_places():
    value = {trace(SOURCES[5], 5): [trace(SOURCES[4], 4), 1, None, True, 1.5, {"a": trace(SOURCES[3], 3)}, [], {}]}
    plain = trace_values(value, lambda text: str.__str__(text))
    assert holds_traced(value) and not holds_traced(plain)
    for ascii, indent, separators, sort in itertools.product(
        (True, False), (None, 0, 2, "\t"), (None, (",", ":")), (True, False)
    ):
        options = {"ensure_ascii": ascii, "indent": indent, "separators": separators, "sort_keys": sort}
        text = dump_json(value, **options)
        assert text == json.dumps(plain, **options) and type(text) is Traced
        shown = {(source, offset) for _, source, offset in text.runs if source}
        assert {source for source, _ in shown} == {3, 4, 5}
    text = dump_python(value)
    assert text == str(plain) and {source for _, source, _ in text.runs} == {0, 3, 4, 5}


def test_an_escape_belongs_to_the_character_that_it_spells():
    text = dump_json([trace('a"b', 9)], ensure_ascii=False, indent=None, separators=None, sort_keys=False)
    owners = [(source, offset + i * (length > 1)) for length, source, offset in text.runs for i in range(length)]
    assert text == '["a\\"b"]'
    # Of the brackets and quotes, which are the template's, only the source counts.
    assert [owner[0] for owner in owners] == [0, 0, 9, 9, 9, 9, 0, 0] and owners[2:6] == [
        (9, 0),
        (9, 1),
        (9, 1),
        (9, 2),
    ]


def test_text_keeps_its_places_in_another_process():
    text = pickle.loads(pickle.dumps("x" + trace("zz", 3)))
    assert text.runs == ((1, 0, 0), (2, 3, 0)) and hash(text) == hash("xzz") and text in {"xzz"}
