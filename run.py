"""The command line of a checkout; `pip install` gives the same commands as `jaxsft`."""

import sys

from jaxsft.cli import main

if __name__ == "__main__":
    sys.exit(main())
