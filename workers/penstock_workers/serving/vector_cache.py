"""Vectors that were computed before, and texts that are being computed: each once, on all workers.

| key (result store) | type | holds |
| --- | --- | --- |
| `penstock:vec:<model>:<text>` | string | `vec1`, number of tokens, vector; or `c`, a claim and its weight |
| `penstock:vec:<model>` | sorted set | keys of vectors, by when they were last asked for |
| `penstock:vec:claim:<id>` | string | lives as long as a job computes what it claimed |

Both names are hashes, of everything that decides the numbers: the model's weights, modules and tokenizer;
prompt and text. Vectors are whole and as the model gives them, so that every form is made from one entry.

A job claims what it does not find, computes and stores it, and only then waits for what others claimed:
nobody waits with a claim, so no two wait for each other. A claim that is not renewed is void.
"""

import hashlib
import logging
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from struct import Struct
from typing import Any, Final

import numpy as np
import redis
from numpy.typing import NDArray

from penstock.connections import connect_sync
from penstock.keys import VECTORS_KEY
from penstock.scripts import script
from penstock_workers.settings import CacheSettings

logger = logging.getLogger(__name__)

AT_ONCE: Final = 256
"""Texts of one round trip, during which Redis serves nobody else."""
OVERHEAD_BYTES: Final = 400
"""Memory of an entry besides its vector, its name twice; 270 to 310 were measured, Valkey 9."""
CLAIM_S: Final = 600
"""Longest claim on a text, seconds, whatever its holder does."""
AWAY_S: Final = 5.0
"""Seconds that a cache which is out of reach is not asked again."""
MAX_WAIT_S: Final = 0.05
STRETCH: Final = 10
"""A job waits for claims of jobs up to this many times its weight, and computes what heavier ones claimed:
one text does not wait for a bulk load."""

_HEAD: Final = Struct("<4sI")
_MARK: Final = b"vec1"

CLAIM: Final = script("claim_vectors")
STORE: Final = script("store_vectors")


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedded:
    """One text's answer.

    Attributes:
        vector: Vector as the model gives it, float32, shape (dim,).
        n_tokens: Number of real tokens, prompt and special ones included.
    """

    vector: NDArray[np.float32]
    n_tokens: int


class StoredForm:
    """Answers as Redis holds them.

    Args:
        dim: Width of a vector.
        dtype: `float32` or `float16`.
    """

    def __init__(self, dim: int, dtype: str) -> None:
        self._dim, self._dtype = dim, np.dtype(dtype).newbyteorder("<")

    @property
    def n_bytes(self) -> int:
        """Size of an answer."""
        return _HEAD.size + self._dim * self._dtype.itemsize

    def write(self, answer: Embedded) -> bytes | None:
        """Return an answer's bytes; None if the format cannot hold its numbers."""
        if self._dtype.itemsize < 4 and not _fits_float16(answer.vector):
            return None
        return _HEAD.pack(_MARK, answer.n_tokens) + answer.vector.astype(self._dtype).tobytes()

    def read(self, value: bytes) -> Embedded | None:
        """Return an answer; None if the bytes are not ours, or of another version."""
        if len(value) != self.n_bytes or not value.startswith(_MARK):
            return None
        vector = np.frombuffer(value, self._dtype, offset=_HEAD.size).astype(np.float32, copy=False)
        return Embedded(vector=vector, n_tokens=_HEAD.unpack_from(value)[1])


def _fits_float16(vector: NDArray[np.float32]) -> bool:
    return bool(np.abs(vector).max() <= np.finfo(np.float16).max)  # NaN does not


