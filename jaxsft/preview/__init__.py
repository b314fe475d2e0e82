"""What will be trained, for the eye: token by token, in the terminal and as a page.

In: a loader. Out: `Preview` records (`records.py`), made by `make.py` of the examples that `choice.py` takes, token by
token (`pieces.py`), and of the reports of sources (`reports.py`); `terminal.py` and `page.py` show them.
"""
