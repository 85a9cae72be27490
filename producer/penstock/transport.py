"""The transport as programs of Celery's own name it: `transport="penstock.transport:Transport"`.

It lies with the workers' parts, which need Celery; nothing is imported before it is asked for.
"""

from importlib import import_module
from typing import Any

from penstock.extras import how_to_install


def __getattr__(name: str) -> Any:
    # `unittest`, `inspect` and reloaders ask every module for such names, in programs without Celery too.
    if name.startswith("__"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = import_module("penstock_workers.delivery.transport")
    except ModuleNotFoundError as error:
        error.msg = f"{error.msg}: {how_to_install('celery')}"
        raise
    return getattr(module, name)
