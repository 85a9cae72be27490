import pytest

from penstock.errors import ConfigError
from penstock_workers.celery_variables import refuse_variables


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("BROKER_URL", "redis.broker_url decides"),
        ("CELERY_BROKER", "redis.broker_url decides"),
        ("CELERY_BROKER_URL", "redis.broker_url decides"),
        ("CELERY_BROKER_READ_URL", "redis.broker_url decides"),
        ("CELERY_BROKER_WRITE_URL", "redis.broker_url decides"),
        ("RESULT_BACKEND", "redis.results_url decides"),
        ("CELERY_RESULT_BACKEND", "redis.results_url decides"),
        ("CONFIG_MODULE", "the deployment's configuration decides"),
        ("CELERY_CONFIG", "the deployment's configuration decides"),
        ("CELERY_CONFIG_MODULE", "the deployment's configuration decides"),
        ("LOADER", "ours decides"),
        ("CELERY_LOADER", "ours decides"),
        ("KOMBU_LOG_DEBUG", "to the log"),
        ("KOMBU_LOG_CHANNEL", "to the log"),
        ("KOMBU_LOG_CONNECTION", "to the log"),
    ],
)
def test_what_would_win_over_the_settings_is_refused(name: str, told: str) -> None:
    """Each variable has a line that names it and what decides instead, and not its value."""
    with pytest.raises(ConfigError) as caught:
        refuse_variables({"HOME": "/root", name: "redis://:hush@elsewhere/0"})

    (line,) = caught.value.problems
    assert line.startswith(f"{name}: ")
    assert told in line
    assert "hush" not in line


def test_all_are_told_at_once_and_empty_ones_are_none() -> None:
    """One start tells everything; what is empty is as good as not set, as Compose passes it on."""
    with pytest.raises(ConfigError) as caught:
        refuse_variables({"CELERY_BROKER_URL": "x", "CELERY_RESULT_BACKEND": "y", "CELERY_LOADER": ""})

    assert len(caught.value.problems) == 2
    refuse_variables({"CELERY_BROKER_URL": "", "CELERY_PORT": "tcp://10.0.0.1:80", "HF_HUB_OFFLINE": "1"})
