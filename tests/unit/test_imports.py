import os
import subprocess
import sys

import pytest

HEAVY = ("torch", "transformers", "sentence_transformers")
CELERY = ("celery", "kombu")
WORKERS = ("penstock_workers", "pydantic_settings")


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("penstock", (*HEAVY, *CELERY, *WORKERS)),
        ("penstock.codec", (*HEAVY, *CELERY, *WORKERS)),
        ("penstock.transport", (*HEAVY, *CELERY, *WORKERS)),
        ("penstock_workers.celery", HEAVY),
        ("penstock_workers.cli", (*HEAVY, *CELERY)),
    ],
)
def test_import_stays_light(module: str, forbidden: tuple[str, ...]) -> None:
    """Services pay for no torch, no Celery and no settings; a worker loads torch with its first model."""
    code = f"import sys, {module}; print(*sorted(sys.modules.keys() & {set(forbidden)!r}))"
    environ = {name: value for name, value in os.environ.items() if not name.startswith("PENSTOCK_")}

    loaded = subprocess.run(
        [sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True, timeout=60
    )

    assert loaded.stdout.split() == []


@pytest.mark.parametrize(
    ("module", "library", "extra"),
    [
        ("lightrag", "lightrag", "lightrag"),
        ("langchain", "langchain_core", "langchain"),
        ("llama_index", "llama_index", "llama-index"),
    ],
)
def test_a_missing_library_is_told_by_its_extra(module: str, library: str, extra: str) -> None:
    """An adapter without its library says what to install, and installs nothing."""
    code = f"import sys; sys.modules[{library!r}] = None; import penstock.adapters.{module}"

    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)

    assert done.returncode == 1
    told = done.stderr.splitlines()[-1]
    assert told.endswith(
        f'is missing: install the extra {extra} from a clone of Penstock: pip install ".[{extra}]"'
    )
