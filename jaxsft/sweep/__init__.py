"""Several runs that differ in some keys of their config, one after the other, and what came of them side by side.

In: a config, and keys with several values. Out: a run folder for each combination of them, a table and a report. Each
run is left to `train`, in a process of its own. Read `grid.py` first, then `runs.py`.
"""
