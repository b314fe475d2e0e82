import json

import pytest

from jaxsft.data.sources import DataError, Row, read_rows, source_digest, source_files


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_jsonl_rows_come_lossless_with_file_and_line(tmp_path):
    rows = [{"a": None, "b": {"x": 1.5, "y": [1, {}]}}, {"c": "\u2028 \x85 \U0001f600 \r"}]
    text = "\n".join(json.dumps(row, ensure_ascii=False) for row in rows[:1]) + "\r\n\n" + json.dumps(rows[1]) + "\n"
    source = write(tmp_path / "a.jsonl", "\ufeff" + text)
    assert list(read_rows(source)) == [Row(rows[0], f"{source}:1"), Row(rows[1], f"{source}:3")]


def test_text_with_unicode_line_separators_stays_one_line(tmp_path):
    source = write(tmp_path / "a.jsonl", json.dumps({"text": "a\u2028b\x85c"}, ensure_ascii=False))
    assert [row.fields["text"] for row in read_rows(source)] == ["a\u2028b\x85c"]


BAD_LINES = {
    b'{"a": 1': "delimiter",
    b"[1, 2]": "a row is a JSON object, this is a list",
    b"3": "this is a int",
    b'{"a": NaN}': "NaN is not JSON",
    b'{"a": -Infinity}': "-Infinity is not JSON",
    b'{"a": 1e999}': "too large",
    b'{"a": 1, "a": 2}': "key 'a' is given twice",
    b'{"b": {"a": 1, "a": 2}}': "key 'a' is given twice",
    b'{"a": "\xff"}': "not valid UTF-8 (byte 0xff at offset 7)",
    b'{"a": "\\ud800"}': "surrogate",
    b'{"a":' * 50_000: "nested too deep",
    b'{"a": 1} {"a": 2}': "Extra data",
}


@pytest.mark.parametrize("line", BAD_LINES, ids=range(len(BAD_LINES)))
def test_a_bad_jsonl_line_is_named_with_file_line_and_reason(tmp_path, line):
    source = write(tmp_path / "a.jsonl", b'{"a": 1}\n' + line + b'\n{"a": 2}\n')
    with pytest.raises(DataError) as error:
        list(read_rows(source))
    assert str(error.value).startswith("1 unreadable row:\n")
    assert f"{source}:2: " in str(error.value) and BAD_LINES[line] in str(error.value)


def test_bad_rows_of_all_files_are_reported_together_ten_and_the_count(tmp_path):
    write(tmp_path / "a.jsonl", "{\n" * 8)
    write(tmp_path / "b.jsonl", '{"a": 1}\n' + "{\n" * 5)
    with pytest.raises(DataError) as error:
        list(read_rows(str(tmp_path)))
    lines = str(error.value).split("\n")
    assert lines[0] == "13 unreadable rows:" and lines[-1] == "  ... and 3 more" and len(lines) == 12
    assert f"{tmp_path}/b.jsonl:3: " in lines[10]


def test_a_limit_stops_reading_but_hides_no_bad_row_before_it(tmp_path):
    source = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": 2}\n{\n')
    assert [row.fields["a"] for row in read_rows(source, limit=2)] == [1, 2]
    with pytest.raises(DataError, match="a.jsonl:3"):
        list(read_rows(source, limit=3))


def test_a_json_file_holds_one_list_of_objects(tmp_path):
    source = write(tmp_path / "a.json", '[{"a": 1},\n {"a": 2}]')
    assert list(read_rows(source)) == [Row({"a": 1}, f"{source}:1"), Row({"a": 2}, f"{source}:2")]
    for content, reason in {
        '{"a": 1}': "holds a dict",
        '{"a": 1}\n{"a": 2}': r"a.json:2: .* must be named .jsonl",
        '[{"a": 1},\n {"a" 2}]': "a.json:2: ",
        '[{"a": 1}, 3]': "a.json:2: a row is a JSON object, this is a int",
        '[{"a": NaN}]': "NaN",
        b"[\xff]": "not valid UTF-8",
    }.items():
        source = write(tmp_path / "a.json", content)
        with pytest.raises(DataError, match=reason):
            list(read_rows(source))


def test_csv_and_tsv_rows_start_at_the_line_of_their_record(tmp_path):
    for suffix, comma in ((".csv", ","), (".tsv", "\t")):
        big = "x" * 200_000
        text = f'q{comma}a\r\n"two\nlines"{comma}1\r\n\r\n{big}{comma}"say ""hi"""\r\n'
        source = write(tmp_path / f"a{suffix}", text)
        assert list(read_rows(source)) == [
            Row({"q": "two\nlines", "a": "1"}, f"{source}:2"),
            Row({"q": big, "a": 'say "hi"'}, f"{source}:5"),
        ]


