"""What Prometheus reads at `/metrics`."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from rbm.scoring.server.pipes import Fields

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """Counters of one server. Kinds: paths of HTTP (`other` for those that there are not), and `ws:` with the op."""

    def __init__(self) -> None:
        self.registry = own = CollectorRegistry()
        self.requests = Counter("rbm_requests", "Answered requests.", ["kind", "status"], registry=own)
        self.seconds = Histogram(
            "rbm_request_seconds", "From request to answer.", ["kind"], buckets=_SECONDS, registry=own
        )
        sizes = [1 << i for i in range(11)]
        self.batch = Histogram(
            "rbm_batch_requests", "Requests that a worker answered together.", buckets=sizes, registry=own
        )
        self.busy = Counter("rbm_worker_busy_seconds", "Time that a worker spent on answers.", ["worker"], registry=own)
        self.frames = Counter("rbm_frames_scored", "Frames that were scored.", ["kind"], registry=own)
        self.restarts = Counter(
            "rbm_restarts", "Processes that died and were started again.", ["process"], registry=own
        )
        self.waiting = Gauge("rbm_waiting_requests", "Requests that are not answered yet.", registry=own)
        self.pending = Gauge("rbm_pending_bytes", "Bytes of requests that are held.", registry=own)
        self.connections = Gauge("rbm_websockets", "Open websockets.", registry=own)
        self.sessions = Gauge("rbm_sessions", "Open sessions by what they hold.", ["worker", "state"], registry=own)
        self.session_bytes = Gauge("rbm_session_bytes", "What open sessions hold.", ["worker"], registry=own)
        self.evictions = Gauge(
            "rbm_session_evictions", "Sessions that lost keys or features.", ["worker"], registry=own
        )
        self.ready = Gauge("rbm_workers_ready", "Workers that take requests.", registry=own)

    def answered(self, kind: str, status: str, seconds: float) -> None:
        self.requests.labels(kind, status).inc()
        self.seconds.labels(kind).observe(seconds)

    def worked(self, worker: str, message: Fields) -> None:
        """A worker answered a batch."""
        if message["batch"]:  # else a piece of a long one
            self.batch.observe(message["batch"])
        self.busy.labels(worker).inc(message["busy"])

    def held(self, worker: str, stats: Fields) -> None:
        """What `SessionPool.stats` of a worker says."""
        for state in ("hot", "warm", "cold"):
            self.sessions.labels(worker, state).set(stats[state])
        self.session_bytes.labels(worker).set(stats["bytes"])
        self.evictions.labels(worker).set(stats["evictions"])

    def text(self) -> bytes:
        return generate_latest(self.registry)
