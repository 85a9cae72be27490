"""`python -m penstock_workers`: Celery's command line, with our app found where it is installed.

`celery -A penstock_workers` is the same, but looks for the package in the current folder first.
"""

import os
import sys
from contextlib import suppress

from penstock_workers.delivery.internals import why_not_imported

try:
    from celery.__main__ import main
except ImportError as error:
    sys.stderr.write(f"{why_not_imported(error)}\n")
    sys.exit(os.EX_CONFIG)

import penstock_workers.celery  # noqa: F401  Celery then finds it in memory

if __name__ == "__main__":
    if "flower" in sys.argv:
        with suppress(ImportError):  # Celery says that there is no such command
            from penstock_workers.flower_guard import guard

            guard()
    main()
