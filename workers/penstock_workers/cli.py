"""The command line: `penstock up`, `worker`, `status`, `queues`, `dead`, `config`, `tune`, `demo`."""

import asyncio
import json
import os
import runpy
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final, cast

import click

from penstock.envelope import printable
from penstock.errors import BrokerUnavailableError, ConfigError, InvalidMessageError, PenstockError
from penstock.request import PoolName
from penstock.settings import (
    AUTO,
    CONFIG_VARIABLE,
    Loaded,
    RedisSettings,
    Settings,
    effective_values,
    load_settings,
    sample_environment,
    variable_name,
)
from penstock.stacks import RunningStack, announced, find_stacks, tell_elsewhere, without_login
from penstock.urls import mask_url
from penstock_workers.beside import load_beside
from penstock_workers.command.queues import DeadJob, Queues, table
from penstock_workers.command.stack import (
    WORKERS_STAGE,
    Stack,
    has_engines,
    plan_stack,
    require_engines,
    worker_command,
    worker_queues,
)
from penstock_workers.command.status import read_status, wait_for_workers
from penstock_workers.command.supervisor import Supervisor, write_line
from penstock_workers.layout import choose_layouts, read_machine
from penstock_workers.server import look_at_servers
from penstock_workers.variables import refuse_variables

DATA_FOLDER: Final = Path(".penstock")


class Deployment:
    """The configuration a command was started with."""

    def __init__(self, config: Path | None, assignments: tuple[str, ...]) -> None:
        arguments = self._arguments = dict(_split(assignment) for assignment in assignments)
        self.config = config
        self.loaded: Loaded = load_settings(config, arguments=arguments)
        self.environment = _as_variables(arguments)
        self.stack: RunningStack | None = None

    def joined(self, *, only_here: bool = False) -> "Deployment":
        """Return it with the Redis of the stack that is meant; see `load_beside`."""
        self.loaded, self.stack, values = load_beside(self.config, self._arguments, only_here=only_here)
        self.environment |= _as_variables(values)
        return self

    @property
    def redis(self) -> str:
        """Say which Redis is asked, and why; without its password."""
        if self.stack is not None:
            return f"stack   {self.stack}"
        url = mask_url(self.loaded.settings.redis.broker_url)
        if "redis.broker_url" in self.loaded.origins:
            return f"Redis   {url}"
        return f"Redis   {url}, the default: no stack of `penstock up` runs for this user"


def _as_variables(values: Mapping[str, str]) -> dict[str, str]:
    """Return values by dotted key as children read the same texts."""
    return {variable_name(key): text for key, text in values.items()}


def _split(assignment: str) -> tuple[str, str]:
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise ConfigError([f"--set {assignment!r}: KEY=VALUE, like --set pools.cpu.processes=4"])
    return key, text


def _deployment(command: Callable[..., Any]) -> Callable[..., Any]:
    command = click.option(
        "--set",
        "assignments",
        multiple=True,
        metavar="KEY=VALUE",
        help="Set a value as its variable would; repeatable.",
    )(command)
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        help=f"The deployment's TOML file; else the one that {CONFIG_VARIABLE} names.",
    )(command)


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="penstock")
def cli() -> None:
    """Run Hugging Face models behind a Redis-backed Celery queue."""


@cli.command()
@_deployment
def up(config: Path | None, assignments: tuple[str, ...]) -> None:
    """Start Redis (if no broker is configured), the workers and Flower, until Ctrl-C."""
    deployment = Deployment(config, assignments)
    _refuse_second(deployment)
    if "redis.broker_url" in deployment.loaded.origins:
        look_at_servers(deployment.loaded.settings)  # what is to be warned of, the workers tell
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
    click.echo(f"penstock | status:  penstock status{f' --config {config}' if config else ''}")
    if stack.flower_url:
        click.echo(f"penstock | Flower:  {stack.flower_url}")
    for note in stack.notes:
        click.echo(f"penstock | {note}")
    supervisor = _supervisor(stack.children, deployment)
    with ExitStack() as file:
        file.enter_context(_ending_in_order())
        try:
            file.enter_context(announced(stack.told(tuple(settings.models))))
        except ConfigError as error:
            if stack.password is not None:  # which nobody could find
                raise
            click.echo(f"penstock | status:  has to be told the broker: {error}")
        code = asyncio.run(_run(supervisor, stack, ", ".join(settings.models)))
    sys.exit(code)


@contextmanager
def _ending_in_order() -> Iterator[None]:
    """Leave blocks when a signal comes before the supervisor listens, or after: a stack's file goes too."""

    def leave(number: int, frame: object) -> None:
        del frame
        sys.exit(128 + number)  # what a shell says of a process that the signal ended

    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


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


