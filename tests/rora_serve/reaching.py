"""Reaching an app: in this process, or over HTTP, as clients that people use do."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import uvicorn
from fastapi import FastAPI

from rora_serve.api.asgi import App

_START_SECONDS = 30
_STOP_SECONDS = 30


def client_of(app: FastAPI) -> httpx.AsyncClient:
    """Return a client of an app, without a network between them."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://server")


@contextmanager
def listening(app: App) -> Iterator[str]:
    """Serve an app from a thread of its own; yields its URL."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        config = uvicorn.Config(app, log_level="warning", lifespan="off", ws="none")
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [sock]})
        thread.start()
        deadline = time.monotonic() + _START_SECONDS
        while not server.started:
            assert thread.is_alive()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        try:
            yield f"http://127.0.0.1:{sock.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(_STOP_SECONDS)
            assert not thread.is_alive()
