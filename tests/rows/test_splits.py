"""Folders with splits: the training files are trained, held-out files are examined, and what is left out is said."""

import json
from pathlib import Path

import pytest

from jaxsft.batches.prepare import prepare
from jaxsft.chat.encoder import ChatEncoder, stop_ids
from jaxsft.config import DataConfig
from jaxsft.rows.sources import read_rows, source_digest, source_files
from jaxsft.rows.splits import choose, split_of


@pytest.mark.parametrize(
    ("path", "split"),
    [
        ("train-00000-of-00001.parquet", "train"),
        ("test-00000-of-00001.parquet", "test"),
        ("data/validation-00000.parquet", "validation"),
        ("my_training_set.jsonl", "train"),
        ("squad.dev.json", "validation"),
        ("VAL/a.jsonl", "validation"),
        ("train/test-cases.jsonl", "train"),
        ("test/train-like.jsonl", "test"),
        ("heldout.csv", "test"),
        ("train2.jsonl", "train"),
        ("constrained.jsonl", None),
        ("contest.jsonl", None),
        ("pretraining.jsonl", None),
        ("train_test.jsonl", None),
        ("a/b.jsonl", None),
    ],
)
def test_a_split_is_named_by_a_word_of_the_path(path, split):
    assert split_of(Path(path)) == split


@pytest.mark.parametrize(
    ("files", "trained", "examined", "left_out"),
    [
        ("train-0.a train-1.a test-0.a", "train-0.a train-1.a", "test-0.a", {"test": 1}),
        ("train/a test/a val/a val/b", "train/a", "val/a val/b", {"test": 1, "validation": 2}),
        ("a.jsonl eval.jsonl", "a.jsonl", "eval.jsonl", {"test": 1}),
        ("train.a more.a dev.a", "train.a more.a", "dev.a", {"validation": 1}),
        ("test-0.a test-1.a", "test-0.a test-1.a", "test-0.a test-1.a", {}),
        ("test.a dev.a", "test.a dev.a", "test.a dev.a", {}),
        ("train.a b.a", "train.a b.a", "train.a b.a", {}),
    ],
)  # fmt: skip
def test_the_files_of_the_split_that_is_meant_are_chosen(files, trained, examined, left_out):
    root = Path("folder")
    paths = [root / file for file in files.split()]
    chosen = choose(paths, root)
    assert chosen.files == [root / file for file in trained.split()] and chosen.left_out == left_out
    assert choose(paths, root, held_out=True).files == [root / file for file in examined.split()]
    # What stands above the folder says nothing.
    inside = Path("test") / "validation"
    assert choose([inside / file for file in files.split()], inside).left_out == left_out


@pytest.fixture
def folder(tmp_path):
    for name in ("data/train-0.jsonl", "data/train-1.jsonl", "data/test-0.jsonl", "data/validation-0.jsonl"):
        path = tmp_path / "test" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"prompt": "Which?", "completion": name}) + "\n")
    return tmp_path / "test"


def said(source, **options):
    return [row.fields["completion"] for row in read_rows(str(source), **options)]


def test_folders_and_patterns_are_read_split_by_split(folder):
    train, validation = ["data/train-0.jsonl", "data/train-1.jsonl"], ["data/validation-0.jsonl"]
    for source in (folder, folder / "data", f"{folder}/data/*.jsonl", f"{folder}/**/*.jsonl"):
        assert said(source) == train and said(source, held_out=True) == validation
        assert source_digest(str(source)) != source_digest(str(source), held_out=True)
    # Who names files gets them.
    assert said(f"{folder}/data/test-*.jsonl") == said(folder / "data" / "test-0.jsonl") == ["data/test-0.jsonl"]
    assert said(f"{folder}/data/*-0.jsonl") == ["data/train-0.jsonl"]
    digest = source_digest(str(folder))
    (folder / "data" / "test-0.jsonl").write_text('{"prompt": "a", "completion": "b"}')
    assert source_digest(str(folder)) == digest, "what is not read does not count"
    assert len(source_files(str(folder))) == 2


def test_the_report_says_what_was_left_out_and_a_folder_for_both_is_read_for_each(folder, make_tokenizer):
    config = DataConfig(train=str(folder), eval=str(folder), cache=str(folder.parent / "cache"))
    tokenizer = make_tokenizer()
    encoder = ChatEncoder(tokenizer, config, stop_ids(tokenizer))

    def prepared(source):
        return prepare(config, source, encoder, tokenizer_files_key="t")

    trained, examined = prepared(config.train[0]), prepared(config.eval["eval"])
    assert trained.report["rows"] == 2 and examined.report["rows"] == 1 and trained.key != examined.key
    (note,) = set(trained.report["notes"]) - set(encoder.notes)
    assert "2 files are read for training (train-0.jsonl, ...), and not 1 of test, 1 of validation" in note
    (note,) = set(examined.report["notes"]) - set(encoder.notes)
    assert "1 files are read for examination (validation-0.jsonl, ...), and not 1 of test, 2 of train" in note


def test_the_splits_of_save_to_disk_are_read_like_others(tmp_path):
    import datasets

    splits = {name: datasets.Dataset.from_dict({"completion": [name]}) for name in ("train", "test")}
    datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "saved"))
    assert said(tmp_path / "saved") == ["train"] and said(tmp_path / "saved", held_out=True) == ["test"]
    assert said(tmp_path / "saved" / "test") == ["test"]
