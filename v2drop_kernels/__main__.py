"""``python -m v2drop_kernels``: the command line, which is in ``cli/main.py``."""

import sys

from .cli.main import main

if __name__ == "__main__":
    sys.exit(main())
