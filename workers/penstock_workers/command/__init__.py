"""What a person types: starting a stack, looking at it, tuning it. Knows no torch and no Celery."""
