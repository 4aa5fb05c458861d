"""The client of a scoring server (`rbm serve`): scores for clips, and live sessions, over the network.

    from rbm.scoring.client import Client

    with Client("http://127.0.0.1:8000") as client:
        scores = client.score("attempt.mp4", "open the drawer")
        with client.stream("open the drawer") as session:
            for frame in camera:
                print(session.push(frame).progress)

Needs numpy, msgpack, httpx and websockets, nothing else: a robot's computer needs no torch. `AsyncClient` has the same
methods as coroutines.
"""

from rbm.scoring.client.asynchronous import AsyncClient
from rbm.scoring.client.blocking import Client, RemoteSession
from rbm.scoring.client.errors import ClientError, RequestRefused, ServerTimeout, ServerUnavailable, SessionLost
from rbm.scoring.client.sessions import AsyncRemoteSession

__all__ = [
    "AsyncClient",
    "AsyncRemoteSession",
    "Client",
    "ClientError",
    "RemoteSession",
    "RequestRefused",
    "ServerTimeout",
    "ServerUnavailable",
    "SessionLost",
]
