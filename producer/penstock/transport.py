"""The transport as programs of Celery's own name it: `transport="penstock.transport:Transport"`.

It lies with the workers' parts, which need Celery; nothing is imported before it is asked for.
"""

from importlib import import_module
from typing import Any


def __getattr__(name: str) -> Any:
    return getattr(import_module("penstock_workers.delivery.transport"), name)
