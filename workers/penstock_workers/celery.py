"""Where `celery -A penstock_workers` looks for the app. Importing this reads the configuration."""

import os
import sys
from pathlib import Path

# Celery has put the current folder before all others while it looks for this file. What lies there under the
# name of a package is not it, unless this one was found there.
if sys.path[0] in ("", str(Path.cwd())) and Path(__file__).parents[1] != Path.cwd():
    del sys.path[0]

from penstock.errors import ConfigError, PenstockError
from penstock_workers.delivery.internals import why_not_imported
from penstock_workers.running_stack import load_with_stack

try:
    from penstock_workers.serving.app import build_app
except ImportError as error:  # Celery would say that this package has no attribute `celery`
    sys.stderr.write(f"{why_not_imported(error)}\n")
    sys.exit(os.EX_CONFIG)

try:
    app = build_app(load_with_stack(None, {}, only_here=True).loaded.settings)
except PenstockError as error:
    sys.stderr.write(f"{error}\n")
    sys.exit(os.EX_CONFIG if isinstance(error, ConfigError) else 1)
