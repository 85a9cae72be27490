"""The client in every kind of program: it works, or says in one sentence that it does not; it never hangs."""

import asyncio
import copy
import gc
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import textwrap
import threading
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import FrameType

import pytest
import redis

from penstock import (
    AsyncClient,
    AsyncJob,
    Client,
    ClientUseError,
    ConfigError,
    InvalidOptionError,
    Job,
    JobCancelledError,
    JobState,
    PenstockError,
    TransportError,
)
from penstock.keys import record_key
from penstock_workers.command.local_redis import free_port
from tests.deployment import ROOT, Server
from tests.eventually import eventually
from tests.faults.light import MODEL, LightWorker
from tests.faults.proxy import Proxy

WITHIN_S = 60


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LightWorker]:
    """A worker whose texts say how long they take, and a server of its own."""
    with Server(free_port()).running() as server:
        worker = LightWorker(tmp_path_factory.mktemp("light"), server)
        worker.url = server.broker_url  # type: ignore[attr-defined]  # for the programs
        worker.results = redis.Redis.from_url(server.results_url)  # type: ignore[attr-defined]
        with worker.running(), worker.results:  # type: ignore[attr-defined]
            yield worker


@pytest.fixture
def url(light: LightWorker) -> str:
    """Where its queues are."""
    return light.url  # type: ignore[attr-defined, no-any-return]


@pytest.fixture
def client(url: str) -> Iterator[Client]:
    """A client of it."""
    with Client(url) as connected:
        yield connected


def embed(client: Client, text: str = "a 0") -> tuple[int, ...]:
    return client.embed([text], model=MODEL, timeout_s=WITHIN_S).shape


