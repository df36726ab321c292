"""Schemathesis asks what the OpenAPI document allows, and what it does not.

No answer may be a fault, or one that is not declared: neither its status nor its headers nor its
body.
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from adapters.errors import AdapterNotFoundError
from rora_serve.api.asgi import App, Message, Receive, Scope, Send
from rora_serve.api.openapi import openapi_document
from rora_serve.side_process import SideProcess
from tests.rora_serve.adapter_server import Place, make_place
from tests.rora_serve.reaching import listening

CONFIG = Path(__file__).with_name("schemathesis.toml")
SHOW = "GET /v1/adapters/{name}"


@pytest.fixture
def place(tmp_path: Path, process: SideProcess) -> Place:
    return make_place(tmp_path, process)


@pytest.fixture
def process() -> Iterator[SideProcess]:
    """Of one test alone, since the loop that asks it is."""
    process = SideProcess()
    yield process
    process.close()


def ask(
    url: str, *options: str, folder: Path, config: Path = CONFIG
) -> subprocess.CompletedProcess[str]:
    """Run it over the document at `url`.

    Args: folder: into which it writes what failed.
    """
    command = ["-m", "schemathesis.cli", "--config-file", str(config), "run", "--no-color"]
    return subprocess.run(
        [sys.executable, *command, *options, url], cwd=folder,
        capture_output=True, encoding="utf-8", errors="replace", timeout=240, check=False,
    )  # fmt: skip


def test_what_nobody_has_stored_is_answered_as_declared(place: Place, tmp_path: Path) -> None:
    with listening(place.server.app) as url:
        found = ask(f"{url}/openapi.json", "--max-examples", "20", folder=tmp_path)
    assert found.returncode == 0, found.stdout + found.stderr


def test_an_adapter_that_is_there_is_answered_for_as_declared(place: Place, tmp_path: Path) -> None:
    """Whatever was done to it before: it comes back when it is removed."""
    config = tmp_path / "config.toml"
    config.write_text('parameters = { "path.name" = "a" }\n' + CONFIG.read_text())
    done: set[str] = set()
    with listening(_keeping_a(place, done)) as url:
        options = ("--max-examples", "20", "--exclude-checks", "use_after_free")
        found = ask(f"{url}/openapi.json", *options, folder=tmp_path, config=config)
    assert found.returncode == 0, found.stdout + found.stderr
    path = "/v1/adapters/a"
    asked = ("load", "unload", "pin")
    assert done >= {f"GET {path}", f"DELETE {path}", *(f"{path}/{what}" for what in asked)}


def _keeping_a(place: Place, done: set[str]) -> App:
    """Return an app in which there always is an adapter "a"; what it does goes into `done`."""

    def keep() -> None:
        try:
            place.store.record("a")
        except AdapterNotFoundError:
            place.store.add(place.third, name="a")

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def note(message: Message) -> None:
            if message.get("status") == 200:
                done.update({f"{scope['method']} {scope['path']}", scope["path"]})
            await send(message)

        await asyncio.to_thread(keep)
        await place.server.app(scope, receive, note)

    return app


def test_a_status_that_is_not_declared_is_found(place: Place, tmp_path: Path) -> None:
    """The control of the tests above."""
    document = openapi_document(place.server.routes)
    del document["paths"]["/v1/adapters/{name}"]["get"]["responses"]["404"]
    path = tmp_path / "document.json"
    path.write_text(json.dumps(document))
    with listening(place.server.app) as url:
        options = ("--url", url, "--phases", "coverage", "--include-name", SHOW)
        found = ask(str(path), *options, folder=tmp_path)
    assert found.returncode == 1
    assert "Undocumented status code" in found.stdout
