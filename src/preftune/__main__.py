"""``python -m preftune``: the same command line, for launchers that start modules."""

from __future__ import annotations

import sys

from preftune.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
