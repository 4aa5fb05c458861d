"""Why a request is not served: a sentence, a status, and whether to come back."""

from __future__ import annotations

from typing import Any

from rbm.errors import UserError

BAD_REQUEST = "bad_request"
UNKNOWN_SESSION = "unknown_session"
QUEUE_FULL = "queue_full"
SESSION_LOST = "session_lost"
DRAINING = "draining"
POOL_FULL = "pool_full"
INTERNAL = "internal"


class Refusal(UserError):
    """A request that is not served.

    Attributes:
        status: of HTTP.
        code: of a websocket's error, one of the names above.
        retry_after: seconds until it may work; none: not without a change.
    """

    def __init__(
        self, sentence: str, status: int = 400, code: str = BAD_REQUEST, retry_after: float | None = None
    ) -> None:
        super().__init__(sentence)
        self.status, self.code, self.retry_after = status, code, retry_after

    @property
    def retry(self) -> bool:
        return self.retry_after is not None

    def fields(self) -> dict[str, Any]:
        """As it goes from a child to the front; `from_fields` reads it."""
        return {"error": str(self), "status": self.status, "code": self.code, "retry_after": self.retry_after}

    @classmethod
    def from_fields(cls, fields: dict[str, Any]) -> Refusal:
        return cls(fields["error"], fields["status"], fields["code"], fields["retry_after"])


def busy(sentence: str, code: str = QUEUE_FULL, retry_after: float = 1.0) -> Refusal:
    """503: the same request may work a little later."""
    return Refusal(sentence, 503, code, retry_after)


def internal() -> Refusal:
    """What is our fault: the log has the traceback, the client a sentence."""
    return Refusal("an error in the server, which its log describes; report it", 500, INTERNAL)
