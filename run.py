"""The command line of a checkout; `pip install` gives the same commands as `jaxsft`."""

import sys

from jaxsft.__main__ import main

if __name__ == "__main__":
    sys.exit(main())
