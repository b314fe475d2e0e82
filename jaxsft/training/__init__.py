"""Batches become a better state.

In: a state, batches. Out: the next state, a line of metrics, checkpoints that a run continues from.

To read: `loss.py`, `objective.py`, `optim.py` with `optimizers/` and `rounding.py`, and `step.py` are the mathematics,
`compiler_options.py` what they are compiled with, `program.py` reads what came of it; `checkpoint.py` keeps states
(`arrays.py` writes their arrays, `bucket_arrays.py` those in a bucket, `local_copies.py` keeps more of them on local
disks); `metrics.py` makes a line of numbers of what was measured, which `metrics_file.py` keeps, `console.py` shows and
`writers.py` sends on; `summary.py` is what a run says first, `memory.py` and `profile.py` find where its bytes and its
time go; `run_folder.py` says whose run a folder holds, `stop.py` is how a run is asked to stop, `verify.py` tells
whether all is as it was sealed.
"""
