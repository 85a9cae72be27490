"""Which insides of Celery and kombu this package replaces or counts on, and whether they are still the same.

Between two versions they may change without a word, and nobody finds that out from a lost message. So each
is known by a digest of its source: a version that was never read is fine while all of them are as they were.
"""

import ast
import hashlib
import sys
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from penstock.errors import ConfigError
from penstock.extras import how_to_install

READ: Final[Mapping[str, str]] = {"celery": "5.7.0", "kombu": "5.7.0"}
"""The versions whose source was read and tested; the digests are theirs."""

DIGESTS: Final[Mapping[str, str]] = {
    "celery.backends.base:Backend._ensure_retryable": "cd2ad4e2fdf2",
    "celery.backends.base:Backend._get_result_meta": "5d9db42b981c",
    "celery.backends.base:Backend.mark_as_failure": "16d261b0cf13",
    "celery.backends.base:Backend.mark_as_retry": "253ace5ed746",
    "celery.backends.base:Backend.store_result": "1edd4057ee1d",
    "celery.backends.base:BaseKeyValueStoreBackend._store_result": "71146636916f",
    "celery.backends.redis:RedisBackend.__init__": "44fc242e687b",
    "celery.backends.redis:RedisBackend._create_client": "66a5da482f52",
    "celery.backends.redis:RedisBackend._params_from_url": "14bf5b3031b8",
    "celery.backends.redis:RedisBackend.on_chord_part_return": "fa3c7a84470b",
    "celery.concurrency.base:BasePool.on_start": "f8a49f4d0e3d",
    "celery.concurrency.base:BasePool.on_terminate": "3c460bf3d012",
    "celery.concurrency.base:BasePool.terminate_job": "06564658a0fe",
    "celery.concurrency.base:apply_target": "64bb22332b3a",
    "celery.concurrency.thread:TaskPool.__init__": "9ea16234d4be",
    "celery.concurrency.thread:TaskPool._get_info": "fbef7499f348",
    "celery.concurrency.thread:TaskPool.on_apply": "3d976108dbac",
    "celery.concurrency.thread:TaskPool.on_stop": "8a6476f4bd60",
    "celery.worker.consumer.consumer:Consumer.__init__": "66ca6c444cd6",
    "celery.worker.consumer.consumer:Consumer._flush_events": "0519d50c4794",
    "celery.worker.consumer.consumer:Consumer.create_task_handler": "0d187fd14146",
    "celery.worker.consumer.consumer:Consumer.ensure_connected": "28f71a3c50ce",
    "celery.worker.consumer.consumer:Consumer.on_decode_error": "c69e55d9eac6",
    "celery.worker.consumer.consumer:Consumer.on_invalid_task": "7b7e7178b693",
    "celery.worker.consumer.consumer:Consumer.on_unknown_message": "3bbe4631444b",
    "celery.worker.consumer.consumer:Consumer.on_unknown_task": "156e84f5ce71",
    "celery.worker.consumer.consumer:Consumer.stop": "e21047f9a8ab",
    "celery.worker.consumer.consumer:Consumer.update_strategies": "f12a3b491351",
    "celery.worker.loops:asynloop": "27716f76e08d",
    "celery.worker.request:Request.__init__": "00728bc9b7c6",
    "celery.worker.request:Request.info": "93e6f24cb406",
    "celery.worker.request:Request.maybe_expire": "b969bda98271",
    "celery.worker.request:Request.on_failure": "618a2c649c8a",
    "celery.worker.request:Request.on_retry": "a763ddcfb055",
    "celery.worker.request:Request.send_event": "e570e5836a6f",
    "celery.worker.request:Request.terminate": "266a5a0ca8d0",
    "celery.worker.request:create_request_cls": "e92e0bc8ae3b",
    "celery.worker.strategy:default": "6baf864d983f",
    "kombu.message:Message._decode": "1ad78f8946c3",
    "kombu.transport.redis:Channel.__init__": "4b1f45b355f8",
    "kombu.transport.redis:Channel._basic_cancel": "535e3674169d",
    "kombu.transport.redis:Channel._brpop_read": "c2e423dfeda8",
    "kombu.transport.redis:Channel._brpop_start": "ba567e4a693e",
    "kombu.transport.redis:Channel._connparams": "d4e5bd6168ed",
    "kombu.transport.redis:Channel._flush_brpop_reauth": "b177b07dce72",
    "kombu.transport.redis:Channel._get_pool": "ac32d180d28c",
    "kombu.transport.redis:Channel._has_queue": "3528d4e61159",
    "kombu.transport.redis:Channel._maybe_update_queues_expire": "bcb3389f7792",
    "kombu.transport.redis:Channel._on_connection_disconnect": "8ccc3d10a45a",
    "kombu.transport.redis:Channel._purge": "e6a444bf2da6",
    "kombu.transport.redis:Channel._put": "15ace6be28b0",
    "kombu.transport.redis:Channel._q_for_pri": "e1483b07ab7d",
    "kombu.transport.redis:Channel._queue_bind": "cb5873e199a9",
    "kombu.transport.redis:Channel._refresh_bindings": "a9ba8c907c21",
    "kombu.transport.redis:Channel._size": "b1e0bb09cdbb",
    "kombu.transport.redis:Channel.basic_consume": "633ea00148a5",
    "kombu.transport.redis:Channel.close": "5ca5e6f0419f",
    "kombu.transport.redis:Channel.conn_or_acquire": "0ea0bfca9a66",
    "kombu.transport.redis:Channel.maybe_refresh_binding_expiry": "817f59a34baf",
    "kombu.transport.redis:MultiChannelPoller.get": "b23efc8e2d48",
    "kombu.transport.redis:MultiChannelPoller.on_poll_start": "606d9df635e0",
    "kombu.transport.redis:MultiChannelPoller.on_readable": "e98f2e1d1f1f",
    "kombu.transport.redis:PublishBatch.add": "3b27bcdfb706",
    "kombu.transport.redis:SentinelChannel._get_pool": "a378a2721965",
    "kombu.transport.virtual.base:Channel._get_message_priority": "534d1445ba9a",
    "kombu.transport.virtual.base:Channel.basic_consume": "429ca164fbeb",
    "kombu.transport.virtual.base:Channel.basic_get": "6321cb272755",
    "kombu.transport.virtual.base:Message.__init__": "117c34027c7f",
    "kombu.transport.virtual.base:QoS.ack": "1467f5999364",
    "kombu.transport.virtual.base:QoS.append": "7dbb9ebe24bc",
    "kombu.transport.virtual.base:QoS.can_consume": "965bf41ad5c7",
    "kombu.transport.virtual.base:QoS.can_consume_max_estimate": "897e2136f606",
    "kombu.transport.virtual.base:QoS.reject": "2117422d5020",
    "kombu.transport.virtual.base:QoS.restore_unacked": "334d251c8949",
    "kombu.transport.virtual.base:QoS.restore_unacked_once": "40676f7f01f0",
    "kombu.transport.virtual.base:QoS.restore_visible": "c62a5b1d5734",
}
"""Function or method, `module:Class.name`, and the first digits of its source's SHA-256."""


