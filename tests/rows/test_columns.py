"""Rows of Parquet, Arrow and the hub come as they were written: the oracle is the same rows as JSONL."""

import json
import pickle

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from jaxsft.rows import formats
from jaxsft.rows.detection import detect_format
from jaxsft.rows.sources import Problem, Row, read_rows

CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}}
# `datasets` types what changes from row to row as JSON: here whole messages, contents, arguments and answers.
MIXED = {
    "messages": [
        {
            "messages": [
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": '{"a": 1}', "tool_calls": [CALL]},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "Hi"}]},
                {"role": "assistant", "content": '"quoted"', "tool_calls": [{"name": "g", "arguments": {"a": "x"}}]},
            ]
        },
    ],
    "contents": [
        {"messages": [{"role": "user", "content": "4"}, {"role": "assistant", "content": "[1]  "}]},
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "4/5 ü"}]},
                {"role": "assistant", "content": '{"a": "b/c"}'},
            ]
        },
        {"messages": [{"role": "user", "content": "null"}, {"role": "assistant", "content": '["a", "ü"]'}]},
        {"messages": [{"role": "user", "content": "1.50"}, {"role": "assistant", "content": "true"}]},
    ],
    "answers": [
        {"prompt": "Hi", "completion": "Hello"},
        {"prompt": [{"role": "user", "content": "4"}], "completion": "4"},
        {"prompt": "[1, 2]", "completion": '{"a": null}'},
        {"prompt": "1e5", "completion": "false"},
        {"prompt": "null", "completion": [{"role": "assistant", "content": "{}"}]},
    ],
    "tools": [
        {"prompt": "Hi", "completion": "a", "tools": [{"name": "f", "parameters": {"x": {"enum": [1, None]}}}]},
        {"prompt": "Hi", "completion": "b", "tools": '[{"name": "g", "parameters": {}}]'},
        {"prompt": "Hi", "completion": "c", "tools": [{"name": "f", "parameters": {"x": {"enum": ["a"]}}}]},
    ],
}


