"""Batches become a better state.

In: a state, batches. Out: the next state, a line of metrics, checkpoints that a run continues from.

To read: `loss.py`, `optim.py` and `step.py` are the mathematics; `checkpoint.py` keeps states; `metrics.py` says what
was measured and `writers.py` where it goes; `summary.py` is what a run says first, `profile.py` where its time goes;
`run_folder.py` is whose run a folder holds, `stop.py` how it is asked to stop, `verify.py` whether all is as it was
sealed.
"""
