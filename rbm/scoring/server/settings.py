"""What `conf/serve.yaml` says, checked."""

from __future__ import annotations

import os
from dataclasses import dataclass, field, fields
from typing import Any

from rbm.errors import UserError
from rbm.scoring.server.limits import Limits, check_numbers


@dataclass(frozen=True)
class Settings:
    """How the server runs; `conf/serve.yaml` says what each is for.

    Raises:
        UserError: a value that makes no sense.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    checkpoint: str | None = None
    device: str = "auto"
    dtype: str | None = None
    workers: int = 1
    threads: int | None = None
    batch: int = 64
    wait_ms: float = 0.0
    token: str | None = None
    tls_cert: str | None = None
    tls_key: str | None = None
    drain_seconds: float = 30.0
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_numbers(self, {"port": (0, 65535), "wait_ms": (0, 60_000), "drain_seconds": (0, 86_400)})
        if self.token is not None and not (self.token.isascii() and self.token.isprintable() and self.token.strip()):
            raise UserError("token must be printable ASCII characters, such as what `openssl rand -hex 16` prints")
        if (self.tls_cert is None) != (self.tls_key is None):
            raise UserError("TLS needs both files: tls_cert=CERTIFICATE.pem tls_key=KEY.pem")

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Settings:
        """Of the plain configuration; a missing token is taken from RBM_TOKEN.

        Raises:
            UserError: a value that makes no sense.
        """
        known = {item.name for item in fields(cls)}
        values = {name: value for name, value in config.items() if name in known}
        token = os.environ.get("RBM_TOKEN") if config.get("token") is None else str(config["token"])
        for name in ("checkpoint", "tls_cert", "tls_key"):
            values[name] = None if config.get(name) is None else str(config[name])
        return cls(**{**values, "host": str(config["host"]), "token": token, "limits": Limits(**config["limits"])})

    @property
    def torch_threads(self) -> int:
        """Of each worker: as told, else the cores shared out among the workers."""
        return self.threads or max(1, (os.cpu_count() or 1) // self.workers)
