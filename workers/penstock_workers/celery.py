"""Where `celery -A penstock_workers` looks for the app. Importing this reads the configuration."""

import os
import sys
from pathlib import Path

# Celery has put the current folder before all others while it looks for this file. What lies there under the
# name of a package is not it, unless this one was found there.
if sys.path[0] in ("", str(Path.cwd())) and Path(__file__).parents[1] != Path.cwd():
    del sys.path[0]

from penstock.errors import ConfigError
from penstock.settings import load_settings
from penstock_workers.app import build_app

try:
    app = build_app(load_settings().settings)
except ConfigError as error:
    sys.stderr.write(f"{error}\n")
    sys.exit(os.EX_CONFIG)