def run(program: str, url: str, *options: str, may_complain: bool = False) -> str:
    """Return what a program prints that has `url`, `MODEL` and `Client`; it must end well."""
    head = f"from penstock import *\nurl, MODEL = {url!r}, {MODEL!r}\n"
    done = subprocess.run(
        [sys.executable, *options, "-c", head + textwrap.dedent(program)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert may_complain or not done.stderr, done.stderr
    return done.stdout


def exit_code(child: int) -> int:
    """Return how a forked child ended; one that hangs is killed."""
    ends_at = time.monotonic() + WITHIN_S
    while True:
        pid, status = os.waitpid(child, os.WNOHANG)
        if pid:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > ends_at:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            raise AssertionError("the child hangs")
        time.sleep(0.01)


# Forked, spawned, copied


def test_a_job_is_asked_in_a_forked_child(client: Client) -> None:
    """A child asks for a job of its parent through connections of its own, whether it has ended or not."""
    ended, waiting = (client.submit_embed([text], model=MODEL) for text in ("a 0", "b 0.5"))
    ended.result(timeout_s=WITHIN_S)

    child = os.fork()
    if child == 0:
        try:
            fine = ended.result(timeout_s=0.1).shape == (1, 3) and ended.usage is not None
            fine = fine and waiting.result(timeout_s=WITHIN_S).shape == (1, 3)
            fine = fine and waiting.state() is JobState.SUCCEEDED and embed(client) == (1, 3)
        except BaseException:  # noqa: BLE001  a child must not become a second pytest
            os._exit(2)
        os._exit(0 if fine else 1)

    assert exit_code(child) == 0
    assert waiting.result(timeout_s=WITHIN_S).shape == (1, 3)


def test_a_stream_of_the_parent_is_refused_in_a_child(client: Client) -> None:
    """What is half read belongs to the parent: the child hears so, and collecting it there does not hang."""
    parts = client.embed_many((f"a{n} 0" for n in range(100)), model=MODEL, timeout_s=WITHIN_S)
    next(parts)

    child = os.fork()
    if child == 0:
        try:
            while True:
                next(parts)
        except ClientUseError as error:
            os._exit(0 if "parent process" in str(error) else 1)
        except BaseException:  # noqa: BLE001  a child must not become a second pytest
            os._exit(2)

    assert exit_code(child) == 0
    assert sum(map(len, parts)) < 100


def test_a_fork_while_another_thread_starts_the_client(url: str) -> None:
    """A lock that a thread held at the fork is free in the child, where that thread is not."""
    client = Client(url)
    with ThreadPoolExecutor(1) as other:
        holds, may_end = threading.Event(), threading.Event()

        def hold() -> None:
            with client._lock:
                holds.set()
                may_end.wait(WITHIN_S)

        held = other.submit(hold)
        assert holds.wait(WITHIN_S)
        child = os.fork()
        if child == 0:
            try:
                os._exit(0 if embed(client) == (1, 3) else 1)
            except BaseException:  # noqa: BLE001  a child must not become a second pytest
                os._exit(2)
        code = exit_code(child)
        may_end.set()
        held.result(WITHIN_S)

    assert code == 0
    client.close()


def in_another_process(client: Client, job: "Job[object]") -> tuple[int, ...]:
    """Run in a process that was spawned."""
    assert len(job.result(timeout_s=WITHIN_S)) == 1  # type: ignore[arg-type]  # vectors
    return embed(client)


@pytest.mark.parametrize("method", ["spawn", "forkserver", "fork"])
def test_processes_are_given_the_client(client: Client, method: str) -> None:
    """A client and a job go to other processes as arguments, however these are started."""
    job = client.submit_embed(["a 0"], model=MODEL)

    with multiprocessing.get_context(method).Pool(1) as pool:
        assert pool.apply_async(in_another_process, (client, job)).get(WITHIN_S) == (1, 3)


def test_a_client_is_pickled_as_its_settings(client: Client, url: str) -> None:
    """What comes back has the same settings and connections of its own; an asynchronous job says why not."""
    for twin in (pickle.loads(pickle.dumps(client)), copy.copy(client), copy.deepcopy(client)):
        with twin:
            assert twin is not client
            assert embed(twin) == (1, 3)
    job = pickle.loads(pickle.dumps(client.submit_embed(["a 0"], model=MODEL)))
    assert job.result(timeout_s=WITHIN_S).shape == (1, 3)

    async def go() -> None:
        async with pickle.loads(pickle.dumps(AsyncClient(url))) as twin:
            sent: AsyncJob[object] = await twin.submit_embed(["a 0"], model=MODEL)
            with pytest.raises(TypeError, match=r"client.job\(id\)"):
                pickle.dumps(sent)

    asyncio.run(go())


# Closed, collected, ended


def test_a_closed_client_says_so(url: str) -> None:
    """Every use after `close` is one sentence, for jobs and streams too; closing again does nothing."""
    client = Client(url)
    job = client.submit_embed(["a 0"], model=MODEL)
    parts = client.embed_many(("a 0" for _ in range(50)), model=MODEL, timeout_s=WITHIN_S)
    next(parts)
    client.close()
    client.close()

    for use in (client.models, job.result, job.state, job.cancel, client.__enter__, lambda: list(parts)):
        with pytest.raises(ClientUseError, match="closed"):
            use()


def test_who_waits_while_the_client_is_closed_hears_so(url: str, light: LightWorker) -> None:
    """Each call that waits in another thread ends with a typed error, and `close` returns."""
    client = Client(url)
    job = client.submit_embed(["a 3"], model=MODEL)
    calls = [
        job.result,
        lambda: embed(client, "b 3"),
        lambda: list(client.embed_many(["c 3"], model=MODEL)),
    ]
    with ThreadPoolExecutor(3) as threads:
        waiting = [threads.submit(call) for call in calls]
        eventually(lambda: light.n_held() >= 2, within_s=WITHIN_S)
        client.close()

        for call in waiting:
            assert isinstance(call.exception(WITHIN_S), ClientUseError | JobCancelledError)
    with Client(url) as other:
        other.job(job.id).cancel()


def test_clients_that_are_dropped_leave_no_threads(url: str) -> None:
    """A hundred clients that nobody closed are gone when they are collected."""
    before = threading.active_count()
    for number in range(100):
        client = Client(url)
        if number % 10 == 0:
            client.models()
        del client
    gc.collect()

    eventually(lambda: threading.active_count() <= before, within_s=WITHIN_S)


def test_a_process_ends_however_it_left_its_clients(url: str) -> None:
    """Clients, jobs and streams that lie around at the end neither hang nor print."""
    program = """
    import atexit
    client, other = Client(url), Client(url)
    atexit.register(lambda: print(client.embed(["late 0"], model=MODEL, timeout_s=30).shape))
    parts = other.embed_many(("a 0" for _ in range(100)), model=MODEL)
    next(parts)
    job = client.submit_embed(["b 3"], model=MODEL)
    class Last:
        def __del__(self):
            try:
                job.state()
            except ClientUseError:
                pass
    last = Last()
    job.cancel()
    print("end")
    """
    assert run(program, url, "-W", "error") == "end\n(1, 3)\n"


def test_threads_go_on_when_the_main_thread_has_ended(url: str) -> None:
    """Names of hosts are found and large results read by threads that outlive the main one."""
    program = """
    import threading, time
    import redis
    from penstock.keys import record_key, result_key
    from penstock.codec import encode_meta
    from penstock.result import EmbedResult, Timings, Usage
    import numpy as np

    result = EmbedResult(model="m", vectors=np.zeros((100, 1000), np.float32), usage=Usage(prompt_tokens=1),
        timings=Timings(queued_s=0, prepared_s=0, batched_s=0, computed_s=0))
    store = redis.Redis.from_url(url[:-1] + "1")
    store.set(record_key("large"), "SUCCESS")
    store.set(result_key("large"), encode_meta({"status": "SUCCESS", "result": result}))
    store.close()

    def go_on():
        threading.main_thread().join()
        with Client(url.replace("127.0.0.1", "localhost")) as client:
            print(client.embed(["a 0"], model=MODEL, timeout_s=30).shape)
            print(client.job("large").result(timeout_s=30).shape)
        import asyncio
        async def again():
            async with AsyncClient(url) as client:
                print((await (await client.job("large")).result(30)).shape)
        asyncio.run(again())

    threading.Thread(target=go_on).start()
    """
    assert run(program, url) == "(1, 3)\n(100, 1000)\n(100, 1000)\n"


# Left by an exception


class OnPurpose(Exception):  # noqa: N818  it is no error
    """Raised by a signal's handler."""


@pytest.mark.parametrize("kind", ["embed", "many"])
def test_a_call_that_a_signal_ends_takes_its_job_back(url: str, light: LightWorker, kind: str) -> None:
    """Whatever a handler raises leaves the call at once, and the job with it."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise OnPurpose

    before = signal.signal(signal.SIGUSR1, leave)
    results: redis.Redis = light.results  # type: ignore[attr-defined]  # of the fixture above
    results.flushdb()
    try:
        with Client(url) as client:
            client.models()
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGUSR1)).start()
            texts = [f"{kind} 2"]
            many, one = partial(client.embed_many, texts), partial(client.embed, texts)
            with pytest.raises(OnPurpose):
                list((many if kind == "many" else one)(model=MODEL))
    finally:
        signal.signal(signal.SIGUSR1, before)

    (record,) = results.keys(record_key("*"))
    assert results.get(record) == b"REVOKED"


def test_a_cancelled_call_takes_its_job_back(url: str, light: LightWorker) -> None:
    """`wait_for`, a cancelled task, and a task group that fails: no job is left behind."""

    async def go() -> None:
        async with AsyncClient(url) as client:
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.rerank("q", ["d"], model=MODEL), 0.0)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(client.embed(["left 3"], model=MODEL), 0.5)
            task = asyncio.create_task(client.embed(["left 3"], model=MODEL))
            await asyncio.sleep(0.2)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task

    asyncio.run(go())

    eventually(lambda: light.n_held() == 0, within_s=WITHIN_S)


# Event loops


def test_one_loop_after_another(url: str) -> None:
    """Where a loop has ended, the next one begins anew; beside one that runs, it is one sentence."""
    client = AsyncClient(url)

    async def once() -> AsyncJob[object]:
        assert (await client.embed(["a 0"], model=MODEL, timeout_s=WITHIN_S)).shape == (1, 3)
        return await client.submit_embed(["a 0"], model=MODEL)  # type: ignore[return-value]  # any result

    async def beside() -> None:
        assert (await client.job(jobs[0].id)).id == jobs[0].id
        with pytest.raises(ClientUseError, match="another event loop"):
            await jobs[0].result()
        with ThreadPoolExecutor(1) as threads:
            other = threads.submit(asyncio.run, client.models())  # type: ignore[arg-type]  # a coroutine
            assert isinstance(other.exception(WITHIN_S), ClientUseError)
        await client.close()
        with pytest.raises(ClientUseError, match="closed"):
            await client.models()

    with warnings.catch_warnings(action="ignore"):  # nobody closed it in the first two loops
        jobs = [asyncio.run(once()), asyncio.run(once())]
        asyncio.run(beside())
        jobs.clear()
        gc.collect()


def test_without_a_loop_it_is_one_sentence(url: str) -> None:
    """Trio and its like are no asyncio."""
    client = AsyncClient(url)

    with pytest.raises(ClientUseError, match="asyncio event loop"):
        client.models().send(None)


def test_a_blocking_client_works_inside_a_running_loop(url: str) -> None:
    """As in a notebook; with asyncio's debug mode, too."""

    async def cell() -> None:
        with Client(url) as client:
            assert embed(client) == (1, 3)

    asyncio.run(cell(), debug=True)


@pytest.mark.parametrize("kind", ["gevent", "eventlet", "uvloop"])
def test_other_loops_and_green_threads(url: str, kind: str) -> None:
    """Two clients at once work where threads are greenlets, and where the loop is another."""
    pytest.importorskip(kind)
    patch = {
        "gevent": "from gevent import monkey; monkey.patch_all()",
        "eventlet": "import eventlet; eventlet.monkey_patch()",
        "uvloop": "import asyncio, uvloop; asyncio.set_event_loop_policy(uvloop.EventLoopPolicy())",
    }[kind]
    program = f"""
    import warnings; warnings.simplefilter("ignore")
    {patch}
    from penstock import Client
    with Client(url) as a, Client(url) as b:
        job = b.submit_embed(["b 0"], model=MODEL)
        print(a.embed(["a 0"], model=MODEL, timeout_s=30).shape, job.result(30).shape)
    """
    done = subprocess.run(
        [sys.executable, "-c", f"url, MODEL = {url!r}, {MODEL!r}\n" + textwrap.dedent(program)],
        capture_output=True,
        text=True,
        timeout=WITHIN_S,
        check=False,
    )

    assert done.stdout == "(1, 3) (1, 3)\n", done.stderr


# Limits of time and of the system


def test_nothing_outlasts_its_limit(url: str) -> None:
    """A server that accepts and is silent holds no call longer than it was given."""
    with Proxy(int(url.split(":")[-1].split("/")[0])).running() as link:
        link.swallow()
        with Client(f"redis://127.0.0.1:{link.port}/0") as client:
            for call in (
                lambda: client.embed(["a 0"], model=MODEL, timeout_s=0.5),
                lambda: client.generate("a", model=MODEL, timeout_s=0.5),
                lambda: client.rerank("a", ["b"], model=MODEL, timeout_s=0.5),
                lambda: next(client.stream("a", model=MODEL, timeout_s=0.5)),
            ):
                began = time.monotonic()
                with pytest.raises(TransportError):
                    call()
                assert time.monotonic() - began < 5  # connecting and reading would take 15


@pytest.mark.parametrize("timeout_s", [-1, float("nan"), "5", True])
def test_no_time_is_refused(client: Client, timeout_s: object) -> None:
    """A limit that is none is an error before anything is sent."""
    with pytest.raises(InvalidOptionError, match="timeout_s"):
        client.embed(["a 0"], model=MODEL, timeout_s=timeout_s)  # type: ignore[arg-type]  # on purpose
    with pytest.raises(ConfigError, match="connect_timeout_s"):
        Client(connect_timeout_s=0 if timeout_s is True else timeout_s)  # type: ignore[arg-type]  # on purpose


def test_many_threads_share_one_client(client: Client) -> None:
    """A thousand threads that begin at once are all answered."""
    results: list[tuple[int, ...]] = []
    threads = [threading.Thread(target=lambda: results.append(embed(client))) for _ in range(1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WITHIN_S)

    assert results == [(1, 3)] * 1000


def test_a_process_without_files_gets_a_typed_error(url: str) -> None:
    """The limit of open files is told as what keeps Redis out of reach."""
    program = """
    import resource
    client = Client(url)
    client.models()
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))
    for call in (lambda: Client(url).models(), lambda: client.embed(["a 0"], model=MODEL, timeout_s=30)):
        try:
            call()
        except PenstockError as error:
            print(type(error).__name__, "open files" in str(error))
    """
    # asyncio itself complains when it collects a loop that could not be made.
    assert run(program, url, may_complain=True) == "BrokerUnavailableError True\n" * 2


def test_an_odd_id_is_no_job(client: Client) -> None:
    """What can be no id is told as such."""
    for job_id in ("", "a\nb", "\ud800", "x" * 1000, 5, None):
        with pytest.raises(PenstockError):
            client.job(job_id).state()  # type: ignore[arg-type]  # on purpose
