"""The settings of what is started beside a running stack: commands, further workers, and Celery's own."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from penstock.settings import Loaded, load_settings
from penstock.stacks import RunningStack, choose_stack, find_stacks, stack_of


class Beside(NamedTuple):
    """Settings, and the stack that they were completed with.

    Attributes:
        loaded: the settings.
        stack: the one that is meant; None where the configuration names a broker, or none runs.
        values: what was taken from it, by dotted key.
    """

    loaded: Loaded
    stack: RunningStack | None
    values: Mapping[str, str]


def load_beside(config: Path | None, arguments: Mapping[str, str], *, only_here: bool = False) -> Beside:
    """Read settings, with the Redis of the stack that is meant where they name none.

    Where they name that of a running stack and no result store, results are where the stack has them.

    Args:
        config: see `load_settings`.
        arguments: likewise.
        only_here: not with that of the only stack, if that was started in another folder.

    Raises:
        ConfigError: see `load_settings`; or several stacks run.
        BrokerUnavailableError: the stack that was started here was killed.
    """
    loaded = load_settings(config, arguments=arguments)
    if "redis.broker_url" not in loaded.origins:
        stacks = [one for one in find_stacks() if not only_here or Path(one.folder) == Path.cwd()]
        if (stack := choose_stack(stacks, Path.cwd())) is None:
            return Beside(loaded, None, {})
        values = {"redis.broker_url": stack.broker_url, "redis.results_url": stack.results_url}
        if stack.password is not None:
            values["redis.password"] = stack.password
    else:
        stack = stack_of(loaded.settings.redis.broker_url)
        if stack is None or "redis.results_url" in loaded.origins:
            return Beside(loaded, None, {})
        values = {"redis.results_url": stack.results_url}
    return Beside(load_settings(config, arguments={**arguments, **values}), stack, values)
