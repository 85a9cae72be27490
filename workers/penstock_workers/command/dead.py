"""`penstock dead`: jobs that were given up, listed, shown, put back or dropped."""

import json
from datetime import UTC, datetime
from pathlib import Path

import click

from penstock.envelope import printable
from penstock.errors import ConfigError, InvalidMessageError
from penstock_workers.command.deployment import Deployment, deployment_options
from penstock_workers.command.queues import DeadJob, Queues


@click.group()
def dead() -> None:
    """Look after jobs that were given up."""


@dead.command("list")
@deployment_options
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
@deployment_options
@click.argument("job_id")
@click.option("--with-text", is_flag=True, help="Print the message too: it holds what its caller wrote.")
def dead_show(config: Path | None, assignments: tuple[str, ...], job_id: str, with_text: bool) -> None:
    """Show one of them as JSON."""
    job = Queues(Deployment(config, assignments).joined().loaded.settings).find_dead(job_id)
    click.echo(json.dumps(job.to_dict(with_text=with_text), indent=2))


@dead.command()
@deployment_options
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
@deployment_options
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
