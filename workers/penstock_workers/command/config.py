"""`penstock config`: what the settings are, where each came from, and what `auto` means here."""

import json
from pathlib import Path

import click

from penstock_workers.command.capacity import choose_layouts
from penstock_workers.command.deployment import Deployment, deployment_options
from penstock_workers.command.stack import has_engines
from penstock_workers.configuration import effective_values, sample_environment
from penstock_workers.embedding.c_library import missing_reason
from penstock_workers.hardware.machine import read_machine
from penstock_workers.settings import AUTO, Settings


@click.group()
def config() -> None:
    """Look at the configuration."""


@config.command()
@deployment_options
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def show(config: Path | None, assignments: tuple[str, ...], as_json: bool) -> None:
    """Print the effective values and where each came from; secrets are masked.

    What `auto` means on this machine is told for the pools that serve a model. Where penstock was installed
    without a C compiler, a line on standard error says what it is without.
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
    if has_engines() and (reason := missing_reason()):
        click.echo(reason, err=True)


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