def check_versions() -> None:
    """Refuse a version of Celery or kombu in which something changed that is counted on here.

    Raises:
        ConfigError: names what changed, or what is missing, and what to install.
    """
    problems = []
    for library, read in READ.items():
        try:
            found = version(library)
        except PackageNotFoundError:
            problems.append(f"{library} is missing: {how_to_install('celery')}")
            continue
        if found == read:
            continue
        ours = (name for name in DIGESTS if name.startswith(f"{library}."))
        if changed := [name for name in ours if digest(name) != DIGESTS[name]]:
            names = ", ".join(changed)
            problems.append(
                f"{library} {found} changed {names}; supported: {read}, pip install {library}=={read}"
            )
    if problems:
        raise ConfigError(problems)


def why_not_imported(error: ImportError) -> ConfigError:
    """Return what an import of Celery's parts lacks, in the words of whoever installs them.

    Another version may be without a name that we import, and a failed import names that one alone.
    """
    try:
        check_versions()
    except ConfigError as found:
        return found
    return ConfigError([f"{error}: {how_to_install('celery')}"])


def digest(name: str) -> str | None:
    """Return the first digits of the SHA-256 of a function's source; None if there is no such function.

    The source is read and not imported: parts of Celery tell by their presence that this is a worker.
    """
    module, _, path = name.partition(":")
    source = _source(module)
    node: ast.AST | None = _parsed(module)
    for part in path.split("."):
        node = next((each for each in getattr(node, "body", ()) if getattr(each, "name", None) == part), None)
    if source is None or node is None:
        return None
    parts = [*getattr(node, "decorator_list", ()), node]  # the node's own lines begin below its decorators
    text = "\n".join(ast.get_source_segment(source, part) or "" for part in parts)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


@cache
def _source(module: str) -> str | None:
    library, _, path = module.partition(".")
    for folder in _folders(library):
        if (file := Path(folder, f"{path.replace('.', '/')}.py")).is_file():
            return file.read_text(encoding="utf-8")
    return None


def _folders(library: str) -> list[str]:
    """Return where Python finds a library: a checkout that is installed as editable lies elsewhere."""
    if (loaded := sys.modules.get(library)) is not None:
        return list(loaded.__path__)
    spec = find_spec(library)
    return list(spec.submodule_search_locations or ()) if spec else []


@cache
def _parsed(module: str) -> ast.Module:
    return ast.parse(_source(module) or "")
