"""Runs side by side: metrics of ours and of other trainers as records, curves, one HTML page and its JSON twin.

In: paths of runs. Out: a `Report` (`records.py`). `readers.py` and `tables.py` read metrics, `columns.py` gives them
our names, `caveats.py` says what must be known of others' numbers; `curves.py` makes panels, `svg.py`, `sections.py`
and `page.py` the page, `picture.py` the picture of one run; `make.py` is the way through.
"""
