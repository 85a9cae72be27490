"""The command line `penstock`: its commands, and how it ends when something is wrong."""

import os
import sys
from pathlib import Path
from typing import cast

import click

from penstock.errors import BrokerUnavailableError, ConfigError, PenstockError
from penstock.request import PoolName
from penstock.stacks import tell_elsewhere
from penstock_workers.command.config import config
from penstock_workers.command.dead import dead
from penstock_workers.command.deployment import Deployment, deployment_options
from penstock_workers.command.queues import purge_queues, queues
from penstock_workers.command.stack import require_engines
from penstock_workers.command.status import status
from penstock_workers.command.up import up
from penstock_workers.command.worker import worker
from penstock_workers.settings import RedisSettings


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="penstock")
def cli() -> None:
    """Run Hugging Face models behind a Redis-backed Celery queue."""


for _command in (up, worker, status, queues, purge_queues, dead, config):
    cli.add_command(_command)


@cli.command()
@deployment_options
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
@deployment_options
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


def main() -> None:
    """Run the command line; one line and a non-zero exit for what is wrong."""
    _open_missing_files()
    # For all processes started from here: no module of the current folder may pass for an installed one.
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


def _open_missing_files() -> None:
    """Open nothing's file for each standard file that the process was started without, as `2>&-` does.

    Celery and the supervisor write to them, and a connection would be given the number of one.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            number = os.open(os.devnull, os.O_RDWR)  # the lowest that is free: the missing one
            os.set_inheritable(number, True)
            file = os.fdopen(number, mode, encoding="utf-8")
            setattr(sys, name, file)
            setattr(sys, f"__{name}__", file)


def _advice(url: str) -> str:
    """Say what to do if no Redis is at `url`; "" if the user named that URL."""
    name_one = "--set redis.broker_url=redis://HOST:PORT/0 names another Redis"
    if url != RedisSettings().broker_url:
        return ""
    if elsewhere := tell_elsewhere(url):
        return f"a stack of this user runs elsewhere: {elsewhere}; {name_one}"
    return f"no stack of this user runs: `penstock up` starts one; {name_one}"
