"""`penstock worker`: one worker process, which is Celery's own with a pool's queues."""

import os
import runpy
import sys
from pathlib import Path
from typing import cast

import click

from penstock.request import PoolName
from penstock_workers.celery_variables import refuse_variables
from penstock_workers.command.deployment import Deployment, deployment_options
from penstock_workers.command.stack import require_engines, worker_command, worker_queues
from penstock_workers.configuration import CONFIG_VARIABLE


@click.command(context_settings={"ignore_unknown_options": True})
@deployment_options
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
    name, deployment = cast("PoolName", pool), Deployment(config, assignments)
    served = {key: one for key, one in deployment.loaded.settings.models.items() if name in one.pools}
    require_engines(one for key, one in served.items() if key in models or not models)
    refuse_variables(os.environ)
    deployment.joined(only_here=True)
    queues = worker_queues(deployment.loaded.settings, name, models)
    command = worker_command(deployment.loaded.settings, queues, f"{pool}-{os.getpid()}")
    os.environ.update(deployment.environment)
    if config is not None:
        os.environ[CONFIG_VARIABLE] = str(config)
    # Not as another program, whose first seconds would hear no signal as process 1.
    _, _, module, *arguments = command
    sys.argv[:] = [module, *arguments, *celery_options]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
