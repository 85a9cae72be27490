"""Where a remote model is: its server's URL, and the token that it is asked with."""

from dataclasses import dataclass, field
from typing import Self
from urllib.parse import urlsplit

from huggingface_hub import constants

from penstock.errors import ModelLoadError
from penstock_workers.settings import PROVIDER, ModelSettings


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
            token = model.remote.token()
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
