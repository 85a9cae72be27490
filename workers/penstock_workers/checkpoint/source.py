"""Where a model's files are: a folder, a hub id, or one that ships with Penstock."""

import json
from pathlib import Path
from typing import Any

from penstock.errors import ModelLoadError
from penstock_workers.bundled import bundled_folder
from penstock_workers.settings import ModelSettings

BUNDLED = "bundled:"


def resolve_source(name: str, model: ModelSettings) -> str:
    """Return what `from_pretrained` takes: a folder that exists, or a hub id.

    Raises:
        ModelLoadError: The folder is missing or empty, the bundled model is unknown or not installed,
            or the model may run its own code and is not pinned.
    """
    if model.source.startswith(BUNDLED):
        try:
            return str(bundled_folder(model.source.removeprefix(BUNDLED)))
        except (ValueError, FileNotFoundError) as error:
            raise ModelLoadError(name, str(error)) from error
    folder = Path(model.source).expanduser()
    if folder.is_dir():
        if not any(folder.iterdir()):
            raise ModelLoadError(name, f"folder {folder} is empty")
        return str(folder)
    if folder.is_absolute() or model.source.startswith((".", "~")) or model.source.count("/") > 1:
        raise ModelLoadError(name, f"folder {folder} does not exist")
    if model.trust_remote_code and not _is_commit(model.revision):
        raise ModelLoadError(
            name, "trust_remote_code needs a revision that is a full commit of 40 hex digits"
        )
    return model.source


def _is_commit(revision: str | None) -> bool:
    return revision is not None and len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)


def read_json(source: str, file: str, revision: str | None) -> Any:
    """Return the content of a model's JSON file; None where there is no such file.

    Raises:
        ValueError: The file holds no JSON.
        OSError: The hub does not answer, and the file was not downloaded before.
    """
    path = find_file(source, file, revision)
    if path is None:
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not a valid JSON file: {error}") from None


def find_file(source: str, file: str, revision: str | None) -> Path | None:
    """Return where a model's file is, after a download if it needs one; None where there is no such file.

    Raises:
        OSError: The hub does not answer, and the file was not downloaded before.
    """
    folder = Path(source)
    if folder.is_dir():
        return path if (path := folder / file).is_file() else None
    from transformers.utils.hub import cached_file  # takes seconds to import

    found = cached_file(source, file, revision=revision, _raise_exceptions_for_missing_entries=False)
    return None if found is None else Path(found)
