"""Tests of this folder share templates and oracles with each other."""

import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parent))
