"""`python -m vggtorch` is the command `vggtorch`."""

import sys

from vggtorch.cli import main

if __name__ == "__main__":
    sys.exit(main())
