import gzip
import json

import pyarrow
import pyarrow.parquet
import pytest

from jaxsft.rows.sources import DataError, Row, read_rows, source_digest, source_files


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


def test_bad_rows_come_in_their_place_and_do_not_end_the_reading(tmp_path):
    source = write(tmp_path / "a.jsonl", '{"a": 1}\n{\n{"a": 2}\n[]\n')
    kinds = [row.fields["a"] if isinstance(row, Row) else row.code for row in read_rows(source)]
    assert kinds == [1, "bad-json", 2, "not-an-object"]


def test_skip_and_limit_count_records_good_or_bad_over_all_files(tmp_path):
    write(tmp_path / "a.jsonl", '{"a": 1}\n\n{\n{"a": 3}\n')
    write(tmp_path / "b.csv", "a\n4\n5,5\n6\n")
    write(tmp_path / "c.json", '[{"a": 7}, 8]')
    write(tmp_path / "d.tsv", "a\n9\n")
    everything = list(read_rows(str(tmp_path)))
    assert len(everything) == 9
    for skip in range(10):
        for limit in (None, 0, 1, 4, 20):
            stop = None if limit is None else skip + limit
            assert list(read_rows(str(tmp_path), skip=skip, limit=limit)) == everything[skip:stop]


def test_compressed_files_read_like_plain_ones(tmp_path):

    text = b'{"a": 1}\n{"a": 2}\n'
    plain = list(read_rows(write(tmp_path / "a.jsonl", text)))
    for suffix, content in ((".gz", gzip.compress(text)), (".zst", pyarrow.compress(text, "zstd", asbytes=True))):
        # Two members one after the other, as `cat` makes them.
        source = write(tmp_path / f"a.jsonl{suffix}", content + content)
        assert [row.fields for row in read_rows(source)] == [row.fields for row in plain] * 2
        assert [row.origin for row in read_rows(source)] == [f"{source}:{line}" for line in (1, 2, 3, 4)]
    for name, content in (("b.csv.gz", b"a\n1\n"), ("b.tsv.gz", b"a\n1\n"), ("b.json.gz", b'[{"a": "1"}]')):
        source = write(tmp_path / name, gzip.compress(content))
        assert [row.fields for row in read_rows(source)] == [{"a": "1"}]


def test_a_json_file_is_a_list_or_one_object_per_line_whatever_its_name(tmp_path):
    rows = [{"a": 1}, {"a": {"b": [2]}}]
    for text, lines in {
        json.dumps(rows): (1, "1:12"),
        "\ufeff" + json.dumps(rows, indent=1): (2, 5),
        ' \n [{"a": 1},\n\n {"a": {"b": [2]}}]\n\n': (2, 4),
        '{"a": 1}\n{"a": {"b": [2]}}\n': (1, 2),
        '{"a":\n 1}\n{"a": {\n"b": [2]}}\n': (1, 3),
    }.items():
        source = write(tmp_path / "a.json", text)
        assert list(read_rows(source)) == [
            Row(row, f"{source}:{line}") for row, line in zip(rows, lines, strict=True)
        ], text
    source = write(tmp_path / "a.jsonl", json.dumps(rows, indent=1))
    assert list(read_rows(source)) == [Row(rows[0], f"{source}:2"), Row(rows[1], f"{source}:5")]
    with pytest.raises(DataError, match="a.json:1: not-a-list: a .json data file holds a list of objects"):
        list(read_rows(write(tmp_path / "a.json", '"text"')))


def test_csv_and_tsv_rows_start_at_the_line_of_their_record(tmp_path):
    for suffix, comma in ((".csv", ","), (".tsv", "\t")):
        big = "x" * 200_000
        text = f'q{comma}a\r\n"two\nlines"{comma}1\r\n\r\n{big}{comma}"say ""hi"""\r\n'
        source = write(tmp_path / f"a{suffix}", text)
        assert list(read_rows(source)) == [
            Row({"q": "two\nlines", "a": "1"}, f"{source}:2"),
            Row({"q": big, "a": 'say "hi"'}, f"{source}:5"),
        ]


def test_quotes_in_tsv_are_text_unless_a_cell_is_quoted_as_a_whole(tmp_path):
    header = "q\ta\n"
    for text, cells in {
        '"Gamey" is a word\tyes\n': [['"Gamey" is a word', "yes"]],
        'yes\t"No," she said\nno\t"b"\n': [["yes", '"No," she said'], ["no", "b"]],
        '"a ""word"""\t"b"\n': [['a "word"', "b"]],
        '"two\nlines"\t"tab\there"\n': [["two\nlines", "tab\there"]],
        'x\t"two\nlines"\ny\tz\n': [["x", "two\nlines"], ["y", "z"]],
        # Lines that are as good as rows by themselves are not joined.
        'x\t"open\ny\tclosed"\n': [["x", '"open'], ["y", 'closed"']],
        'x\t"open\ny\tz\n': [["x", '"open'], ["y", "z"]],
    }.items():
        source = write(tmp_path / "a.tsv", header + text)
        assert [list(row.fields.values()) for row in read_rows(source)] == cells, text


def test_a_first_line_that_holds_no_names_is_a_row_and_its_columns_are_numbers(tmp_path):
    question = "Are more people today related to Genghis Khan than Julius Caesar?"
    for suffix, comma in ((".csv", ","), (".tsv", "\t")):
        source = write(tmp_path / f"a{suffix}", f"{question}{comma}yes\nWho?{comma}no\n")
        assert list(read_rows(source)) == [
            Row({"1": question, "2": "yes"}, f"{source}:1"),
            Row({"1": "Who?", "2": "no"}, f"{source}:2"),
        ]
    with pytest.raises(DataError, match="a.csv:1: column 'a' is given twice in the header"):
        list(read_rows(write(tmp_path / "a.csv", "a,a\n1,2\n")))
    with pytest.raises(DataError, match="a.csv: no rows in this file"):
        list(read_rows(write(tmp_path / "a.csv", "a,b\n")))


