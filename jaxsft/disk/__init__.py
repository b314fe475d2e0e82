"""How this program treats a disk: what it writes, what it may replace, whom it keeps out, and what it believes.

`buckets.py` gives objects in buckets the methods of files; `writing.py` writes files whole or not at all; `locks.py`
keeps a folder to one process; `seal.py` says what a finished folder holds, to the byte; `pages.py` marks what was made
for people; `foreign.py` reads what others made, without trust.
"""
