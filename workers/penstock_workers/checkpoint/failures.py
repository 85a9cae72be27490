"""Why a model does not load, in one line: whatever libraries raise over foreign code and foreign files."""

from collections.abc import Iterator
from contextlib import contextmanager

from penstock.errors import ConfigError, ModelLoadError


@contextmanager
def explained(name: str) -> Iterator[None]:
    """Turn whatever a library raises in the block into one clear line; the next start would meet it again.

    Args:
        name: Name of the model.

    Raises:
        ModelLoadError: One line says why.
        ConfigError: One that the block raised itself.
    """
    try:
        yield
    except (ConfigError, ModelLoadError):
        raise
    except Exception as error:
        raise _explain(name, error) from error


def _explain(name: str, error: Exception) -> ModelLoadError:
    """Return what a library raised while loading as one clear line."""
    text = " ".join(str(error).split())
    if "trust_remote_code" in text:
        return ModelLoadError(
            name, "it needs Python code of its own; allow it with trust_remote_code and a pinned revision"
        )
    return ModelLoadError(name, f"{type(error).__name__}: {text[:300]}")