@cli.command(context_settings={"ignore_unknown_options": True})
@_deployment
@click.option("--pool", type=click.Choice(["cpu", "gpu"]), required=True, help="Hardware to work on.")
@click.option("--model", "models", multiple=True, help="Serve only this model; repeatable.")
@click.argument("celery_options", nargs=-1, type=click.UNPROCESSED)
def worker(
    config: Path | None,
    assignments: tuple[str, ...],
    pool: str,
    models: tuple[str, ...],
    celery_options: tuple[str, ...],
) -> None:
    """Run one worker process: `celery -A penstock_workers worker` with a pool's queues.

    Further options are Celery's own.
    """
    require_engines()
    refuse_variables(os.environ)
    deployment = Deployment(config, assignments).joined(only_here=True)
    name = cast("PoolName", pool)
    queues = worker_queues(deployment.loaded.settings, name, models)
    command = worker_command(deployment.loaded.settings, queues, f"{pool}-{os.getpid()}")
    os.environ.update(deployment.environment)
    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config)
    # Not as another program, whose first seconds would hear no signal as process 1.
    _, _, module, *arguments = command
    sys.argv[:] = [module, *arguments, *celery_options]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


@cli.command()
@_deployment
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(config: Path | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Say what is ready, or why not, per worker and model; exit 1 if a model is not."""
    deployment = Deployment(config, assignments).joined()
    models = deployment.stack.models if deployment.stack else ()
    found = read_status(deployment.loaded.settings, models)
    warnings = look_at_servers(deployment.loaded.settings)
    told = {
        **found.to_dict(),
        "redis": mask_url(deployment.loaded.settings.redis.broker_url),
        "warnings": warnings,
    }
    lines = [deployment.redis, *(f"warning: {warning}" for warning in warnings), *found.lines()]
    click.echo(json.dumps(told, indent=2) if as_json else "\n".join(lines))
    sys.exit(0 if found.is_ready else 1)


@cli.command()
@_deployment
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def queues(config: Path | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Count what waits, runs, is delayed or was given up, per queue."""
    states = Queues(Deployment(config, assignments).joined().loaded.settings).states()
    if as_json:
        click.echo(json.dumps([asdict(state) for state in states], indent=2))
    else:
        click.echo("\n".join(table(states)))


@cli.command()
@_deployment
@click.argument("names", nargs=-1, metavar="[QUEUE]...")
@click.option("--all", "everything", is_flag=True, help="All queues of the configured models.")
def purge(
    config: Path | None, assignments: tuple[str, ...], names: tuple[str, ...], everything: bool
) -> None:
    """Drop the jobs of queues that wait; their callers get JobCancelledError."""
    found = Queues(Deployment(config, assignments).joined().loaded.settings)
    known = [state.queue for state in found.states()]
    if problems := [
        f"queue {name!r} is of no model; queues: {', '.join(known)}" for name in set(names) - set(known)
    ]:
        raise ConfigError(problems)
    if not everything and not names:
        raise ConfigError(["name the queues, or say --all"])
    click.echo(f"{sum(found.purge(name) for name in (known if everything else names))} dropped")


@cli.group()
def dead() -> None:
    """Look after jobs that were given up."""


@dead.command("list")
@_deployment
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def dead_list(config: Path | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """List them, oldest first, without what they hold."""
    queues = Queues(Deployment(config, assignments).joined().loaded.settings)
    jobs = queues.dead()
    if n_dropped := queues.n_dropped():
        click.echo(f"{n_dropped:,} older ones were dropped: there was no room for more", err=True)
    if as_json:
        click.echo(json.dumps([job.to_dict() for job in jobs], indent=2))
        return
    for job in jobs:
        when = datetime.fromtimestamp(job.at, tz=UTC).isoformat(timespec="seconds")
        job_id, queue, reason = printable(job.id or "-"), printable(job.queue), printable(job.reason)
        times = f"{job.n_deliveries} {'delivery' if job.n_deliveries == 1 else 'deliveries'}"
        click.echo(f"{when}  {job_id:36}  {queue}  {times}  {reason}")
    if not jobs:
        click.echo("no dead letters")


@dead.command("show")
@_deployment
@click.argument("job_id")
@click.option("--with-text", is_flag=True, help="Print the message too: it holds what its caller wrote.")
def dead_show(config: Path | None, assignments: tuple[str, ...], job_id: str, with_text: bool) -> None:
    """Show one of them as JSON."""
    job = Queues(Deployment(config, assignments).joined().loaded.settings).find_dead(job_id)
    click.echo(json.dumps(job.to_dict(with_text=with_text), indent=2))


@dead.command()
@_deployment
@click.argument("job_ids", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of them.")
def requeue(
    config: Path | None, assignments: tuple[str, ...], job_ids: tuple[str, ...], everything: bool
) -> None:
    """Put jobs back into their queues, with all their deliveries before them."""
    found = Queues(Deployment(config, assignments).joined().loaded.settings)
    n_back = 0
    for job in _chosen(found, job_ids, everything):
        try:
            n_back += found.requeue(job)
        except InvalidMessageError as error:
            click.echo(f"{printable(job.id or '-')} not put back: {error.problem}", err=True)
    click.echo(f"{n_back} put back")


@dead.command()
@_deployment
@click.argument("job_ids", nargs=-1)
@click.option("--all", "everything", is_flag=True, help="All of them.")
def drop(
    config: Path | None, assignments: tuple[str, ...], job_ids: tuple[str, ...], everything: bool
) -> None:
    """Forget jobs for good."""
    found = Queues(Deployment(config, assignments).joined().loaded.settings)
    click.echo(f"{sum(found.drop(job) for job in _chosen(found, job_ids, everything))} dropped")


def _chosen(found: Queues, job_ids: tuple[str, ...], everything: bool) -> list[DeadJob]:
    if not everything and not job_ids:
        raise ConfigError(["name the jobs, or say --all"])
    return found.dead() if everything else [found.find_dead(job_id) for job_id in job_ids]


@cli.group()
def config() -> None:
    """Look at the configuration."""


@config.command()
@_deployment
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(config: Path | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Print the effective values and where each came from; secrets are masked.

    What `auto` means on this machine is told for the pools that serve a model.
    """
    loaded = Deployment(config, assignments).loaded
    values = effective_values(loaded)
    here = _counts_here(loaded.settings)
    if as_json:
        rows = {
            key: {"value": value, "origin": origin} | ({"here": here[key]} if key in here else {})
            for key, value, origin in values
        }
        click.echo(json.dumps(rows, indent=2, default=str))
        return
    width = max(len(key) for key, _, _ in values)
    for key, value, origin in values:
        text = f"{value}, here {here[key]}" if key in here else str(value)
        click.echo(f"{key:{width}} = {text:40} ({origin})")


def _counts_here(settings: Settings) -> dict[str, int]:
    """Return what `auto` is on this machine, by dotted key; nothing where models cannot run."""
    if not has_engines():
        return {}
    counts = [
        (f"pools.{pool}.{field}", getattr(getattr(settings.pools, pool), field), getattr(layout, field))
        for pool, layout in choose_layouts(settings, read_machine()).items()
        for field in ("processes", "threads")
    ]
    return {key: here for key, value, here in counts if value == AUTO}


@config.command()
def env() -> None:
    """Print .env.example: every variable, its meaning and its default."""
    click.echo(sample_environment(), nl=False)


@cli.command()
@_deployment
@click.option("--pool", type=click.Choice(["cpu", "gpu"]), default="cpu", help="Hardware; cpu by default.")
@click.option("--model", "models", multiple=True, help="Measure only this model; repeatable.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=1),
    default=60,
    help="About how long to measure, loading included; 60 by default.",
)
def tune(
    config: Path | None, assignments: tuple[str, ...], pool: str, models: tuple[str, ...], seconds: float
) -> None:
    """Measure which processes, threads and batches embed fastest on this machine. Needs no Redis."""
    require_engines()
    from penstock_workers.command import tune as tuning

    settings, name = Deployment(config, assignments).loaded.settings, cast("PoolName", pool)
    names = tuning.choose_names(settings, name, models)
    layouts = tuning.candidates(settings, name, names)
    found = tuning.measure(settings, name, names, layouts, seconds)
    best = tuning.choose_best(found)
    click.echo("\n".join(tuning.table(found, best)))
    if missed := [str(layout) for layout in layouts if layout not in {one.layout for one in found}]:
        click.echo(f"not measured, --seconds was too short: {', '.join(missed)}")
    click.echo(f"\n# for the configuration\n{tuning.snippet(name, best)}", nl=False)


@cli.command()
@_deployment
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option(
    "--corpus",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    default=Path(),
    help="Folder whose Markdown files are searched; this one by default.",
)
def demo(config: Path | None, assignments: tuple[str, ...], as_json: bool, corpus: Path) -> None:
    """Start a stack of its own, embed and search documents, answer questions, stop."""
    from penstock_workers.command.demo import run_demo

    deployment = Deployment(config, assignments)
    sys.exit(run_demo(deployment.loaded, config, deployment.environment, corpus=corpus, as_json=as_json))


def _supervisor(children: Any, deployment: Deployment) -> Supervisor:
    from penstock_workers.pool import GRACE_S

    # A worker that hangs ends by itself after that, and says so.
    return Supervisor(children, drain_s=deployment.loaded.settings.worker.drain_s + GRACE_S)


def main() -> None:
    """Run the command line; one line and a non-zero exit for what is wrong."""
    # For whatever is started from here: no module of the folder one stands in is taken for an installed one.
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        cli()
    except ConfigError as error:
        click.echo(str(error), err=True)
        sys.exit(os.EX_CONFIG)
    except PenstockError as error:
        click.echo(str(error), err=True)
        if isinstance(error, BrokerUnavailableError) and (advice := _advice(error.url)):
            click.echo(advice, err=True)
        sys.exit(1)


def _advice(url: str) -> str:
    """Say what to do where no Redis is at `url`; "" where that is somebody's own."""
    name_one = "--set redis.broker_url=redis://HOST:PORT/0 names another Redis"
    if url != RedisSettings().broker_url:
        return ""
    if elsewhere := tell_elsewhere(url):
        return f"a stack of this user runs elsewhere: {elsewhere}; {name_one}"
    return f"no stack of this user runs: `penstock up` starts one; {name_one}"
