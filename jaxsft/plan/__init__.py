"""What a run will need, on hardware that one does not have.

In: a config and the name of a topology. Out: a `Plan`, of which nothing is allocated.

To read: `topologies.py` names devices that are not there, `compiling.py` compiles the step of a config for them,
`costs.py` says how long a step takes at least, `make.py` puts all of it together, and `search.py` compares ways to run.
"""
