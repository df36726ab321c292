"""What another process changes in the store is seen by the next request: nothing is kept of it."""

import asyncio
import subprocess
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from fastapi import Request

from rora_serve.api.front_door import current_adapter
from tests.rora_serve.adapter_server import Place, run


def make_answer(place: Place) -> None:
    """Give the server a route that tells which version a request for a model was given."""

    async def tell(_: Request) -> dict[str, Any]:
        adapter = current_adapter.get()
        return {"version": adapter and f"sha256:{adapter.resolved.version.digest}"}

    place.server.app.add_api_route("/v1/chat/completions", tell, methods=["POST"])


async def change(place: Place, *arguments: str) -> None:
    """Run `rora-adapters store`, as an operator does beside the server."""
    command = [str(Path(sys.executable).with_name("rora-adapters")), "store", *arguments]
    command += ["--store", str(place.store.root)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True, timeout=60)


def ways_to_see(place: Place) -> dict[str, Callable[[str], Awaitable[Any]]]:
    """Return every way in which a client finds out which version a name means."""

    async def ask(method: str, path: str, **options: Any) -> Any:
        return (await place.ask(method, path, **options)).json()

    async def served(name: str) -> Any:
        return (await ask("POST", "/v1/chat/completions", json={"model": name}))["version"]

    async def model(name: str) -> Any:
        return (await ask("GET", f"/v1/models/{name}"))["version"]

    async def models(name: str) -> Any:
        listed = (await ask("GET", "/v1/models"))["data"]
        return next((card["version"] for card in listed if card["id"] == name), None)

    async def adapter(name: str) -> Any:
        return (await ask("GET", f"/v1/adapters/{name}"))["aliases"]["latest"]

    async def adapters(name: str) -> Any:
        listed = (await ask("GET", "/v1/adapters"))["data"]
        found = (card["aliases"]["latest"] for card in listed if card["name"] == name)
        return next(found, None)

    return {way.__name__: way for way in (served, model, models, adapter, adapters)}


def test_an_alias_that_moves_in_another_process_is_seen_by_the_next_request(place: Place) -> None:
    make_answer(place)
    ways = ways_to_see(place)

    async def seen(name: str) -> dict[str, Any]:
        return {way: await find(name) for way, find in ways.items()}

    async def ask() -> None:
        # Each is asked before, so that what is kept of an answer would show.
        assert await seen("a") == dict.fromkeys(ways, place.second)
        await change(place, "alias", f"a@{place.first}", "latest")
        assert await seen("a") == dict.fromkeys(ways, place.first)
        await change(place, "rollback", "a")
        assert await seen("a") == dict.fromkeys(ways, place.second)
        await change(place, "add", str(place.third), "--name", "a")
        third = f"sha256:{place.store.resolve('a').version.digest}"
        assert third not in (place.first, place.second)
        assert await seen("a") == dict.fromkeys(ways, third)

    run(ask())


def test_a_name_that_comes_and_goes_in_another_process_is_seen(place: Place) -> None:
    make_answer(place)
    ways = ways_to_see(place)

    async def ask() -> None:
        assert await ways["models"]("new") is await ways["adapters"]("new") is None
        assert (await place.ask("GET", "/v1/models/new")).status_code == 404
        await change(place, "add", str(place.third), "--name", "new")
        version = f"sha256:{place.store.resolve('new').version.digest}"
        for find in ways.values():
            assert await find("new") == version
        await change(place, "remove", "new", "--force")
        assert await ways["models"]("new") is await ways["adapters"]("new") is None
        answer = await place.ask("POST", "/v1/chat/completions", json={"model": "new"})
        assert answer.status_code == 404

    run(ask())
