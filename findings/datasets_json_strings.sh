#!/usr/bin/env bash
# A column of `datasets` 5 whose values change type becomes `Json`, and strings in it that happen to be JSON change:
# the text "4" comes back as the number 4, '"quoted"' without its quotes, '{"a": 1}' as an object, "null" as None.
# A row of text answers such as "4" beside one answer that is a list is enough; to_parquet writes what is left.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet datasets==5.2.0 pyarrow==26.0.1
HF_HOME="$folder/hf" HF_DATASETS_OFFLINE=1 "$folder/venv/bin/python" - "$folder" <<'PY'
import json
import sys

import datasets
import pyarrow
import pyarrow.parquet

folder = sys.argv[1]
datasets.disable_progress_bars()
given = ["4", '"quoted"', '{"a": 1}', "null", "plain", ["a list"]]
with open(f"{folder}/rows.jsonl", "w") as file:
    file.writelines(json.dumps({"answer": answer}) + "\n" for answer in given)
rows = datasets.load_dataset("json", data_files=f"{folder}/rows.jsonl", split="train", cache_dir=f"{folder}/cache")
rows.to_parquet(f"{folder}/rows.parquet")
stored = pyarrow.parquet.read_table(f"{folder}/rows.parquet").column("answer").to_pylist()
print("datasets", datasets.__version__, "pyarrow", pyarrow.__version__, rows.features)
for before, after, text in zip(given, rows["answer"], stored):
    print(f"given {before!r:14} comes back as {after!r:14} stored in Parquet as {text}")
assert rows["answer"][:5] == [4, "quoted", {"a": 1}, None, "plain"], "this has changed"
PY
