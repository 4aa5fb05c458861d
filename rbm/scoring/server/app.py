"""The HTTP interface."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import Receive, Scope, Send

from rbm import __version__
from rbm.errors import UserError
from rbm.scoring.server import robometer, schema, stream
from rbm.scoring.server.bodies import answer, read_compare, read_rank, read_score, refused
from rbm.scoring.server.engine import Engine
from rbm.scoring.server.guard import Guard
from rbm.scoring.server.metrics import CONTENT_TYPE
from rbm.scoring.server.page import page
from rbm.scoring.server.refusal import Refusal, internal

_BUSY = (400, 401, 408, 413, 415, 503)


def create_app(engine: Engine) -> Guard:
    """The whole application, behind its guard."""
    app = FastAPI(
        title="rbm",
        version=__version__,
        description="Progress, success and preference of robot video. Live sessions: websocket `/v1/stream`.",
        docs_url=None,  # its page loads scripts from the network
        redoc_url=None,
    )
    _errors(app)
    _status(app, engine)
    _scoring(app, engine)
    robometer.add_routes(app, engine)
    app.router.routes.append(WebSocketRoute("/v1/stream", _Streaming(engine)))
    paths = {route.path for route in app.routes if isinstance(route, Route)}
    return Guard(app, engine, paths)


class _Streaming:
    """An ASGI application: starlette would wrap a function."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await stream.serve(self.engine, scope, receive, send)


def _status(app: FastAPI, engine: Engine) -> None:
    content, headers = page()

    @app.get("/", include_in_schema=False)
    async def show_page() -> Response:
        return Response(content, media_type="text/html", headers=headers)

    @app.get("/health", response_model=schema.Health, responses={503: {"model": schema.Health}})
    async def health() -> Response:
        """Whether requests are taken: 200 if so, else 503."""
        status = engine.status
        body: dict[str, Any] = {
            "status": status,
            "ready": engine.ready_workers == len(engine.workers) and not engine.draining,
            "workers": len(engine.workers),
            "workers_ready": engine.ready_workers,
            "available_gpus": engine.ready_workers,
            "total_gpus": len(engine.workers),
            "version": __version__,
        }
        if status == "healthy":
            return JSONResponse(body)
        return JSONResponse({**body, "error": f"the server is {status}", "retry": True}, 503, {"retry-after": "2"})

    @app.get("/metrics", responses=schema.problems(401), response_class=Response)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(await engine.measured(), headers={"content-type": CONTENT_TYPE})


def _scoring(app: FastAPI, engine: Engine) -> None:
    limits = engine.limits

    @app.post(
        "/v1/score",
        response_model=schema.ScoreAnswer,
        responses=schema.good("ScoreAnswer") | schema.problems(*_BUSY),
        openapi_extra=schema.SCORE,
    )
    async def score(request: Request) -> Response:
        """Progress and success of a video, or of several clips."""
        ask = await read_score(request, limits)
        scores = await engine.score(list(zip(ask.videos, ask.tasks, strict=True)), ask.every, ask.dense)
        return answer(request, {"scores": scores})

    @app.post(
        "/v1/compare",
        response_model=schema.CompareAnswer,
        responses=schema.good("CompareAnswer") | schema.problems(*_BUSY),
        openapi_extra=schema.COMPARE,
    )
    async def compare(request: Request) -> Response:
        """Which of two attempts at a task is better."""
        ask = await read_compare(request, limits)
        p, a, b = await engine.compare(ask.videos[0], ask.videos[1], ask.tasks[0])
        return answer(request, {"p_a_better": p, "a": a, "b": b})

    @app.post(
        "/v1/rank",
        response_model=schema.RankAnswer,
        responses=schema.good("RankAnswer") | schema.problems(*_BUSY),
        openapi_extra=schema.RANK,
    )
    async def rank(request: Request) -> Response:
        """Attempts at one task, best first."""
        ask = await read_rank(request, limits)
        order, scores = await engine.rank(ask.videos, ask.tasks[0])
        return answer(request, {"order": order, "scores": scores})


def _errors(app: FastAPI) -> None:
    """Whatever goes wrong is answered with a sentence, in the client's format."""

    @app.exception_handler(UserError)
    async def user_error(request: Request, error: UserError) -> Response:
        return refused(request, error if isinstance(error, Refusal) else Refusal(str(error)))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        sentence = {
            404: f"there is nothing at {request.url.path[:100]}; /openapi.json says what there is",
            405: f"{request.method} does not work at {request.url.path[:100]}; /openapi.json says what does",
        }.get(error.status_code, str(error.detail))
        return refused(request, Refusal(sentence, error.status_code), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        places = ", ".join(".".join(str(part) for part in one["loc"]) for one in error.errors()[:5])
        return refused(request, Refusal(f"the request is not what it should be: {places}", 422))

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return refused(request, internal())  # the guard logs it
