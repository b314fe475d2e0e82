"""The places of tokens that follow from the bytes that they spell are those that the tokenizer says."""

import pickle
import random

import pytest
from test_templates import load
from tokenizers import normalizers

from jaxsft.chat.extents import Reader

TEXTS = [
    "",
    "a",
    " a  b\n\n c\t",
    "né 🙂👩‍👩‍👧 你好 ﷺ",
    "e\u0301 is no é",  # Which Unicode's normal form changes.
    "<|im_start|>user\nHi<|im_end|>\n",
    "</s> <|endoftext|>  <pad> [INST] ",
    "\ufeffx\u200b\u00a0y",
    "12345 ),;\n\n  {}",
    "▁ĠĊ",
]


def texts(number=60):
    chance = random.Random(0)
    pieces = [*"abc de 123\n\t.,é🙂你", "  ", "\u0301", "don't", "<|im_end|>", "👩‍👩", "\u2028", "\U000e0041"]
    return TEXTS + ["".join(chance.choices(pieces, k=chance.randint(1, 40))) for _ in range(number)]


def read(reader, some):
    window = reader.read(some)
    assert len(window.shifts) == len(window.bounds) == len(some) + 1 and window.bounds[-1] == len(window.ids)
    return [window.of(at) for at in range(len(some))]


def check(tokenizer):
    reader = Reader(tokenizer.backend_tokenizer)
    found = read(reader, texts())
    for text, mine, asked in zip(texts(), found, reader._asked(texts()), strict=True):
        for one, other in zip(mine[:3], asked[:3], strict=True):
            assert one.dtype == other.dtype and one.tolist() == other.tolist(), text
    return reader


def test_places_are_those_of_the_tokenizer(make_tokenizer):
    reader = check(make_tokenizer())
    assert reader._spelling
    again = pickle.loads(pickle.dumps(reader))
    assert again.read(TEXTS).ids.tolist() == reader.read(TEXTS).ids.tolist()


def test_on_real_tokenizers(material):
    are_spelt = {folder.name: bool(check(load(folder))._spelling) for folder in (material / "tokenizers").iterdir()}
    assert are_spelt["smollm2"] and are_spelt["qwen3"] and not are_spelt["llama-2"]


def test_bytes_are_compared_also_where_they_are_as_many(make_tokenizer):
    backend = make_tokenizer().backend_tokenizer
    backend.normalizer = normalizers.Replace("xx", "é")  # two characters of two bytes, and one of two
    reader, some = Reader(backend), ["a xx b", "no such", "xx"]
    for mine, asked in zip(read(reader, some), reader._asked(some), strict=True):
        assert [each.tolist() for each in mine[:3]] == [each.tolist() for each in asked[:3]]
    assert read(reader, some)[0].ends[-1] == len("a xx b")


@pytest.mark.parametrize("size", [1, 3, 100])
def test_texts_do_not_depend_on_those_that_are_read_with_them(make_tokenizer, size):
    reader, some = Reader(make_tokenizer().backend_tokenizer), texts()
    together = read(reader, some)
    apart = [tokens for at in range(0, len(some), size) for tokens in read(reader, some[at : at + size])]
    for one, other in zip(together, apart, strict=True):
        assert [each.tolist() for each in one[:3]] == [each.tolist() for each in other[:3]]
