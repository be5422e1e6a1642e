"""`python -m moekern` is the same as the `moekern` command."""

import sys

from moekern.cli import main

if __name__ == "__main__":
    sys.exit(main())
