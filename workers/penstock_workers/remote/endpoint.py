"""Where a remote model is: its server's URL, and the token that it is asked with."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

from huggingface_hub import constants
from pydantic import SecretStr

from penstock.errors import ModelLoadError
from penstock_workers.settings import PROVIDER, ModelSettings, RemoteSettings


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """An address and what opens it.

    Attributes:
        url: URL that paths are appended to.
        provider: Name of an Inference Provider; None for a server of its own.
        token: Token that requests carry; None for none.
    """

    url: str
    provider: str | None
    token: str | None = field(repr=False)

    @classmethod
    def read(cls, name: str, model: ModelSettings) -> Self:
        """Return a model's endpoint.

        Raises:
            ModelLoadError: its token is nowhere, or a provider is not told which model.
        """
        try:
            token = read_token(model.remote)
        except ValueError as error:
            raise ModelLoadError(name, f"remote.{error}") from error
        provider = model.source.removeprefix(PROVIDER) if model.source.startswith(PROVIDER) else None
        if provider and not model.remote.model:
            raise ModelLoadError(name, "providers have many models: name one with remote.model")
        router = constants.INFERENCE_PROXY_TEMPLATE.format(provider="v1")
        url = router if provider else model.source.rstrip("/")
        if urlsplit(url).path in ("", "/"):
            url = f"{url}/v1"
        return cls(url=url, provider=provider, token=token.get_secret_value() if token else None)

    @property
    def root(self) -> str:
        """The URL without `/v1`."""
        return self.url.removesuffix("/v1")

    @property
    def host(self) -> str:
        """Host and port, for errors."""
        return urlsplit(self.url).netloc


def read_token(remote: RemoteSettings, environ: Mapping[str, str] = os.environ) -> SecretStr | None:
    """Read the token that the settings name; None where they name none.

    Raises:
        ValueError: The variable or the file is not there, or holds nothing; says which.
    """
    if remote.token_env is not None:
        where, text = f"token_env: {remote.token_env}", environ.get(remote.token_env, "")
    elif remote.token_file is not None:
        where = f"token_file: {remote.token_file}"
        try:
            text = remote.token_file.read_text()
        except (OSError, UnicodeError) as error:
            raise ValueError(f"{where}: {type(error).__name__}") from None
    else:
        return None
    token = text.strip()
    if not (token and token.isascii() and token.isprintable()):
        raise ValueError(f"{where} is not set, or holds no token")
    return SecretStr(token)
