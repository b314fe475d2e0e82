"""Hostile files end in a bad row or one clear error, in time that grows with their size and in bounded memory."""

import gzip
import json
import os
import struct
import time

import pyarrow
import pyarrow.parquet
import pytest

from jaxsft.config import SourceConfig
from jaxsft.rows import columns, csv_files, files
from jaxsft.rows.detection import choose_format
from jaxsft.rows.formats import convert
from jaxsft.rows.sources import DataError, Problem, Row, read_rows
from jaxsft.rows.strict import MAX_ROW_BYTES

ASK, SAY = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}


def write(path, content):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def spelt(row):
    return row if isinstance(row, str) else json.dumps(row)


GROWING = {
    "keys.jsonl": lambda n: spelt({"messages": [ASK, SAY]} | {f"k{i}": i for i in range(n)}),
    "keys given twice.jsonl": lambda n: "{" + ", ".join(f'"k{i}": 1' for i in range(n)) + f', "k{n - 1}": 2}}',
    "keys of a message.jsonl": lambda n: spelt({"messages": [ASK, SAY | {f"k{i}": i for i in range(n)}]}),
    "lists beside messages.jsonl": lambda n: spelt(
        {"messages": [ASK, SAY] * (n // 8)} | {f"k{i}": [0, 1] for i in range(n // 8)}
    ),
    "names.csv": lambda n: ",".join(f"c{i}" for i in range(n)) + "\n" + ",".join("1" * n) + "\n",
    "name given twice.csv": lambda n: ",".join(f"c{i}" for i in range(n)) + f",c{n - 1}\n",
    "open quotes.tsv": lambda n: "a\tb\n" + '"x\ty\n' * n,
    "elements with keys given twice.json": lambda n: "[" + ",".join('{"a": 1, "a": 2}' for _ in range(n)) + "]",
    "deep.json": lambda n: '[{"a": 1}, ' + "[" * n + "]" * n + ', {"a": 2}]',
    "deep and open.json": lambda n: '[{"a": 1, "a": ' + "[" * n + '"' + '\\"' * n,
}


@pytest.mark.parametrize("name", GROWING)
def test_time_grows_with_the_size_and_no_faster(tmp_path, name):
    def seconds(n):
        path = write(tmp_path / name, GROWING[name](n) + "\n" * name.endswith("l"))
        best = 1e9
        for _ in range(3):
            begin = time.process_time()
            try:
                rows = [row for row in read_rows(path) if isinstance(row, Row)]
                chosen = choose_format(rows[:100], SourceConfig(path=path)) if rows else None
                for row in rows if chosen else ():
                    convert(row, chosen.format)
            except DataError:
                pass
            best = min(best, time.process_time() - begin)
        return best

    seconds(100)
    assert seconds(32_000) < 8 * 2.5 * seconds(4_000) + 0.05


def test_json_that_is_nested_too_deep_is_one_bad_row_in_files_of_each_kind(tmp_path):
    deep = '{"text": ' + "[" * 50_000 + '"]", 1' + "]" * 50_000 + "}"
    good = '{"text": "a"}'
    lines = write(tmp_path / "a.jsonl", f"{good}\n{deep}\n{good}\n")
    listed = write(tmp_path / "b.json", f"[{good},\n{deep},\n{good}]")
    for path in (lines, listed):
        rows = list(read_rows(path))
        assert [row.code if isinstance(row, Problem) else row.fields["text"] for row in rows] == ["a", "too-deep", "a"]
        assert rows[1].origin == f"{path}:2"
    twice = '{"text": "a", "text": ' + "[" * 50_000 + "]" * 50_000 + "}"
    rows = list(read_rows(write(tmp_path / "c.json", f"[{good}, {twice}, {good}]")))
    assert [isinstance(row, Row) for row in rows] == [True, False, True]
    for text in ('[{"a": 1, "a": 2', '[{"a": 1, "a": ' + "[" * 50_000, '[{"a": 1, "a": "' + '\\"' * 50_000):
        with pytest.raises(DataError, match=r"d\.json:1: (bad-json|too-deep): .*; the rest of the file cannot be read"):
            list(read_rows(write(tmp_path / "d.json", text)))


def test_an_element_that_is_broken_behind_a_key_given_twice_is_told_in_one_line(tmp_path):
    rows = list(read_rows(write(tmp_path / "a.json", '[{"a": {"b": 1, "b": 2}, c}, {"a": 3}]')))
    assert rows[0].code == "duplicate-key" and rows[1].fields == {"a": 3}


def test_a_line_without_an_end_is_not_read_for_ever(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "MOST_SKIPPED_BYTES", 2 * MAX_ROW_BYTES)
    bomb = gzip.compress(b'{"text": "a"}\n' + b" " * (3 * MAX_ROW_BYTES), 1)
    assert len(bomb) < 2 * 2**20
    for name in ("a.jsonl.gz", "a.csv.gz"):
        rows = read_rows(write(tmp_path / name, bomb))
        with pytest.raises(DataError, match=rf"{name}:2: row-too-large: a line of more than \d+ MiB; the rest"):
            list(rows)


@pytest.mark.parametrize("kind", ["gz", "zst"])
def test_a_list_that_becomes_far_more_than_its_file_is_refused(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(files, "MOST_INFLATED", 2**22)
    text = b'[{"a": 1}\n' + b" " * 2**24 + b"]"
    packed = gzip.compress(text) if kind == "gz" else pyarrow.compress(text, "zstd", asbytes=True)
    path = write(tmp_path / f"a.json.{kind}", packed)
    with pytest.raises(DataError, match=rf"a\.json\.{kind}: becomes more than 4,194,304 bytes, .*give it as \.jsonl"):
        list(read_rows(path))
    (row,) = read_rows(write(tmp_path / "b.json", text))  # As large, and the disk holds it.
    assert row.fields == {"a": 1}


def test_a_quoted_cell_over_many_lines_has_a_bound(tmp_path, monkeypatch):
    monkeypatch.setattr(csv_files, "MAX_ROW_BYTES", 1000)
    path = write(tmp_path / "a.csv", 'a,b\n1,2\n3,"4\n' + "x\n" * 1000 + '"\n')
    with pytest.raises(DataError, match=r"a\.csv:3: row-too-large: a record of more than"):
        list(read_rows(path))
    rows = list(read_rows(write(tmp_path / "b.csv", "a,b\n" + "1,2\n" * 1000)))
    assert len(rows) == 1000, "the bound is of each record"
    rows = list(read_rows(write(tmp_path / "c.tsv", 'a\tb\n"1\t2\n' + "x\ty\n" * 600)))
    assert len(rows) == 601


def test_rows_of_tables_that_are_too_large_are_bad_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(columns, "MAX_ROW_BYTES", 1000)
    table = pyarrow.table({"text": ["a", "b" * 5000, "c"]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "b.arrow", table.schema) as stream:
        stream.write_table(table)
    for name in ("a.parquet", "b.arrow"):
        rows = list(read_rows(str(tmp_path / name)))
        codes = [row.code if isinstance(row, Problem) else row.fields["text"] for row in rows]
        assert codes == ["a", "row-too-large", "c"] and rows[1].origin.endswith(f"{name}:2")


def test_a_parquet_file_that_becomes_far_more_than_it_holds_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [f"{'x' * 5000}{n}" for n in range(500)]})
    pyarrow.parquet.write_table(table, path, compression="zstd", use_dictionary=False)
    assert len(list(read_rows(str(path)))) == 500
    monkeypatch.setattr(files, "MOST_INFLATED", 2**20)
    with pytest.raises(DataError, match=r"a\.parquet: not readable as Parquet: column 'text' of row group 1 is"):
        list(read_rows(str(path)))


def test_tables_whose_sizes_are_false_are_one_clear_error_or_read(tmp_path):
    table = pyarrow.table({"text": [f"row {n}" for n in range(50)]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pyarrow.ipc.new_stream(tmp_path / "b.arrow", table.schema) as stream:
        stream.write_table(table)
    for name in ("a.parquet", "b.arrow"):
        whole = (tmp_path / name).read_bytes()
        for at in range(0, len(whole) - 4, max(len(whole) // 60, 1)):
            damaged = whole[:at] + struct.pack("<i", 2**31 - 1 - at) + whole[at + 4 :]
            try:
                list(read_rows(write(tmp_path / f"damaged.{name}", damaged)))
            except DataError as error:
                assert f"damaged.{name}: " in str(error)


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    (tmp_path / "b.jsonl").symlink_to("/dev/zero")
    (tmp_path / "c.jsonl").symlink_to(tmp_path / "nowhere")
    for name in ("a.jsonl", "b.jsonl", "", "*.jsonl", "[ab].jsonl"):
        with pytest.raises(DataError, match=r"[ab]\.jsonl.*: not a regular file"):
            list(read_rows(str(tmp_path / name)))


def test_a_schema_that_says_it_is_nested_for_ever_is_told_in_one_line(tmp_path):
    table = pyarrow.table({"text": ["a"]})
    table = table.replace_schema_metadata({b"huggingface": b"[" * 100_000})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    assert [row.fields for row in read_rows(str(tmp_path / "a.parquet"))] == [{"text": "a"}]
