"""Where models come from, before anything is loaded."""

from pathlib import Path

import pytest

from penstock.errors import ModelLoadError
from penstock_workers.checkpoint.source import resolve_source
from penstock_workers.settings import ModelSettings

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def model(source: str, **fields: object) -> ModelSettings:
    """Return the settings of an embedding model."""
    return ModelSettings.model_validate({"task": "embed", "source": source, **fields})


def test_folders_and_hub_ids_are_passed_on(tmp_path: Path) -> None:
    """A folder that exists, and whatever looks like a hub id, goes to the library as it is."""
    (tmp_path / "config.json").touch()

    assert resolve_source("m", model(str(tmp_path))) == str(tmp_path)
    assert resolve_source("m", model("org/name")) == "org/name"
    assert Path(resolve_source("m", model("bundled:tiny-chat"))).is_dir()


@pytest.mark.parametrize("revision", [None, "main", "v1.0", COMMIT[:-1]])
def test_remote_code_of_the_hub_must_be_pinned(revision: str | None) -> None:
    """Without a full commit, whoever can push to the repository could run code here."""
    with pytest.raises(ModelLoadError, match="full commit"):
        resolve_source("m", model("org/name", trust_remote_code=True, revision=revision))


def test_pinned_remote_code_is_allowed() -> None:
    """With a full commit the configuration may allow it."""
    allowed = model("org/name", trust_remote_code=True, revision=COMMIT)

    assert resolve_source("m", allowed) == "org/name"


@pytest.mark.parametrize("source", ["/nowhere/at/all", "./nowhere", "~/nowhere-at-all", "a/b/c"])
def test_a_missing_folder_is_not_taken_for_a_hub_id(source: str) -> None:
    """A path that does not exist is told as one, and no hub is asked for it."""
    with pytest.raises(ModelLoadError, match="does not exist"):
        resolve_source("m", model(source))
