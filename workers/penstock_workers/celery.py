"""Where `celery -A penstock_workers` looks for the app. Importing this reads the configuration."""

import sys

from penstock.errors import ConfigError
from penstock.settings import load_settings
from penstock_workers.app import build_app
from penstock_workers.lifecycle import EXIT_CONFIG

try:
    app = build_app(load_settings().settings)
except ConfigError as error:
    sys.stderr.write(f"{error}\n")
    sys.exit(EXIT_CONFIG)
