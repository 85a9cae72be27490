"""What can be set of a deployment: each value with its range, its default and what it means."""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Final, Literal
from urllib.parse import quote, urlsplit, urlunsplit

from pydantic import BaseModel, ConfigDict, Field, PlainValidator, SecretStr, ValidationInfo, field_validator

from penstock.request import TENANT, GenerationOptions, PoolName, Task
from penstock.stacks import with_password
from penstock.urls import plain_url

PROVIDER: Final = "provider:"
"""What a remote source begins with that is one of Hugging Face's Inference Providers."""
MODEL_NAME = re.compile(r"[a-z0-9]([a-z0-9-]|_(?!_)){0,63}")
_QUEUE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")

AUTO: Final = "auto"
Count = int | Literal["auto"]
Dtype = Literal["auto", "float32", "bfloat16", "float16"]
Cpu = Literal["avx2", "avx512", "avx512_bf16", "amx"]


def _count_from(low: int) -> PlainValidator:
    """Check a count of 256 at most. Not a union: pydantic names a union's branches in the error's key."""

    def check(value: object) -> Count:
        if value == AUTO:
            return AUTO
        text = str(value)  # variables are texts
        if not (re.fullmatch(r"\d{1,3}", text, re.ASCII) and low <= int(text) <= 256):
            raise ValueError(f"auto, or a number from {low} to 256")
        return int(text)

    return PlainValidator(check)


Processes = Annotated[Count, _count_from(0)]
Threads = Annotated[Count, _count_from(1)]


class Section(BaseModel):
    """A table of the deployment's file; an unknown key is an error."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class RedisSettings(Section):
    """Where jobs wait and where results are kept."""

    broker_url: str = "redis://127.0.0.1:6379/0"
    """Redis that holds the queues and the registry."""
    results_url: str = "redis://127.0.0.1:6379/1"
    """Redis that holds the results; better another server, so that results cannot starve the queue."""
    password: SecretStr | None = None
    """Password of both, where their URLs hold none."""
    password_file: Path | None = None
    """File that holds the password, for secrets that are mounted."""
    result_ttl_s: int = Field(default=3600, ge=1, le=30 * 86400)
    """How long a result can be fetched, seconds."""

    @field_validator("broker_url", "results_url")
    @classmethod
    def _is_redis(cls, url: str) -> str:
        return plain_url(url)

    def with_password(self, url: str) -> str:
        """Return `url` with the configured password, if it has none of its own."""
        secret = self.password.get_secret_value() if self.password else None
        if secret is None and self.password_file is not None:
            secret = self.password_file.read_text().strip()
        parts = urlsplit(url)
        if not secret or parts.password:
            return url
        host = parts.netloc.rpartition("@")[2]
        return urlunsplit(parts._replace(netloc=f"{parts.username or ''}:{quote(secret, safe='')}@{host}"))


class CpuPool(Section):
    """Worker processes on CPUs."""

    device: Literal["cpu"] = "cpu"
    """CPUs only; CUDA is never touched."""
    processes: Processes = AUTO
    """Worker processes that `penstock up` starts; auto: what cores and memory allow."""
    threads: Threads = AUTO
    """Torch threads in each process; auto: one for embedding alone, up to four for generation."""


class GpuPool(CpuPool):
    """Worker processes on GPUs."""

    device: Literal["auto", "cuda", "mps", "cpu"] = "auto"  # type: ignore[assignment]  # wider than a CPU pool's
    """auto: CUDA, else MPS, else no start; cpu is allowed, to try the routing without a GPU."""
    processes: Processes = AUTO
    """Processes that `penstock up` starts, on GPUs in turn; auto: one a GPU, four if all models are small."""
    threads: Threads = AUTO
    """Threads in each process, which tokenize; auto: the cores over the processes, four at most."""


class Pools(Section):
    """Workers on one kind of hardware each."""

    cpu: CpuPool = CpuPool()
    gpu: GpuPool = GpuPool()


class CacheSettings(Section):
    """Vectors of one model that are kept in the result store."""

    ttl_s: int = Field(default=7 * 86400, ge=1, le=365 * 86400)
    """How long a vector is kept after it was computed, seconds."""
    max_bytes: int = Field(default=256 << 20, ge=1 << 16)
    """What its vectors may take of the result store; those that nobody has asked for longest go first."""
    dtype: Literal["float32", "float16"] = "float32"
    """Format they are kept in; float16 halves them, at about three decimal digits."""


class RateLimit(Section):
    """What all workers together may ask of a remote model; they pace themselves to 97 % of it."""

    requests_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Requests; none: no limit is known."""
    tokens_per_minute: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Tokens of texts, prompts and answers; none: no limit is known."""


class RemoteSettings(Section):
    """How a remote model is asked."""

    model: str | None = Field(default=None, min_length=1)
    """Its id there; none: the server has one model only."""
    protocol: Literal["auto", "openai", "tei", "hf"] = "auto"
    """What it speaks; auto: TEI's own if it says so, else OpenAI's; hf: `inputs` at the URL as given."""
    token_env: str | None = None
    """Environment variable of the workers that holds the token."""
    token_file: Path | None = None
    """File that holds the token, for secrets that are mounted."""
    timeout_s: float = Field(default=120.0, gt=0)
    """How long a request may take from its first byte to its answer's last, seconds."""
    patience_s: float = Field(default=600.0, gt=0)
    """How long a job without a deadline waits for a server that is away or overloaded, seconds."""
    max_concurrency: int = Field(default=16, ge=1, le=1024)
    """Requests that one worker process has under way; how many of them is found out."""
    max_request_texts: int = Field(default=64, ge=1, le=4096)
    """Texts in one request, unless the server tells that it takes fewer."""
    dim: int | None = Field(default=None, ge=1)
    """Width of its vectors; none: one text is embedded at the start, which then needs the server."""

    @field_validator("token_env")
    @classmethod
    def _is_variable(cls, name: str | None) -> str | None:
        # Lower case is refused for the sake of those who put the token itself here.
        if name is not None and not re.fullmatch(r"[A-Z][A-Z0-9_]*", name):
            raise ValueError("the name of a variable, in upper case")
        return name


