"""A real S3 server for the tests of this folder."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from s3_server import S3, serve_s3

from rbm.corpus import retry


@pytest.fixture(scope="session")
def s3_process() -> Iterator[S3]:
    with serve_s3() as server:
        yield server


@pytest.fixture
def s3(s3_process: S3, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[S3]:
    """The server, and an environment that points to it; short pauses, and an empty cache of indexes."""
    for name in ("PROFILE", "SESSION_TOKEN", "NO_SIGN_REQUEST", "SKIP_SIGNATURE", "ENDPOINT_URL_S3", "DEFAULT_REGION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)
    settings = {
        "AWS_ENDPOINT_URL": s3_process.url,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "tester",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
        "AWS_SHARED_CREDENTIALS_FILE": str(tmp_path / "none"),
        "RBM_STORAGE_TRIES": "5",
        "RBM_STORAGE_TIMEOUT": "20",
        "RBM_CACHE": str(tmp_path / "cache"),
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(retry, "_FIRST_PAUSE", 0.05)
    yield s3_process
    s3_process.proxy.forget()