class CacheStore:
    """Redis, which may be out of reach: that costs a line in the log, and for a while nothing is asked.

    Args:
        name: Name of the model, for the log.
        url: URL of the result store.
    """

    def __init__(self, name: str, url: str) -> None:
        self._name = name
        self.client = connect_sync(url, answer_timeout_s=5)
        self.claim_script, self.store_script = map(self.client.register_script, (CLAIM, STORE))
        self._away_until = 0.0

    def ask(self, command: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Return what a command or a script answers; None if Redis gives no answer."""
        if time.monotonic() < self._away_until:
            return None
        try:
            return command(*arguments, **options)
        except (redis.RedisError, OSError) as error:
            if not isinstance(error, redis.ResponseError):
                self._away_until = time.monotonic() + AWAY_S
            logger.warning(
                "vectors of %s are not cached: %s: %s", self._name, type(error).__name__, str(error)[:200]
            )
            return None


class VectorCache:
    """One model's cache, for all threads of a process.

    Args:
        name: Name of the model, for the log.
        fingerprint: Hash of all that decides its numbers besides prompt and text.
        dim: Width of a vector.
        settings: How long, how many and how exactly vectors are kept.
        url: URL of the result store.
        lease_s: Seconds after which a silent process has lost its claims.

    Attributes:
        n_hits: Texts that were answered without computing, since the process started.
        n_misses: Texts that were computed.
    """

    def __init__(
        self, name: str, fingerprint: str, dim: int, settings: CacheSettings, *, url: str, lease_s: float
    ) -> None:
        self._form = StoredForm(dim, settings.dtype)
        self._store = CacheStore(name, url)
        self._model_key = (
            f"{VECTORS_KEY}:{hashlib.sha256(f'{fingerprint} {settings.dtype}'.encode()).hexdigest()[:16]}"
        )
        self._life_ms, self._lease_ms = settings.ttl_s * 1000, int(lease_s * 1000)
        self._max_entries = max(1, settings.max_bytes // (self._form.n_bytes + OVERHEAD_BYTES))
        self._claims: set[str] = set()
        self._counting = threading.Lock()
        self.n_hits = self.n_misses = 0
        threading.Thread(target=self._renew, name=f"cache-{name}", daemon=True).start()

    def embed(
        self,
        texts: Sequence[str],
        prompt: str | None,
        compute: Callable[[list[str]], Sequence[Embedded]],
        *,
        patience_s: float,
        check: Callable[[], None],
    ) -> list[Embedded]:
        """Return the answers of `texts` in their order, from here, from elsewhere, or computed.

        Args:
            texts: Texts of a job; equal ones are computed once.
            prompt: Prompt that is put before each.
            compute: Computes those that are nowhere.
            patience_s: Seconds after which such a job is due; times the number of texts, its weight.
            check: Raises if nobody waits for the job any more.
        """
        keys = [self._key(prompt, text) for text in texts]
        wanted = dict(zip(keys, texts, strict=True))
        missing, found = list(wanted), dict[str, Embedded]()
        weight, n_computed, wait_s = patience_s * len(wanted), 0, 0.002
        while missing:
            with self._claim(missing, weight) as (stored, mine):
                found |= stored
                if mine:
                    computed = compute([wanted[key] for key in mine])
                    found |= zip(mine, computed, strict=True)
                    n_computed += len(mine)
                    self._keep(mine, computed)
            if missing := [key for key in missing if key not in found]:
                check()
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, MAX_WAIT_S)
        with self._counting:
            self.n_misses += n_computed
            self.n_hits += len(texts) - n_computed
        return [found[key] for key in keys]

    @contextmanager
    def _claim(self, keys: Sequence[str], weight: float) -> Iterator[tuple[dict[str, Embedded], list[str]]]:
        """Yield what is stored, and what is to be computed here; the rest is being computed elsewhere."""
        claim = f"{VECTORS_KEY}:claim:{uuid.uuid4().hex}"
        arguments = (self._lease_ms, weight, STRETCH * weight, CLAIM_S * 1000)
        found: dict[str, Embedded] = {}
        mine: list[str] = []
        self._claims.add(claim)
        try:
            for start in range(0, len(keys), AT_ONCE):
                part = keys[start : start + AT_ONCE]
                names = [self._model_key, claim, *part]
                values = self._store.ask(self._store.claim_script, keys=names, args=arguments)
                for key, value in zip(part, values or [1] * len(part), strict=True):
                    if isinstance(value, bytes) and (answer := self._form.read(value)) is not None:
                        found[key] = answer
                    elif value != 0:
                        mine.append(key)
            yield found, mine
        finally:
            self._claims.discard(claim)
            if mine:
                self._store.ask(self._store.client.delete, claim)

    def _keep(self, keys: Sequence[str], answers: Sequence[Embedded]) -> None:
        written = ((key, self._form.write(answer)) for key, answer in zip(keys, answers, strict=True))
        kept = [(key, value) for key, value in written if value is not None]
        at_once = min(AT_ONCE, self._max_entries)
        for start in range(0, len(kept), at_once):
            part = kept[start : start + at_once]
            names = [self._model_key, *(key for key, _ in part)]
            arguments = [self._life_ms, self._max_entries, *(value for _, value in part)]
            if not self._store.ask(self._store.store_script, keys=names, args=arguments):
                return  # each part would cost a line

    def _renew(self) -> None:
        """Keep the claims of running jobs, until the process dies."""
        while True:
            time.sleep(self._lease_ms / 3000)
            for claim in tuple(self._claims):
                self._store.ask(self._store.client.pexpire, claim, self._lease_ms)

    def _key(self, prompt: str | None, text: str) -> str:
        words = hashlib.sha256(b"" if prompt is None else b"%d " % len(prompt) + prompt.encode())
        words.update(b"\0" + text.encode())
        return f"{self._model_key}:{words.hexdigest()}"
