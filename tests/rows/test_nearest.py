"""What an error says of rows that no format fits: what was found, the nearest format, how to map it; in few lines."""

import json

import pytest
import yaml

from jaxsft.config import SourceConfig
from jaxsft.rows.detection import choose_format
from jaxsft.rows.formats import convert
from jaxsft.rows.messages import Spelling
from jaxsft.rows.nearest import as_yaml, guess
from jaxsft.rows.readings import FORMATS
from jaxsft.rows.sources import DataError, Row

TURNS = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
HELLO = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]

CASES = {
    "questions and answers of other names": {"q": "Hi", "reply": "Hello", "id": 3},
    "in the plural": {"inputs": "Hi", "outputs": "Hello"},
    "in capitals and blanks": {"Question Text": "Hi", "Final Answer": "Hello"},
    "in one word": {"userPrompt": "Hi", "botReply": "Hello"},
    "of doctors": {"Patient": "Hi", "Doctor": "Hello"},
    "misspelt": {"promt": "Hi", "completion": "Hello"},
    "one half known": {"prompt": "Hi", "verdict": "Hello", "score": 0.5},
    "two texts": {"first": "Hi", "second": "Hello", "n": 1},
    "without a header": {"1": "Hi", "2": "Hello"},
    "turns under another name": {"chat_log": TURNS},
    "turns as JSON": {"dialog": json.dumps(TURNS)},
    "turns within": {"data": {"id": 1, "turns": TURNS}},
    "misspelt turns": {"mesages": HELLO},
}


def error_of(*rows):
    with pytest.raises(DataError) as error:
        choose_format([Row(fields, f"a.jsonl:{n}") for n, fields in enumerate(rows, 1)], SourceConfig(path="a.jsonl"))
    return str(error.value)


@pytest.mark.parametrize("name", CASES)
def test_the_first_line_says_what_was_found_and_a_mapping_that_works(name):
    fields = CASES[name]
    first = error_of(fields).splitlines()[0]
    for column in fields:
        assert f"{column} (" in first
    # What it tells one to write is taken as it stands, and means what the row does.
    text = first.partition("columns=")[2]
    columns = yaml.safe_load(text[: text.index("}") + 1])
    chosen = choose_format([Row(fields, "a.jsonl:1")], SourceConfig(path="a.jsonl", columns=columns))
    assert f"they are {chosen.format} by columns=" in first
    (item,) = convert(Row(fields, "a.jsonl:1"), chosen.format, columns=chosen.columns, spelling=Spelling({}, {}))
    assert [(turn["role"], turn["content"]) for turn in item.messages] == [("user", "Hi"), ("assistant", "Hello")]


def test_what_names_do_not_say_is_a_condition():
    assert "if first is the question and second the answer" in error_of({"first": "a", "second": "b"})
    assert "if it is plain text, all of which is to be trained" in error_of({"body": "a"})
    assert "if these are the ids of the model's own tokenizer" in error_of({"token_list": [1, 2]})
    assert guess({"title": "a", "body": "b", "url": "c"}) is None and guess({}) is None


def test_what_is_lacking_is_named():
    first = error_of({"prompt": "a", "n": 3}).splitlines()[0]
    assert "prompt (text), n (number)" in first and "prompt_completion, the nearest, lacks completion" in first


@pytest.mark.parametrize(
    "fields", [*CASES.values(), {}, {"colour": "blue"}, {"a": None, "b": [[]], "c": {}, "d": True}]
)
def test_the_error_is_a_few_lines(fields):
    lines = error_of(fields).splitlines()
    assert len(lines) <= 6 and lines[0].startswith("a.jsonl")
    assert all(line.strip().partition(":")[0] in FORMATS for line in lines[2:])


def test_it_speaks_of_the_first_row_that_nothing_fits():
    assert "a.jsonl:1" in error_of({"q": "a", "reply": "b"}, {"colour": "c"})


def test_a_mapping_is_written_as_yaml_reads_it():
    for columns in (
        {"prompt": "1"},
        {"prompt": "a b"},
        {"prompt": "null: x"},
        {"prompt": "a.b.0", "completion": 'it"s'},
    ):
        assert yaml.safe_load(as_yaml(columns)) == columns
