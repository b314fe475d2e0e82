"""The processes of a run: that all of them came and agree, and that they end together.

`start.py` is how they find each other, and who did not come.
`table.py` is what they tell each other through, and `exchange.py` how all of them get what all have told.
`logs.py` is what each of them says, in a file of its own.
`agreement.py` compares what all of them must have in common, before the first step.
`disks.py` knows which of them share a folder, and has work done once for each disk.
`sealing.py` seals and looks at folders together.
`doctor.py` looks over all hosts before a run.
`words.py` names some of many.
`failure.py` ends all of them when one ends, each with the first cause as its last words.
`watchdog.py` ends them when no step is finished any more.
`children.py` starts processes that end when this one does.
`exits.py` has the exit codes, and what is said of an error.
"""
