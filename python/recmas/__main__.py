"""``python -m recmas``."""

import sys

from recmas.cli import main

if __name__ == "__main__":
    sys.exit(main())
