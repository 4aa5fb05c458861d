"""`rbm serve` as a user starts it: help, configuration, token, TLS, and what it says when it cannot start."""

from __future__ import annotations

import os
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
from running import ask, command, hello, serving
from websockets.exceptions import InvalidStatus

from rbm.scoring import wire

TASK = "open the drawer"
CLIP = {"clips": [{"frames": np.zeros((2, 8, 8, 3), np.uint8), "task": TASK}]}
TOKEN = "a long secret"


def rbm(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "rbm.cli", *arguments], capture_output=True, text=True, timeout=60)


def test_help_and_configuration():
    done = rbm("serve", "--help")
    assert done.returncode == 0
    assert "rbm serve port=9000" in done.stdout
    done = rbm("serve", "--cfg", "port=9001")
    assert done.returncode == 0
    assert "port: 9001" in done.stdout
    assert "session_seconds" in done.stdout


def refused(*overrides: str, says: str, **quoted: object) -> None:
    done = subprocess.run(command(*overrides, **quoted), capture_output=True, text=True, timeout=60)
    assert done.returncode == 2, done
    assert done.stderr.startswith("error:"), done.stderr
    assert done.stderr.count("\n") == 1
    assert says in done.stderr


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("prot=8000", "no such key"),
        ("limits.que=8", "no such key"),
        ("port=99999", "port is 99999"),
        ("port=http", "port must be a whole number"),
        ("limits.queue=0", "queue is 0"),
        ("token=", "token"),
        ("tls_cert=only.pem", "tls_key"),
    ],
)
def test_overrides_that_make_no_sense(override, says):
    refused(override, says=says)


def test_a_token(tiny, tmp_path):
    """The page and its health are for all, the rest for those who know it."""
    with serving(tmp_path / "log", checkpoint=tiny, env={**os.environ, "RBM_TOKEN": TOKEN}) as server:
        assert server.get("/health").status_code == 200
        good = {"Authorization": f"Bearer {TOKEN}"}
        for path in ("/metrics", "/model_info", "/gpu_status", "/openapi.json", "/v1/nothing"):
            done = server.get(path)
            assert (done.status_code, done.headers["www-authenticate"]) == (401, "Bearer")
            assert "Bearer TOKEN" in done.json()["error"]
            assert server.get(path, headers=good).status_code in (200, 404)
        for value in (
            "Bearer",
            "Bearer wrong",
            f"Basic {TOKEN}",
            f"Bearer {TOKEN}x",
            TOKEN,
            "Bearer ü".encode("latin-1"),
        ):
            assert server.get("/model_info", headers={"Authorization": value}).status_code == 401
        done = server.post("/v1/score", CLIP)
        assert (done.status_code, wire.unpack(done.content)["retry"]) == (401, False)
        with pytest.raises(InvalidStatus) as told:
            server.stream()
        assert told.value.response.status_code == 401
        with server.stream(additional_headers=good) as stream:
            hello(stream)
            assert "session" in ask(stream, "open", task=TASK)
        # the children need not know it
        with open(f"/proc/{server.child('worker')}/environ", "rb") as environment:
            assert TOKEN.encode() not in environment.read()


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    """Certificate and key for 127.0.0.1, signed by themselves."""
    folder = tmp_path_factory.mktemp("tls")
    cert, key = folder / "cert.pem", folder / "key.pem"
    made = "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -days 2 -subj /CN=127.0.0.1"
    files = ["-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(cert)]
    subprocess.run([*made.split(), *files], check=True, capture_output=True)
    return cert, key


def test_tls(tiny, tmp_path, certificate):
    cert, key = certificate
    trusting = ssl.create_default_context(cafile=str(cert))
    with serving(tmp_path / "log", checkpoint=tiny, tls_cert=cert, tls_key=key) as server:
        assert server.url.startswith("https://127.0.0.1:")
        assert server.get("/health", verify=trusting).status_code == 200
        done = server.post("/v1/score", CLIP, verify=trusting)
        assert len(wire.unpack(done.content)["scores"][0]["progress"]) == 2
        with server.stream(ssl=trusting) as stream:
            hello(stream)
            session = ask(stream, "open", task=TASK)["session"]
            assert "error" not in ask(stream, "push", session=session, frames=np.zeros((8, 8, 3), np.uint8))
        with pytest.raises(httpx.ConnectError):
            server.get("/health")
        with pytest.raises(httpx.TransportError):
            httpx.get("http" + server.url[5:] + "/health")


def test_tls_files_that_do_not_work(tmp_path, certificate):
    cert, key = certificate
    refused(says=str(tmp_path / "none.pem"), tls_cert=tmp_path / "none.pem", tls_key=key)
    refused(says="no certificate and its private key", tls_cert=key, tls_key=cert)
    locked = tmp_path / "locked.pem"
    subprocess.run(
        ["openssl", "ec", "-aes128", "-passout", "pass:x", "-in", str(key), "-out", str(locked)],
        check=True,
        capture_output=True,
    )
    refused(says="without a password", tls_cert=cert, tls_key=locked)


def test_the_front_is_there_before_the_model(tiny):
    """It listens at once, and says until then that it starts."""
    process = subprocess.Popen(command(checkpoint=tiny), stdout=subprocess.DEVNULL)
    began = time.monotonic()
    try:
        port = None
        while port is None and time.monotonic() - began < 20:
            time.sleep(0.02)
            port = _listening(process.pid)
        assert port is not None
        said = httpx.get(f"http://127.0.0.1:{port}/health", timeout=10)
        assert said.json()["status"] in ("starting", "healthy")
        assert (said.status_code == 200) == (said.json()["status"] == "healthy")
        if said.status_code == 503:
            done = httpx.post(
                f"http://127.0.0.1:{port}/v1/score",
                content=wire.pack(CLIP),
                headers={"content-type": "application/msgpack"},
                timeout=10,
            )
            assert done.status_code in (200, 503)
    finally:
        process.terminate()
        assert process.wait(20) == 0


def _listening(pid: int) -> int | None:
    """The port at which a process listens."""
    try:
        inodes = {os.readlink(f"/proc/{pid}/fd/{name}") for name in os.listdir(f"/proc/{pid}/fd")}
        rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    except OSError:
        return None
    ports = [int(row[1].split(":")[1], 16) for row in rows if row[3] == "0A" and f"socket:[{row[9]}]" in inodes]
    return ports[0] if ports else None


def test_a_server_for_everybody_warns(tiny, tmp_path):
    with serving(tmp_path / "log", "host=0.0.0.0", checkpoint=tiny) as server:
        assert "everybody who reaches" in server.log.read_text()
    with serving(tmp_path / "log", checkpoint=tiny) as server:
        assert server.log.read_text() == ""


def test_the_front_imports_no_torch():
    code = (
        "import sys, rbm.scoring.server.run, rbm.scoring.server.cli; print('torch' in sys.modules, 'av' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"
