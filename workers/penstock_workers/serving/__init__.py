"""One worker process: Celery's app, the models it serves, and the tasks that they answer."""
