"""A message from its queue to a thread and back; Celery and kombu live here, and no model."""
