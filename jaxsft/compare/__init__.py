"""The same run twice, ours and in PyTorch, side by side: what is exchanged with the two programs, and the checks.

In: a config. Out: a `Report` (`report/records.py`). To read: `hf.py` and `trl.py` are the two comparisons, from the
config to the report; `exchange.py` is the folder by which programs talk, `child.py` starts them, `ours.py` is our run
and `baseline/` theirs. `checks.py` compares arrays and curves, `tokens.py` and `trl_rows.py` prepared rows,
`findings.py` makes a report of the latter.
"""
