"""Settings beside a running stack, with its Redis: for our commands, and for the app that Celery looks up."""

from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from penstock.stacks import RunningStack, choose_stack, find_stacks, stack_of
from penstock_workers.configuration import Loaded, load_settings


class WithStack(NamedTuple):
    """Settings, and the stack that they were completed with.

    Attributes:
        loaded: The settings.
        stack: The running stack; None where the configuration names a broker, or no stack runs.
        values: Values taken from the stack, by dotted key.
    """

    loaded: Loaded
    stack: RunningStack | None
    values: Mapping[str, str]


def load_with_stack(
    config: Path | None, arguments: Mapping[str, str], *, only_here: bool = False
) -> WithStack:
    """Read settings, and complete them with the Redis of a running stack where they name none.

    Where they name the broker of a running stack and no result store, they get the stack's result store.

    Args:
        config: See `load_settings`.
        arguments: See `load_settings`.
        only_here: True to ignore a stack that was started in another folder.

    Raises:
        ConfigError: See `load_settings`; or several stacks run, and none was started here.
        BrokerUnavailableError: The stack that was started here was killed.
    """
    loaded = load_settings(config, arguments=arguments)
    if "redis.broker_url" not in loaded.origins:
        stacks = [one for one in find_stacks() if not only_here or Path(one.folder) == Path.cwd()]
        if (stack := choose_stack(stacks, Path.cwd())) is None:
            return WithStack(loaded, None, {})
        values = {"redis.broker_url": stack.broker_url, "redis.results_url": stack.results_url}
        if stack.password is not None:
            values["redis.password"] = stack.password
    else:
        stack = stack_of(loaded.settings.redis.broker_url)
        if stack is None or "redis.results_url" in loaded.origins:
            return WithStack(loaded, None, {})
        values = {"redis.results_url": stack.results_url}
    return WithStack(load_settings(config, arguments={**arguments, **values}), stack, values)
