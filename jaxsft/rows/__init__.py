"""Rows: files, folders, globs and hub datasets become rows, and rows become conversations.

In: what a source of the config names. Out: `Row`s with file and line, and of each an item (`items.py`): a conversation
in the spelling of Hugging Face chat templates, plain text, or tokens; or the `Problem` that makes the row bad. Nothing
here knows a tokenizer.

To read: `sources.py` finds the files (`splits.py`); `json_files.py`, `csv_files.py` and `arrow_files.py` (with
`columns.py`) read them, and share `files.py` and `strict.py`, which is JSON without guesses. `detection.py` decides
which of the formats in `readings.py` the rows have, and `formats.py` makes items of them; `messages.py`, with
`roles.py`, `blocks.py`, `calls.py` and `flags.py`, spells the turns; `trees.py` and `tokenised.py` are two formats of
their own.
"""
