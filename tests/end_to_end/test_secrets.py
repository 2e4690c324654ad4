"""Files by https, and where secrets never are: a whole topology as processes, with its logs."""

from __future__ import annotations

import base64
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import openai
import psutil
import pytest

from tests.end_to_end.encoder_bench import png
from tests.end_to_end.reference import data_uri, picture
from tests.end_to_end.served import Served
from tests.fault.deployed import call
from tests.videos import video, video_uri
from triptych.demo.tiny import make_tiny_model

SECRET = "Sh4red-Secret-0f-The-Tests"
API_KEY = "Api-Key-0f-The-Tests"
OPERATOR_KEY = "0perator-Key-0f-The-Tests"
WRONG_KEY = "Wr0ng-Key-0f-A-Client"
SIGNATURE = "S1gnature-In-A-Url"
SUCCESSOR_S = 60.0
ALL = (SECRET, API_KEY, OPERATOR_KEY, WRONG_KEY, SIGNATURE)
TEXT = {"type": "text", "text": "what are these?"}
FILES = {"/a.png": png(picture(1)), "/b.png": png(picture(2)), "/c.mp4": video(3)}


def certificate(folder: Path, name: str) -> tuple[Path, Path]:
    """Of 127.0.0.1, signed by itself; and its key."""
    paths = folder / f"{name}.pem", folder / f"{name}.key"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "1",
         "-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", paths[1], "-out", paths[0]],
        check=True, capture_output=True, timeout=60,
    )  # fmt: skip
    return paths


@contextmanager
def site(made: tuple[Path, Path]) -> Iterator[str]:
    """``FILES`` under TLS."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            data = FILES.get(self.path.partition("?")[0])
            self.send_response(200 if data else 404)
            self.send_header("content-length", str(len(data or b"")))
            self.end_headers()
            self.wfile.write(data or b"")

        def log_message(self, *arguments: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *arguments: object) -> None:
            pass  # a client that does not trust the certificate

    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(*made)
    with Server(("127.0.0.1", 0), Handler) as server:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"https://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("secrets")


@pytest.fixture(scope="module")
def served(root: Path) -> Iterator[Served]:
    known, _ = certificate(root, "known")
    folder = make_tiny_model(root / "model", "qwen3_vl")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(known))
        patch.setenv("TRIPTYCH_SECRET", SECRET)
        patch.setenv("TRIPTYCH_API_KEY", API_KEY)
        patch.setenv("TRIPTYCH_OPERATOR_KEY", OPERATOR_KEY)
        with Served(folder, "E/P/D", (), root / "logs") as served:
            yield served
    assert served.output
    nowhere("what serve printed", served.output)
    for log in (root / "logs").iterdir():
        nowhere(log.name, log.read_text())


@pytest.fixture
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key=API_KEY, max_retries=0) as client:
        yield client


def nowhere(what: str, text: str) -> None:
    """None of the secrets is in ``text``, plain or in a usual coding."""
    for secret in ALL:
        raw = secret.encode()
        for form in (secret, raw.hex(), base64.b64encode(raw).decode().rstrip("=")):
            assert form not in text, f"{secret} is in {what}"


def ask(client: openai.OpenAI, parts: list[dict[str, Any]], *, stream: bool = False) -> str:
    answer: Any = client.chat.completions.create(
        model=client.models.list().data[0].id,
        messages=[{"role": "user", "content": [*parts, TEXT]}],  # type: ignore[list-item]
        max_tokens=8,
        temperature=0,
        stream=stream,
    )
    if not stream:
        return str(answer.choices[0].message.content)
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer)


def part(kind: str, url: str) -> dict[str, Any]:
    return {"type": f"{kind}_url", f"{kind}_url": {"url": url}}


@pytest.mark.parametrize("stream", [False, True])
def test_files_by_https(root: Path, client: openai.OpenAI, stream: bool) -> None:
    """Several in a message, beside those of data URIs: as if all had come in the body."""
    inline = [
        part("image", data_uri(picture(1))),
        part("video", video_uri(FILES["/c.mp4"])),
        part("image", data_uri(picture(2))),
    ]
    with site((root / "known.pem", root / "known.key")) as url:
        fetched = [
            part("image", f"{url}/a.png"), part("video", f"{url}/c.mp4?x={SIGNATURE}"), inline[2]
        ]  # fmt: skip
        assert ask(client, fetched, stream=stream) == ask(client, inline)


def test_hosts_that_are_not_trusted(root: Path, client: openai.OpenAI) -> None:
    unknown = certificate(root, "unknown")
    expected = pytest.raises(openai.BadRequestError, match="certificate is not one")
    with site(unknown) as url, expected as caught:
        ask(client, [part("image", f"{url}/a.png?signature={SIGNATURE}")])
    assert caught.value.param == "messages[0].content[0].image_url"


def test_secrets_are_nowhere_to_be_read(root: Path, served: Served, client: openai.OpenAI) -> None:
    with site((root / "known.pem", root / "known.key")) as url:
        for path in ("/none.png", "/c.mp4"):
            with pytest.raises(openai.BadRequestError):
                ask(client, [part("image", f"{url}{path}?signature={SIGNATURE}")])
    for key in (WRONG_KEY, SECRET, OPERATOR_KEY):
        with pytest.raises(openai.AuthenticationError) as caught:
            ask(client.with_options(api_key=key), [])
        nowhere("an answer", str(caught.value.body))
    assert call(f"{served.url}/workers", key=WRONG_KEY)[0] == 401
    (dying,) = served.workers("decode")  # what is said of one that died, and of its successor
    dying.kill()
    dying.wait(10)
    end = time.monotonic() + SUCCESSOR_S
    while not served.workers("decode"):
        assert time.monotonic() < end
        time.sleep(0.05)
    served.wait()
    assert ask(client, [part("image", data_uri(picture(4)))])
    _, found = call(f"{served.url}/workers", key=OPERATOR_KEY)
    pages = [served.url, *(worker["url"] for worker in found["workers"])]
    assert len(pages) == 4
    for page in pages:
        for path in ("/metrics", "/health", "/ready", "/openapi.json", "/workers"):
            nowhere(f"{page}{path}", _text(f"{page}{path}"))
    processes = psutil.Process(served.process.pid)
    lines = [process.cmdline() for process in (processes, *processes.children(recursive=True))]
    assert len(lines) == 5
    nowhere("a command line", str(lines))
    logs = list((root / "logs").iterdir())
    assert len(logs) >= 4
    for log in logs:
        nowhere(log.name, log.read_text())


def _text(url: str) -> str:
    with openai.DefaultHttpxClient() as client:
        return client.get(url).text