def is_loopback(host: str) -> bool:
    """Say whether a host is this machine for sure, by its name or address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class ModelSettings(Section):
    """One model that the workers serve."""

    task: Task
    """embed, generate or rerank."""
    engine: Literal["auto", "torch", "openvino", "remote"] = "auto"
    """What computes it; auto: torch, or OpenVINO where that embeds faster; remote: another server."""
    source: str = Field(min_length=1)
    """Hub id, folder, or bundled:NAME; of a remote model a URL, or provider:NAME for Inference Providers."""
    pools: tuple[PoolName, ...] = Field(default=("cpu",), min_length=1, max_length=2)
    """Pools that serve it, the preferred one first."""
    dtype: Dtype = "auto"
    """auto takes bfloat16 where it is fast and vectors keep their direction, else float32."""
    device_map: Literal["auto"] | None = None
    """auto spreads a generation model over all GPUs that a process sees, by accelerate; none: one GPU."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run Python that comes with the model; a hub model then needs a full commit as its revision."""
    chat_template: str | None = Field(default=None, min_length=1)
    """Name of one of a generation model's chat templates, or a file that holds one; none: its default."""
    int8_ranges: Path | None = None
    """File of numpy, float, shape (2, dim): lowest and highest value of each dimension, for int8 vectors."""
    cache: CacheSettings | None = None
    """Keep an embedding model's vectors, and compute equal texts once; none: no."""
    max_texts: int = Field(default=4096, ge=1, le=100_000)
    """Texts in one embedding job."""
    max_batch_tokens: int | None = Field(default=None, ge=16)
    """Tokens in one forward pass of an embedding model, padding counted; none: by device."""
    max_batch_size: int = Field(default=16, ge=1, le=1024)
    """Requests that a generation model answers at a time."""
    share: float | None = Field(default=None, gt=0, le=1000)
    """Weight among the models of a process that want its device at once; none: 2 to embed, 1 to generate."""
    deadline_s: float | None = Field(default=None, gt=0)
    """Deadline of jobs that name none, seconds after they were sent."""
    max_waiting_jobs: int | None = Field(default=None, ge=1)
    """Jobs that one of its queues takes; more are refused with QueueDelayError. None: no limit."""
    max_waiting_tokens: int | None = Field(default=None, ge=1)
    """Tokens of these jobs, as their senders estimate them."""
    max_waiting_bytes: int | None = Field(default=None, ge=1)
    """Bytes of their messages."""
    generation: GenerationOptions = GenerationOptions()
    """Options of calls that do not set their own."""
    remote: RemoteSettings = RemoteSettings()
    """How a remote model is asked."""
    rate_limit: RateLimit = RateLimit()
    """What all workers together may ask of a remote model."""

    @field_validator("engine")
    @classmethod
    def _computes_the_task(cls, engine: str, info: ValidationInfo) -> str:
        task = info.data.get("task")
        if (engine == "openvino" and task != "embed") or (engine == "remote" and task == "rerank"):
            raise ValueError("openvino is for embedding, remote for embedding and generation")
        return engine

    @field_validator("source")
    @classmethod
    def _is_reachable(cls, source: str, info: ValidationInfo) -> str:
        if info.data.get("engine") != "remote" or re.fullmatch(rf"{PROVIDER}[a-z0-9-]+", source):
            return source
        wanted = ValueError("a URL like https://HOST/v1, without user and query, or provider:NAME")
        try:
            parts = urlsplit(source)
            is_whole = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            raise wanted from None
        if not is_whole or "@" in parts.netloc or parts.query or parts.fragment:
            raise wanted
        return source

    @field_validator("remote", "rate_limit")
    @classmethod
    def _belongs_to_remote(cls, section: Section, info: ValidationInfo) -> Section:
        if info.data.get("engine") != "remote":
            raise ValueError('of models with engine = "remote" only')
        has_many = str(info.data.get("source")).startswith(PROVIDER)
        if has_many and isinstance(section, RemoteSettings) and not section.model:
            raise ValueError("providers have many models: name one with remote.model")
        if isinstance(section, RemoteSettings) and (section.token_env or section.token_file):
            parts = urlsplit(str(info.data.get("source")))
            if parts.scheme == "http" and not is_loopback(parts.hostname or ""):
                raise ValueError("a token is not sent over http, where others could read it: use https")
        return section

    @field_validator("pools")
    @classmethod
    def _name_each_once(cls, pools: tuple[PoolName, ...]) -> tuple[PoolName, ...]:
        if len(set(pools)) < len(pools):
            raise ValueError("each pool once")
        return pools

    @field_validator("device_map")
    @classmethod
    def _is_for_generation(cls, device_map: str | None, info: ValidationInfo) -> str | None:
        if device_map is not None and info.data.get("task") in ("embed", "rerank"):
            raise ValueError("for generation models")
        return device_map

    @field_validator("chat_template")
    @classmethod
    def _is_of_chats(cls, chat_template: str | None, info: ValidationInfo) -> str | None:
        if chat_template is not None and (
            info.data.get("task") != "generate" or info.data.get("engine") == "remote"
        ):
            raise ValueError("for generation models that workers compute")
        return chat_template

    @field_validator("generation", mode="before")
    @classmethod
    def _numbers_from_variables(cls, value: object) -> object:
        # A variable's value is a string; the options themselves are strict for messages' sake.
        if not isinstance(value, dict):
            return value
        return GenerationOptions.model_validate(value, strict=False)


