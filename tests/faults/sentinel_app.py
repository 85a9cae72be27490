"""The app of `tests.faults.app` behind Sentinel, with our result backend; its book is on another server."""

import os

from penstock_workers.sentinel import celery_url, first_url, result_backend, transport_options
from tests.faults.app import app

__all__ = ["app"]

BROKER, RESULTS = os.environ["FAULTS_BROKER_URL"], os.environ["FAULTS_RESULTS_URL"]

app.conf.update(
    broker_url=celery_url(BROKER),
    broker_failover_strategy=first_url,
    broker_transport_options={**app.conf.broker_transport_options, **transport_options(BROKER)},
    result_backend=result_backend(RESULTS),
    result_backend_transport_options=transport_options(RESULTS),
)
