"""The stacks that `penstock up` runs on this machine for this user: one file each, for this user's eyes only.

By it `penstock status` finds a stack's Redis, whatever its port, and clients find its password. Whoever runs
a stack holds a lock on its file: a file without a lock is left over from a stack that was killed.
"""

import errno
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from secrets import token_hex
from typing import Any, Final, Self

from penstock.errors import BrokerUnavailableError, ConfigError
from penstock.urls import ServerUrl, read_url

try:
    import fcntl
except ImportError:  # Windows, where no stack runs
    fcntl = None  # type: ignore[assignment]  # says so

_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")
_MOST_BYTES: Final = 1 << 16


@dataclass(frozen=True, slots=True, kw_only=True)
class RunningStack:
    """A stack, as its file describes it.

    Attributes:
        pid: process id of `penstock up`.
        folder: working folder of that process.
        broker_url: Redis that holds the queues, without a password.
        results_url: Redis that holds the results, without a password.
        password: password of the Redis that the stack started itself; None where it did not.
        models: names of the models that are served.
        is_alive: True while it runs.
    """

    pid: int
    folder: str
    broker_url: str
    results_url: str
    password: str | None = field(default=None, repr=False)
    models: tuple[str, ...] = ()
    is_alive: bool = True

    @classmethod
    def parse(cls, text: str, *, is_alive: bool) -> Self:
        """Read a file's content.

        Raises:
            ValueError: the file is another program's.
        """
        told: dict[str, Any] = json.loads(text)
        known = {one.name: told.get(one.name, one.default) for one in fields(cls)}
        found = cls(**known | {"models": tuple(told["models"]), "is_alive": is_alive})
        words = (found.folder, found.broker_url, found.results_url, *found.models)
        if not isinstance(found.pid, int) or not all(isinstance(word, str) for word in words):
            raise ValueError("not a stack's file")
        return found

    def __str__(self) -> str:
        return f"process {self.pid} in {self.folder}, Redis at {self.broker_url}"


def cache_folder() -> Path:
    """Return this user's folder for data that can be made again; it may not exist.

    Raises:
        FileNotFoundError: the environment names none, as in a container for a user without a home.
    """
    # Source: XDG Base Directory Specification 0.8, user-specific non-essential data.
    if cache := os.environ.get("XDG_CACHE_HOME"):
        return Path(cache) / "penstock"
    try:
        return Path.home() / ".cache" / "penstock"
    except RuntimeError:
        told = "this user has no home folder, and XDG_CACHE_HOME is not set"
        raise FileNotFoundError(errno.ENOENT, told) from None


def stacks_folder() -> Path:
    """Return the folder of the files.

    Raises:
        FileNotFoundError: see `cache_folder`.
    """
    return cache_folder() / "stacks"


@contextmanager
def announced(stack: RunningStack) -> Iterator[None]:
    """Let others find a stack while the block runs; removes the files that killed stacks left.

    Raises:
        ConfigError: the folder is not ours alone, or cannot be written.
    """
    folder = Path("stacks")
    try:
        folder = stacks_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        check_private(folder)
        for file in folder.glob("*.json"):
            if (left := _read(file)) is None or not left.is_alive:
                file.unlink(missing_ok=True)
        file = folder / f"{stack.pid}-{token_hex(4)}.json"  # containers may share the folder, not their pids
        # Under another name until it is locked: another start would take it for a killed one's.
        unseen = file.with_suffix(".new")
        number = os.open(unseen, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
    except OSError as error:
        problem = f"{error.strerror}: a stack needs a file there that is its user's alone"
        raise ConfigError([f"{folder}: {problem}"]) from None
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        told = {name: value for name, value in asdict(stack).items() if name != "is_alive"}
        os.write(number, json.dumps(told).encode())
        unseen.rename(file)
        yield
    finally:
        with suppress(OSError):
            file.unlink(missing_ok=True)
        os.close(number)


def find_stacks() -> Sequence[RunningStack]:
    """Return the stacks of this user; also those that ended without a word, until the next one starts."""
    if fcntl is None:
        return ()
    try:
        folder = stacks_folder()
        check_private(folder)
        found = [_read(file) for file in sorted(folder.glob("*.json"))]
    except OSError:  # there is none, or it is not ours
        return ()
    return [stack for stack in found if stack is not None]


def choose_stack(stacks: Sequence[RunningStack], folder: Path) -> RunningStack | None:
    """Return the stack to use in a folder: the one started there, else the only one; None if none runs.

    Raises:
        ConfigError: there are several.
        BrokerUnavailableError: the one that was started there was killed.
    """
    here = [stack for stack in stacks if Path(stack.folder) == folder]
    alive = [stack for stack in here or stacks if stack.is_alive]
    if len(alive) > 1:
        told = "; ".join(map(str, alive))
        how = "go to the folder of one, or name its Redis: --set redis.broker_url=redis://127.0.0.1:PORT/0"
        raise ConfigError([f"several stacks run, {how}: {told}"])
    if not alive and here:
        reason = f"the stack of process {here[0].pid}, started in this folder, has ended without stopping"
        raise BrokerUnavailableError(here[0].broker_url, reason)
    return alive[0] if alive else None


def with_password(url: str) -> str:
    """Return `url` with the password of the running stack whose Redis it is, unless it has a login."""
    found = read_url(url)
    if found.username or found.password:
        return url
    stack = stack_of(url)
    return with_login(url, stack.password) if stack and stack.password else url


def stack_of(url: str) -> RunningStack | None:
    """Return the running stack whose own Redis a URL leads to."""
    found = read_url(url)
    if not isinstance(found, ServerUrl) or found.scheme != "redis" or found.host.lower() not in _LOOPBACK:
        return None
    return stack_at(found.server[-1])


def tell_elsewhere(url: str) -> str:
    """Name the stacks of this user that run with another Redis than that at `url`; "" if none does."""
    here = stack_of(url)
    alive = [stack for stack in find_stacks() if stack.is_alive and stack != here]
    server = read_url(url).server
    return "; ".join(str(stack) for stack in alive if read_url(stack.broker_url).server != server)


def stack_at(port: object) -> RunningStack | None:
    """Return the stack whose own Redis has this port of the machine, or is about to have it."""
    for stack in find_stacks():
        if stack.is_alive and stack.password and _port(stack.broker_url) == port:
            return stack
    return None


def with_login(url: str, password: str) -> str:
    """Return `url` with a password."""
    found = read_url(url)
    return replace(found, password=password).url if isinstance(found, ServerUrl) else url


def without_login(url: str) -> str:
    """Return `url` without passwords."""
    found = read_url(url)
    if isinstance(found, ServerUrl):
        return replace(found, password=None).url
    return replace(found, password=None, sentinel_password=None).url


def _port(url: str) -> object:
    found = read_url(url)
    return found.server[-1] if isinstance(found, ServerUrl) else None


def check_private(path: Path) -> None:
    """Refuse a file or folder that others can read or write.

    Raises:
        OSError: it is not ours alone.
    """
    status = path.lstat()
    if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077 or stat.S_ISLNK(status.st_mode):
        raise PermissionError(1, "not this user's alone")


def _read(file: Path) -> RunningStack | None:
    """Read the file of a stack; None if it is not one of ours."""
    try:
        check_private(file)
        with file.open(encoding="utf-8") as opened:
            text, is_alive = opened.read(_MOST_BYTES), False
            try:
                fcntl.flock(opened, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                is_alive = True
        return RunningStack.parse(text, is_alive=is_alive)
    except (OSError, ValueError, KeyError, TypeError):
        return None
