"""What a server's refusal means."""

import pytest
import redis
from redis._parsers.base import BaseParser

from penstock.connections import redis_errors
from penstock.errors import BrokerRefusedError, BrokerUnavailableError
from penstock.refusals import OutageError, attentive, code_of, is_for_now, is_outage

ANSWERS = {
    "READONLY You can't write against a read only replica.": "outage",
    "READONLY You can't write against a read only replica. script: f0, on @user_script:1.": "outage",
    "ERR Error running script (call to f_0): @user_script:1: -READONLY You can't write": "outage",
    "NOREPLICAS Not enough good replicas to write.": "outage",
    "MISCONF Redis is configured to save RDB snapshots": "outage",
    "LOADING Redis is loading the dataset in memory": "outage",
    "BUSY Redis is busy running a script.": "outage",
    "UNKILLABLE Sorry the script already executed write commands": "outage",
    "MASTERDOWN Link with MASTER is down": "outage",
    "TRYAGAIN Multiple keys request during rehashing of slot": "outage",
    "CLUSTERDOWN The cluster is down": "outage",
    "UNBLOCKED force unblock from blocking operation, instance state changed": "outage",
    "OOM command not allowed when used memory > 'maxmemory'.": "refusal",
    "NOAUTH Authentication required.": "refusal",
    "WRONGPASS invalid username-password pair or user is disabled.": "refusal",
    "NOPERM this user has no permissions": "refusal",
    "ERR unknown command 'FOO'": "answer",
    "WRONGTYPE Operation against a key holding the wrong kind of value": "answer",
    "NOSCRIPT No matching script.": "answer",
    "ERR DB index is out of range": "answer",
}


@pytest.mark.parametrize(("answer", "meaning"), ANSWERS.items())
def test_each_answer_has_one_meaning(answer: str, meaning: str) -> None:
    """An outage ends by itself, a refusal by what an operator does, and any other answer stands."""
    error = BaseParser.parse_error(answer)

    assert is_for_now(error) == (meaning != "answer")
    assert is_outage(error) == (meaning == "outage")
    if meaning == "outage":
        assert code_of(error) in answer


SENTENCES = {
    "NOAUTH HELLO must be called with the client already": "this Redis wants a password: redis://USER",
    "NOAUTH Authentication required.": "a Redis of `penstock up` is for the user who started it",
    "WRONGPASS invalid username-password pair or user is disabled.": "knows no such user with this password",
    "NOPERM User x has no permissions to run 'get'": r"lacks a right, .*users\.acl.* run 'get'",
    "ERR Error running script: @user_script:1: -NOPERM User x has no": r"lacks a right, .*-NOPERM User x",
}


@pytest.mark.parametrize(("answer", "sentence"), SENTENCES.items())
def test_who_may_not_is_told_what_to_do(answer: str, sentence: str) -> None:
    """Words of the protocol become a sentence, once, and mean what they meant."""
    error = BaseParser.parse_error(answer)
    code, connection = code_of(error), attentive(redis.Connection)()

    judged = connection._judge(connection._judge(error))

    with pytest.raises(BrokerRefusedError, match=sentence) as caught, redis_errors("redis://r:1/0"):
        raise judged
    assert str(caught.value).count("://USER:") == ("wants a password" in str(caught.value))
    assert str(caught.value).count("lacks a right") <= 1
    assert code_of(judged) == code
    assert is_for_now(judged)


@pytest.mark.parametrize(("answer", "meaning"), ANSWERS.items())
def test_callers_are_told_whether_trying_again_helps(answer: str, meaning: str) -> None:
    """What a caller gets for an outage is retryable, for what somebody has to change it is not."""
    judged = attentive(redis.Connection)()._judge(BaseParser.parse_error(answer))

    with (
        pytest.raises(BrokerUnavailableError if meaning == "outage" else BrokerRefusedError),
        redis_errors(""),
    ):
        raise judged
    assert isinstance(judged, OutageError | redis.exceptions.BusyLoadingError) == (meaning == "outage")
