"""What runs on model machines: Celery workers that load each model once and batch what is waiting."""
