"""An app behind the front door that tells what reaches it, and tenants with keys."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
from fastapi import FastAPI, HTTPException, Request

from adapters import AdapterStore, ResolvedVersion
from rora_serve.api.front_door import FrontDoor
from rora_serve.api.reception import RECEPTION_STATE, Reception
from rora_serve.key_file import KeyFile
from rora_serve.lifetime import Lifetime
from rora_serve.models import ModelDirectory, ServedBase
from rora_serve.tenants import key_digest, new_key
from tests.rora_serve.adapter_server import make_reception
from tests.rora_serve.reaching import client_of

OPERATOR, ACME, TIRED = new_key(), new_key(), new_key()
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/tokenize", "/detokenize")


def write_keys(path: Path) -> KeyFile:
    """Write a key file: of an operator, and tenants with few rights and few requests."""

    def hashed(key: str) -> str:
        return f'keys = ["sha256:{key_digest(key).hex()}"]'

    path.write_text(
        f'[tenants.operator]\n{hashed(OPERATOR)}\nuse = ["*"]\nmanage = ["*"]\n'
        f'[tenants.acme]\n{hashed(ACME)}\nuse = ["acme-*"]\nbase = false\nmax_tokens = 7\n'
        f"[tenants.tired]\n{hashed(TIRED)}\nrequests_per_minute = 1\n"
    )
    path.chmod(0o600)
    return KeyFile(path, cache_secret=b"secret")


class Engine:
    async def load(self, _: int, resolved: ResolvedVersion) -> int:
        return resolved.version.num_bytes

    async def drop(self, _: int) -> None: ...


class Server:
    """An app behind the front door that tells what reaches it, and can be held up."""

    def __init__(
        self, store: AdapterStore, keys: KeyFile | None = None, *, places: int = 8
    ) -> None:
        base = ServedBase(("base",), "", None)
        directory = ModelDirectory(base, store, Engine(), capacity=1_000_000)
        self.is_alive, self.fails = True, False
        self.lifetime = Lifetime(lambda: self.is_alive)
        self.reception: Reception = make_reception(
            directory, self.lifetime, keys=keys, max_in_flight=places
        )
        self.gate = asyncio.Event()
        self.gate.set()
        self.num_inside = 0
        app = FastAPI()

        async def see(request: Request) -> dict[str, Any]:
            self.num_inside += 1
            await self.gate.wait()
            if self.fails or not self.is_alive:
                raise HTTPException(500, "EngineCore encountered an issue.")
            return {"body": await request.json(), "headers": dict(request.headers)}

        async def read() -> dict[str, Any]:
            return {}

        for path in ROUTES:
            app.add_api_route(path, see, methods=["POST"])
        for path in ("/health", "/metrics", "/v1/models"):
            app.add_api_route(path, read, methods=["GET"])
        app.add_api_route("/v1/adapters", read, methods=["POST"])
        app.add_middleware(FrontDoor)
        setattr(app.state, RECEPTION_STATE, self.reception)
        self.app = app

    async def ask(
        self,
        model: str = "base",
        *,
        key: str | None = None,
        path: str = "/v1/completions",
        headers: Sequence[tuple[str, str]] = (),
        **body: Any,
    ) -> httpx.Response:
        given = [*headers, *([("authorization", f"Bearer {key}")] if key else [])]
        async with client_of(self.app) as client:
            return await client.post(path, json={"model": model, **body}, headers=given)

    async def get(self, path: str, key: str | None = None) -> int:
        headers = {"authorization": f"Bearer {key}"} if key else {}
        async with client_of(self.app) as client:
            return (await client.get(path, headers=headers)).status_code
