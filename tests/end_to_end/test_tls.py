"""The API under TLS, with a certificate that the test signs itself."""

from __future__ import annotations

import asyncio
import ssl
import subprocess
from pathlib import Path

import aiohttp
import pytest

from tests.end_to_end.stub_workers import SECRETS, StubWorker
from triptych.config import ModelConfig, RouterConfig, TlsConfig
from triptych.demo.tiny import make_tiny_model
from triptych.errors import ConfigError
from triptych.options import check
from triptych.router.server import RouterServer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    make_tiny_model(folder / "tiny")
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", folder / "key.pem", "-out", folder / "certificate.pem"],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return folder


def config(folder: Path, tls: TlsConfig) -> RouterConfig:
    model = ModelConfig(str(folder / "tiny"))
    return RouterConfig(model, port=0, served_name="tiny", tls=tls)


async def test_answers_under_tls_and_workers_beside(folder: Path) -> None:
    tls = TlsConfig(folder / "certificate.pem", folder / "key.pem", port=0)
    server = RouterServer(config(folder, tls), SECRETS)
    assert server.tls_url is not None and server.tls_url.startswith("https://127.0.0.1:")
    serving = asyncio.create_task(server.serve(handle_signals=False))
    known = ssl.create_default_context(cafile=folder / "certificate.pem")
    said = server._router.chat._prompter._encode(" the red circle")
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x" * 200_000}]}
    try:
        async with aiohttp.ClientSession() as client, asyncio.timeout(30):
            workers = [
                StubWorker(role, router=server.url, answer=said) for role in ("encoder", "language")
            ]
            for worker in workers:
                worker.capacity = worker.capacity.__class__(max_model_len=1 << 20)
            async with workers[0].running(), workers[1].running():
                await asyncio.sleep(0.2)
                url = f"{server.tls_url}/v1/chat/completions"
                async with client.post(url, json=body, ssl=known) as answer:
                    found = await answer.json()
                assert found["choices"][0]["message"]["content"] == " the red circle", found
                with pytest.raises(aiohttp.ClientConnectorCertificateError):
                    await client.post(url, json=body)
                with pytest.raises(aiohttp.ClientError):
                    await client.get(server.tls_url.replace("https", "http") + "/health")
                async with client.get(f"{server.url}/health") as answer:
                    assert answer.status == 200
                for each in workers:
                    each.server.stop()
    finally:
        server.stop()
        await serving


def test_what_tls_needs_is_checked_at_start(folder: Path) -> None:
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    for tls in (TlsConfig(certificate, None), TlsConfig(None, key)):
        with pytest.raises(ConfigError, match="go together"):
            check(config(folder, tls))
    for tls in (TlsConfig(certificate, certificate), TlsConfig(folder / "none.pem", key)):
        with pytest.raises(ConfigError, match="cannot be used"):
            RouterServer(config(folder, tls), SECRETS)