def test_parquet_rows_leave_out_null_columns(tmp_path):

    rows = [{"q": "a", "n": None}, {"q": None, "n": 3}, {"q": "c", "n": 4}]
    source = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source, row_group_size=2)
    expected = [Row({"q": "a"}, f"{source}:1"), Row({"n": 3}, f"{source}:2"), Row({"q": "c", "n": 4}, f"{source}:3")]
    assert list(read_rows(source)) == expected
    assert list(read_rows(source, skip=1, limit=1)) == expected[1:2]
    write(tmp_path / "bad.parquet", (tmp_path / "a.parquet").read_bytes()[:-20])
    with pytest.raises(DataError, match="bad.parquet: not readable as Parquet"):
        list(read_rows(str(tmp_path / "bad.parquet")))


def test_nulls_that_columnar_files_add_to_tool_arguments_are_left_out(tmp_path):

    rows = [{"calls": [{"arguments": {"city": "Bern"}}]}, {"calls": [{"arguments": {"sum": 3}}, None]}]
    source = str(tmp_path / "a.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), source)
    assert [row.fields for row in read_rows(source)] == rows


def test_folders_and_globs_are_read_in_sorted_order(tmp_path):
    for name in ("b.jsonl", "a/z.jsonl", "a/y.csv", ".hidden/x.jsonl", "notes.txt", "c.JSONL", "state.json"):
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

    def load_dataset(name, config, split, streaming=False):
        asked.append((name, config, split, streaming))
        if name == "org/none":
            raise FileNotFoundError("Dataset 'org/none' doesn't exist\nand more")
        rows = datasets.Dataset.from_list([{"text": "a", "n": None}, {"text": "b", "n": 2}])
        return rows.to_iterable_dataset() if streaming else rows

    # The one thing that is replaced: there is no hub here.
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.chdir(tmp_path)
    rows = list(read_rows("org/name@main:test[:10%]"))
    assert rows == [
        Row({"text": "a"}, "org/name@main:test[:10%]:1"),
        Row({"text": "b", "n": 2}, "org/name@main:test[:10%]:2"),
    ]
    assert list(read_rows("org/name", skip=1)) == [Row({"text": "b", "n": 2}, "org/name:2")]
    assert list(read_rows("org/name", skip=1, stream=True)) == [Row({"text": "b", "n": 2}, "org/name:2")]
    assert asked == [
        ("org/name", "main", "test[:10%]", False),
        ("org/name", None, "train", False),
        ("org/name", None, "train", True),
    ]
    with pytest.raises(DataError, match="org/none: no such file or folder here, and not loaded from the hub: Dataset"):
        list(read_rows("org/none"))


def test_cells_of_csv_are_parted_by_what_parts_its_header(tmp_path):
    rows = [{"prompt": "a, b", "completion": 'say "c"; d'}, {"prompt": "two\nlines", "completion": ""}]
    for parted in (",", ";", "\t", "|"):
        quoted = [[f'"{cell.replace(chr(34), chr(34) * 2)}"' for cell in row.values()] for row in rows]
        text = "\n".join(parted.join(line) for line in [["prompt", '"completion"'], *quoted]) + "\n"
        source = write(tmp_path / "a.csv", text)
        assert [row.fields for row in read_rows(source)] == rows
        told = write(tmp_path / "b.csv", f"sep={parted}\r\n{text}")
        assert list(read_rows(told)) == [Row(rows[0], f"{told}:3"), Row(rows[1], f"{told}:4")]
    for text, rows in [
        ("text\na; b\n", [{"text": "a; b"}]),
        ("a,b;c\n1,2\n", [{"a": "1", "b;c": "2"}]),
        ('"a;b",c\n1,2\n', [{"a;b": "1", "c": "2"}]),
        ('"a,b";c\n1;2\n', [{"a,b": "1", "c": "2"}]),
        ("It is late; we all go home now\na; b\n", [{"1": "It is late; we all go home now"}, {"1": "a; b"}]),
    ]:
        assert [row.fields for row in read_rows(write(tmp_path / "a.csv", text))] == rows


def test_what_save_to_disk_wrote_is_read_like_jsonl(tmp_path):
    import datasets

    rows = [{"q": "a", "n": None, "m": {"x": 1, "y": None}}, {"q": "b", "n": 3, "m": {"x": None, "y": "z"}}]
    expected = [{"q": "a", "m": {"x": 1}}, {"q": "b", "n": 3, "m": {"y": "z"}}]
    dataset = datasets.Dataset.from_list(rows)
    dataset.save_to_disk(str(tmp_path / "saved"), num_shards=2)
    assert [row.fields for row in read_rows(str(tmp_path / "saved"))] == expected
    # What was computed of it later lies beside it.
    datasets.load_from_disk(str(tmp_path / "saved")).map(lambda row: {"q": row["q"] * 2})
    assert list((tmp_path / "saved").glob("cache-*.arrow"))
    assert [row.fields for row in read_rows(str(tmp_path / "saved"))] == expected
    with (
        pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as file,
        pyarrow.ipc.new_file(file, dataset.data.schema) as out,
    ):
        out.write_table(dataset.data.table)
    source = str(tmp_path / "a.arrow")
    assert list(read_rows(source)) == [Row(expected[0], f"{source}:1"), Row(expected[1], f"{source}:2")]
    write(tmp_path / "bad.arrow", b"nothing")
    with pytest.raises(DataError, match="bad.arrow: not readable as Arrow after row 0"):
        list(read_rows(str(tmp_path / "bad.arrow")))