class TenantSettings(Section):
    """What one tenant may have of every queue."""

    share: float = Field(default=1.0, gt=0, le=1000)
    """Tokens it gets for each token of a tenant of share 1, while both have jobs waiting."""
    tokens_per_minute: float | None = Field(default=None, gt=0)
    """Tokens it may send; more are refused with RateLimitError. None: no limit."""

    def terms(self) -> str:
        """Return what the scripts read: the share, and tokens per second or 0."""
        return f"{self.share:g} {(self.tokens_per_minute or 0) / 60:g}"


class WorkerSettings(Section):
    """What all worker processes share."""

    jobs_in_flight: int = Field(default=32, ge=1, le=1024)
    """Jobs that one process takes at a time; they fill its batches."""
    heartbeat_file: Path | None = None
    """Touched while every stage makes progress: the readiness file of health checks."""
    stall_s: float = Field(default=120.0, gt=0)
    """A forward pass longer than this, in seconds, counts as hung."""
    lease_s: float = Field(default=20.0, ge=1, le=300)
    """A process that is silent for longer than this, in seconds, loses its jobs to others."""
    max_deliveries: int = Field(default=4, ge=1, le=100)
    """How often a job is given to a worker before it is dead-lettered."""
    drain_s: float = Field(default=30.0, ge=0)
    """How long running jobs may take to end after SIGTERM, seconds."""
    reader_timeout_s: float = Field(default=30.0, gt=0)
    """A streamed answer that nobody has listened to for so long, in seconds, is not generated to its end."""
    callback_queues: tuple[str, ...] = Field(default=(), max_length=64)
    """Queues of other Celery apps that callbacks of jobs may go to, besides the models' own."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """Least severe log lines that are shown."""

    @field_validator("callback_queues")
    @classmethod
    def _are_queues(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [name for name in names if not _QUEUE.fullmatch(name) or name.startswith("unacked")]:
            raise ValueError(
                f"names {wrong}: up to 64 of a-z A-Z 0-9 - _ . and not of keys that the broker has"
            )
        return names


class FlowerSettings(Section):
    """The monitoring page that `penstock up` starts."""

    address: str = "127.0.0.1"
    """Interface it listens on."""
    port: int = Field(default=5555, ge=0, le=65535)
    """Port it listens on; 0 starts none."""


class Settings(Section):
    """A deployment; `configuration.load_settings` reads one."""

    redis: RedisSettings = RedisSettings()
    pools: Pools = Pools()
    models: dict[str, ModelSettings] = Field(default_factory=dict)
    tenants: dict[str, TenantSettings] = Field(default_factory=dict)
    worker: WorkerSettings = WorkerSettings()
    flower: FlowerSettings = FlowerSettings()

    @field_validator("models")
    @classmethod
    def _names_fit_queues(cls, models: dict[str, ModelSettings]) -> dict[str, ModelSettings]:
        if wrong := [name for name in models if not MODEL_NAME.fullmatch(name)]:
            raise ValueError(f"names {wrong}: up to 64 of a-z 0-9 - _, no __, a-z 0-9 first")
        return models

    @field_validator("tenants")
    @classmethod
    def _tenants_have_names(cls, tenants: dict[str, TenantSettings]) -> dict[str, TenantSettings]:
        if wrong := [name for name in tenants if not TENANT.fullmatch(name)]:
            raise ValueError(f"names {wrong}: up to 64 of a-z A-Z 0-9 . _ @ -")
        return tenants

    @property
    def broker_url(self) -> str:
        """The broker's URL with its password: for connections, never for a log.

        Where none is configured, that of the stack that this user runs at its port of this machine.
        """
        return with_password(self.redis.with_password(self.redis.broker_url))

    @property
    def results_url(self) -> str:
        """The result store's URL with its password, as the broker's: for connections, never for a log."""
        return with_password(self.redis.with_password(self.redis.results_url))