def test_bad_csv_is_named_with_file_line_and_reason(tmp_path):
    for content, reason in {
        b"a,b\n1,2\n1,2,3\n1,2\n1\n": r"^2 unreadable rows:\n  .*a.csv:3: 3 cells, .* 2 columns\n  .*a.csv:5: 1 cells",
        b'a,b\n1,2\n"1,2\n': r"a.csv:3: not readable as CSV",
        b"a,b\n1,2\n\xff,2\n": r"a.csv:3: not valid UTF-8",
        b"a,a\n1,2\n": "column 'a' is given twice",
        b"a,b\n": "no rows in this file",
    }.items():
        source = write(tmp_path / "a.csv", content)
        with pytest.raises(DataError, match=reason):
            list(read_rows(source))


def test_parquet_rows_leave_out_null_columns(tmp_path):
    import pyarrow
    import pyarrow.parquet

    rows = [{"q": "a", "n": None}, {"q": None, "n": 3}, {"q": "c", "n": 4}]
    source = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source, row_group_size=2)
    expected = [Row({"q": "a"}, f"{source}:1"), Row({"n": 3}, f"{source}:2"), Row({"q": "c", "n": 4}, f"{source}:3")]
    assert list(read_rows(source)) == expected
    write(tmp_path / "bad.parquet", (tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="bad.parquet: not readable as Parquet"):
        list(read_rows(str(tmp_path / "bad.parquet")))


def test_folders_and_globs_are_read_in_sorted_order(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl", "a/y.csv", ".hidden/x.jsonl", "notes.txt", "c.JSONL"):
        write(tmp_path / name, "a\n1\n" if name.endswith("csv") else '{"a": 1}')
    names = [file.relative_to(tmp_path).as_posix() for file in source_files(str(tmp_path))]
    assert names == ["a/y.csv", "a/z.jsonl", "b.jsonl", "c.JSONL"]
    assert [file.name for file in source_files(f"{tmp_path}/**/*.jsonl")] == ["x.jsonl", "z.jsonl", "b.jsonl"]
    assert [file.name for file in source_files(f"{tmp_path}/[b].jsonl")] == ["b.jsonl"]


def test_missing_and_empty_sources_are_errors(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "empty.jsonl", "\n\n")
    write(tmp_path / "empty.json", "[]")
    write(tmp_path / "notes.txt", "hello")
    (tmp_path / "folder").mkdir()
    for source, reason in {
        "missing.jsonl": "missing.jsonl: no such file",
        "./missing": "no such file",
        "/nowhere/data/": "no such file",
        "no such thing": "no such file or folder, and not a hub dataset",
        "*.parquet": "no file fits this pattern",
        "folder": r"folder: no data files in this folder \(looked for .jsonl",
        "notes.txt": "not a known kind of data file",
        "empty.jsonl": "empty.jsonl: no rows in this file",
        "empty.json": "empty.json: no rows in this file",
    }.items():
        with pytest.raises(DataError, match=reason):
            list(read_rows(source))


def test_a_digest_follows_bytes_and_kinds_but_not_places(tmp_path):
    first = write(tmp_path / "one" / "a.jsonl", '{"a": 1}\n')
    second = write(tmp_path / "two" / "b.jsonl", '{"a": 1}\n')
    assert source_digest(first) == source_digest(second) == source_digest(str(tmp_path / "one"))
    assert source_digest(write(tmp_path / "b.csv", '{"a": 1}\n')) != source_digest(first)
    before = source_digest(first)
    assert source_digest(write(tmp_path / "one" / "a.jsonl", '{"a": 2}\n')) != before


def test_a_hub_id_goes_to_datasets_and_its_failure_is_one_clear_error(tmp_path, monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "org/none":
            raise FileNotFoundError("Dataset 'org/none' doesn't exist\nand more")
        return datasets.Dataset.from_list([{"text": "a", "n": None}, {"text": "b", "n": 2}])

    # The one thing that is replaced: there is no hub here.
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    rows = list(read_rows("org/name@main:test[:10%]"))
    assert rows == [
        Row({"text": "a"}, "org/name@main:test[:10%]:1"),
        Row({"text": "b", "n": 2}, "org/name@main:test[:10%]:2"),
    ]
    list(read_rows("org/name"))
    assert asked == [("org/name", "main", "test[:10%]"), ("org/name", None, "train")]
    with pytest.raises(DataError, match="org/none: no such file or folder here, and not loaded from the hub: Dataset"):
        list(read_rows("org/none"))
