"""`penstock up`: a whole stack until Ctrl-C, and the file that tells this user's other programs of it."""

import asyncio
import shlex
import shutil
import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import click

from penstock.errors import ConfigError
from penstock.stacks import announced, find_stacks, without_login
from penstock.urls import mask_url
from penstock_workers.command.deployment import Deployment, deployment_options
from penstock_workers.command.stack import WORKERS_STAGE, Stack, plan_stack
from penstock_workers.command.status import wait_for_workers
from penstock_workers.command.supervisor import Supervisor, write_line
from penstock_workers.preflight import check_servers
from penstock_workers.settings import Settings

DATA_FOLDER: Final = Path(".penstock")


@click.command()
@deployment_options
def up(config: Path | None, assignments: tuple[str, ...]) -> None:
    """Start Redis (if no broker is configured), the workers and Flower, until Ctrl-C."""
    deployment = Deployment(config, assignments)
    _refuse_second(deployment)
    if "redis.broker_url" in deployment.loaded.origins:
        check_servers(deployment.loaded.settings)  # what is to be warned of, the workers tell
    stack = plan_stack(
        deployment.loaded,
        config=config,
        environment=deployment.environment,
        redis_folder=DATA_FOLDER / "redis",
    )
    for pool, layout in stack.layouts.items():
        click.echo(f"penstock | {pool + ':':8} {layout}")
    settings = deployment.loaded.settings
    shown = stack.broker_url if stack.password else mask_url(settings.redis.broker_url)
    click.echo(f'penstock | clients: Client("{shown}"){_login(stack, settings)}')
    click.echo(f"penstock | status:  {own_command()} status{f' --config {config}' if config else ''}")
    if stack.flower_url:
        click.echo(f"penstock | Flower:  {stack.flower_url}")
    for note in stack.notes:
        click.echo(f"penstock | {note}")
    supervisor = _supervisor(stack.children, deployment)
    with ExitStack() as file:
        file.enter_context(_exit_on_signals())
        try:
            file.enter_context(announced(stack.told(tuple(settings.models))))
        except ConfigError as error:
            if stack.password is not None:  # which nobody could find
                raise
            click.echo(f"penstock | status:  has to be told the broker: {error}")
        code = asyncio.run(_run(supervisor, stack, ", ".join(settings.models)))
    sys.exit(code)


@contextmanager
def _exit_on_signals() -> Iterator[None]:
    """Let SIGTERM and SIGHUP raise SystemExit while no supervisor listens, so that the stack's file goes too.

    The supervisor listens in its loop alone, and gives these handlers back when it ends.
    """

    def leave(number: int, frame: object) -> None:
        del frame
        sys.exit(128 + number)  # what a shell says of a process that the signal ended

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def own_command() -> str:
    """Return what calls this program in a shell here: its name if that is found, else the path as typed."""
    typed = Path(sys.argv[0])
    found = shutil.which(typed.name)
    return typed.name if found and typed.exists() and typed.samefile(found) else shlex.quote(str(typed))


async def _run(supervisor: Supervisor, stack: Stack, models: str) -> int:
    async def tell() -> None:
        await wait_for_workers(stack.login_url, lambda: supervisor.pids(WORKERS_STAGE))
        write_line(f"penstock | ready: {models}; Ctrl-C stops")

    telling = asyncio.create_task(tell())
    try:
        return await supervisor.run()
    finally:
        telling.cancel()


def _refuse_second(deployment: Deployment) -> None:
    """Refuse a second Redis of our own in one folder: both would write the same files."""
    if "redis.broker_url" in deployment.loaded.origins:
        return
    for stack in find_stacks():
        if stack.is_alive and stack.password is not None and Path(stack.folder) == Path.cwd():
            raise ConfigError([f"a stack runs in this folder: {stack}"])


def _login(stack: Stack, settings: Settings) -> str:
    """Say what a client needs besides the URL; never the password itself."""
    if stack.password is not None:
        return ", on this machine and for this user alone"
    has_one = settings.broker_url != without_login(settings.broker_url)
    return ", with its password" if has_one else ""


def _supervisor(children: Any, deployment: Deployment) -> Supervisor:
    from penstock_workers.delivery.pool import GRACE_S

    # A worker that hangs ends by itself after that, and says so.
    return Supervisor(children, drain_s=deployment.loaded.settings.worker.drain_s + GRACE_S)