def loaded(rows, tmp_path):
    """As `load_dataset` reads the rows from JSONL."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    found = datasets.load_dataset("json", data_files=str(path), split="train", cache_dir=str(tmp_path / "cache"))
    assert "Json" in str(found.features)
    return found, path


def read(source, **options):
    rows = list(read_rows(str(source), **options))
    assert all(isinstance(row, Row) for row in rows), rows
    return [row.fields for row in rows]


def meant(source, **options):
    """What the rows say, or why they are bad."""
    format = detect_format(read(source, **options)[0])
    found = [formats.convert(Row(fields, ""), format) for fields in read(source, **options)]
    return [each if isinstance(each, Problem) else [item._replace(origin="") for item in each] for each in found]


def alike(source, jsonl, **options):
    """Whether two sources say the same, and all of it can be used."""
    found = meant(source, **options)
    problems = [each for each in found if isinstance(each, Problem)]
    assert not problems, problems
    options.pop("stream", None)
    return found == meant(jsonl, **options)


@pytest.mark.parametrize("name", MIXED)
def test_json_columns_come_as_the_objects_and_texts_that_were_written(name, tmp_path, monkeypatch):
    dataset, path = loaded(MIXED[name], tmp_path)
    dataset.to_parquet(str(tmp_path / "a.parquet"))
    assert alike(tmp_path / "a.parquet", path)
    # Where the Arrow type is lost, `datasets` has noted it.
    table = pyarrow.parquet.read_table(tmp_path / "a.parquet")
    plain = table.cast(pyarrow.schema([lost_json(field) for field in table.schema], metadata=table.schema.metadata))
    pyarrow.parquet.write_table(plain, tmp_path / "b.parquet")
    assert "json" not in str(pyarrow.parquet.read_schema(tmp_path / "b.parquet").types)
    assert alike(tmp_path / "b.parquet", path)
    # The hub, at once and as a stream: there is none here, so what it gives is.
    monkeypatch.chdir(tmp_path)
    for stream in (False, True):
        given = (
            dataset
            if not stream
            else datasets.load_dataset(
                "json", data_files=str(path), split="train", streaming=True, cache_dir=str(tmp_path / "cache")
            )
        )
        monkeypatch.setattr(datasets, "load_dataset", lambda *args, given=given, **options: given)
        assert alike("org/name", path, stream=stream) and alike("org/name", path, stream=stream, skip=1)
        monkeypatch.undo()
        monkeypatch.chdir(tmp_path)


def lost_json(field):
    """The field with text where it had JSON."""

    def plain(kind):
        if getattr(kind, "extension_name", "") == "arrow.json":
            return pyarrow.string()
        if pyarrow.types.is_list(kind):
            return pyarrow.list_(plain(kind.value_type))
        return pyarrow.struct([lost_json(part) for part in kind]) if pyarrow.types.is_struct(kind) else kind

    return pyarrow.field(field.name, plain(field.type))


def test_json_of_others_has_its_type_in_parquet_alone(tmp_path):
    values = ['[{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "{}"}]']
    table = pyarrow.table({"messages": pyarrow.array(values, pyarrow.json_())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet", store_schema=False)
    assert read(tmp_path / "a.parquet") == [{"messages": json.loads(values[0])}]


def test_json_inside_of_structs_keeps_its_nulls_and_structs_do_not(tmp_path):
    arguments = pyarrow.array(['{"a": null, "b": [null]}', "true"], pyarrow.json_())
    parts = {"name": pyarrow.array(["f", "g"]), "arguments": arguments, "id": pyarrow.array([None, "1"])}
    calls = pyarrow.ListArray.from_arrays([0, 2], pyarrow.StructArray.from_arrays(parts.values(), parts.keys()))
    table = pyarrow.table({"calls": calls, "x": pyarrow.array([None], pyarrow.json_())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    expected = [{"name": "f", "arguments": {"a": None, "b": [None]}}, {"name": "g", "arguments": True, "id": "1"}]
    assert read(tmp_path / "a.parquet") == [{"calls": expected}]


def test_text_that_looks_like_json_stays_text(tmp_path):
    texts = ['"4"', '{"role": "user", "content": "a"}', "[1, 2]", "null", "3", '{"broken": ']
    rows = [{"question": text, "answer": text} for text in texts]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == rows
    rows = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text}]} for text in texts]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet")
    assert [found[0].messages for found in meant(tmp_path / "b.parquet")] == [row["messages"] for row in rows]


def test_json_that_is_none_is_a_bad_row_with_its_column(tmp_path):
    table = pyarrow.table({"text": pyarrow.array(['"a"', '{"a": 1, "a": 2}', "{"], pyarrow.json_())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    first, second, third = read_rows(str(tmp_path / "a.parquet"))
    # No library writes an object with a key twice: it was a text.
    assert first.fields == {"text": "a"} and second.fields == {"text": '{"a": 1, "a": 2}'}
    assert third.code == "bad-json" and third.origin.endswith("a.parquet:3")
    assert third.reason.startswith("column 'text': not readable as JSON")


def test_what_may_be_an_object_or_its_text_travels_between_processes(tmp_path):
    table = pyarrow.table({"a": pyarrow.array(['{"a": 1}', "[1, 2]"], pyarrow.json_())})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for fields in read(tmp_path / "a.parquet"):
        copied = pickle.loads(pickle.dumps(fields))
        assert copied == fields and copied["a"].written == fields["a"].written == json.dumps(fields["a"])


def test_maps_are_objects(tmp_path):
    values = pyarrow.array(["1", None, '{"c": null}'], pyarrow.json_())
    table = pyarrow.table({"call": pyarrow.MapArray.from_arrays([0, 3], pyarrow.array(["a", "b", "c"]), values)})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [{"call": {"a": 1, "b": None, "c": {"c": None}}}]


TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": '"4"'}]
SCHEMA = {"type": "object", "properties": {"a": {"type": "string"}}}
PROPERTIES = json.dumps(SCHEMA["properties"])


@pytest.mark.parametrize(
    ("row", "same"),
    [
        ({"messages": [json.dumps(turn) for turn in TURNS]}, {"messages": TURNS}),
        ({"messages": json.dumps(TURNS)}, {"messages": TURNS}),
        ({"messages": [TURNS[0], json.dumps(TURNS[1])]}, {"messages": TURNS}),
        (
            {"messages": [TURNS[0], {**TURNS[1], "tool_calls": [{**CALL, "function": json.dumps(CALL["function"])}]}]},
            {"messages": [TURNS[0], {**TURNS[1], "tool_calls": [CALL]}]},
        ),
        (
            {"messages": TURNS, "tools": [{"function": json.dumps({"name": "f", "parameters": SCHEMA})}]},
            {"messages": TURNS, "tools": [{"function": {"name": "f", "parameters": SCHEMA}}]},
        ),
        (
            {"messages": TURNS, "tools": [{"name": "f", "parameters": json.dumps(SCHEMA)}]},
            {"messages": TURNS, "tools": [{"name": "f", "input_schema": {**SCHEMA, "properties": PROPERTIES}}]},
        ),
        ({"input_ids": "[5, 6, 7]", "labels": "[-100, 6, 7]"}, {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]}),
        ({"segments": '[{"label": true, "text": "a"}]'}, {"segments": [{"label": True, "text": "a"}]}),
        (
            {"message_tree_id": "1", "prompt": json.dumps({"role": "prompter", "text": "a", "replies": []})},
            {"message_tree_id": "1", "prompt": {"role": "prompter", "text": "a", "replies": []}},
        ),
    ],
)  # fmt: skip
def test_where_an_object_is_asked_for_its_json_is_that_object(row, same):
    format = detect_format(row)
    assert formats.convert(Row(row, ""), format) == formats.convert(Row(same, ""), format)


def test_texts_that_take_turns_may_look_like_json():
    texts = ['{"a": 1}', '{"role": "x", "broken"', "Hello", "[1]"]
    for given in (texts, texts[:1] * 2, ['{"content": "no role"}', "4"]):
        (item,) = formats.convert(Row({"conversations": given}, ""), "conversations")
        assert [message["content"] for message in item.messages] == given
