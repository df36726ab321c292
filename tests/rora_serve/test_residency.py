"""What is in memory by request, and that what is removed leaves nothing in it."""

import asyncio
import shutil
import time
from contextlib import suppress
from pathlib import Path

import httpx
import pytest

from adapters.errors import AdapterMismatchError
from rora_serve.side_process import SideProcess
from tests.rora_serve.adapter_server import Place, make_place, run
from tests.rora_serve.reaching import listening


def test_load_pin_unpin_and_unload_move_it_between_the_tiers(place: Place) -> None:
    async def ask() -> None:
        engine = place.server.engine

        async def tiers(method: str, path: str) -> list[tuple[str, bool]]:
            answer = await place.ask(method, f"/v1/adapters/a/{path}")
            assert answer.status_code == 200
            return [(v["tier"], v["is_pinned"]) for v in answer.json()["versions"]]

        assert await tiers("POST", "load") == [("store", False), ("host", False)]
        assert await tiers("PUT", f"pin?version={place.first}") == [("slot", True), ("host", False)]
        assert await tiers("DELETE", "pin?version=latest") == [("slot", True), ("host", False)]
        assert len(engine.held) == 2
        assert list((place.store.root / "leases").iterdir())
        assert await tiers("POST", "unload") == [("store", False)] * 2
        assert engine.held == {}
        assert list((place.store.root / "leases").iterdir()) == []
        assert place.server.directory.tier.num_bytes == 0
        assert await tiers("PUT", "pin") == [("store", False), ("slot", True)]
        assert await tiers("DELETE", "pin") == [("store", False), ("host", False)]

    run(ask())


def test_an_alias_moves_to_what_the_engine_has_and_stays_where_that_is_refused(
    place: Place,
) -> None:
    async def ask() -> None:
        engine, path = place.server.engine, "/v1/adapters/a"
        before = dict(place.store.record("a").aliases)
        stable = {"version": place.first}
        for method, route, body in (
            ("PUT", f"{path}/aliases/latest", stable),
            ("PUT", f"{path}/aliases/stable", stable),
            ("POST", f"{path}/rollback", None),
        ):
            engine.errors.append(AdapterMismatchError("no such layer"))
            answer = await place.ask(method, route, json=body)
            assert (answer.status_code, engine.held) == (422, {}), answer.text
            assert "no such layer" in answer.json()["error"]["message"]
            assert dict(place.store.record("a").aliases) == before
        for method, route, body in (
            ("PUT", f"{path}/aliases/stable", stable),
            ("POST", f"{path}/rollback", None),
        ):
            answer = await place.ask(method, route, json=body)
            assert answer.status_code == 200
            held = [f"sha256:{resolved.version.digest}" for resolved in engine.held.values()]
            assert held == [place.first]
            # Nothing keeps it there: it makes room like others.
            assert (await place.ask("POST", f"{path}/unload")).status_code == 200
            assert engine.held == {}
        aliases = place.store.record("a").aliases
        assert {f"sha256:{digest}" for digest in aliases.values()} == {place.first}

    run(ask())


@pytest.mark.parametrize(
    ("method", "route"), [("PUT", "aliases/latest"), ("POST", "rollback")], ids=["move", "rollback"]
)
def test_what_was_moved_meanwhile_stays_where_it_is(place: Place, method: str, route: str) -> None:
    async def ask() -> None:
        engine, body = place.server.engine, {"version": place.first}
        engine.is_held_up = True
        move = asyncio.create_task(
            place.ask(method, f"/v1/adapters/a/{route}", json=body if method == "PUT" else None)
        )
        while not engine.num_loads:
            await asyncio.sleep(0.01)
        assert f"sha256:{place.store.resolve('a').version.digest}" == place.second
        newest = place.store.add(place.third, name="a")
        engine.is_held_up = False
        answer = await move
        assert (answer.status_code, answer.json()["error"]["code"]) == (409, "alias_moved")
        assert place.store.resolve("a").version == newest.version
        # To say the same twice is no conflict.
        for _ in range(2):
            again = await place.ask("PUT", "/v1/adapters/a/aliases/latest", json=body)
            assert again.status_code == 200

    run(ask())


def test_two_rollbacks_at_once_go_back_once(place: Place) -> None:
    async def ask() -> None:
        place.store.add(place.third, name="a")
        place.server.engine.is_held_up = True
        both = [asyncio.create_task(place.ask("POST", "/v1/adapters/a/rollback")) for _ in range(2)]
        while place.server.directory.num_running("a", place.store.record("a").versions) < 2:
            await asyncio.sleep(0.01)
        place.server.engine.is_held_up = False
        assert sorted(answer.status_code for answer in await asyncio.gather(*both)) == [200, 409]
        assert f"sha256:{place.store.resolve('a').version.digest}" == place.second

    run(ask())


def test_a_rollback_whose_client_is_gone_does_not_happen(tmp_path: Path) -> None:
    """It would be asked again, and go back twice."""
    process = SideProcess()
    place = make_place(tmp_path, process)
    engine = place.server.engine
    with listening(place.server.app) as url:
        engine.is_held_up = True
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/v1/adapters/a/rollback", timeout=0.5)
        assert engine.num_loads == 1
        engine.is_held_up = False
        while place.server.directory.num_running("a", place.store.record("a").versions):
            time.sleep(0.01)
        assert len(engine.held) == 1
        assert f"sha256:{place.store.resolve('a').version.digest}" == place.second
        assert httpx.post(f"{url}/v1/adapters/a/rollback", timeout=30).status_code == 200
    assert f"sha256:{place.store.resolve('a').version.digest}" == place.first
    process.close()


def test_a_move_that_waits_as_the_engine_dies_is_told_so(place: Place) -> None:
    async def ask() -> None:
        place.server.lifetime.watch(lambda: None, within=60)
        place.server.engine.is_held_up = True
        move = asyncio.create_task(place.ask("POST", "/v1/adapters/a/rollback"))
        while not place.server.engine.num_loads:
            await asyncio.sleep(0.01)
        place.server.is_alive = False
        answer = await move
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_died")
        assert f"sha256:{place.store.resolve('a').version.digest}" == place.second

    run(ask())


def test_a_version_whose_files_are_gone_is_not_told_as_the_first_one(place: Place) -> None:
    shutil.rmtree(place.store.resolve(f"a@{place.first}").folder)

    async def ask() -> None:
        answer = await place.ask("POST", "/v1/adapters/a/rollback")
        assert (answer.status_code, answer.json()["error"]["code"]) == (404, "adapter_not_found")

    run(ask())


def test_a_pin_of_a_name_that_was_removed_beside_the_server_can_end(place: Place) -> None:
    async def ask() -> None:
        tier = place.server.directory.tier
        weights = place.store.resolve("a").version.weights_digest
        assert (await place.ask("PUT", "/v1/adapters/a/pin")).status_code == 200
        place.store.remove("a", force=True, besides=place.server.directory.leases())
        assert tier.tier_of(weights) == "slot"
        assert (await place.ask("DELETE", "/v1/adapters/a/pin")).status_code == 404
        assert tier.tier_of(weights) == "host"

    run(ask())


def test_an_unload_waits_for_running_requests_and_says_how_many_are_left(place: Place) -> None:
    async def ask() -> None:
        served = [await place.server.running("a") for _ in range(2)]
        answer = await place.ask("POST", "/v1/adapters/a/unload")
        assert answer.status_code == 409
        assert "2 requests use it" in answer.json()["error"]["message"]
        assert len(place.server.engine.held) == 1
        unload = asyncio.create_task(place.ask("POST", "/v1/adapters/a/unload"))
        await asyncio.sleep(0.01)
        for each in served:
            place.server.directory.close(each, was_answered=True)
        assert (await unload).status_code == 200
        assert place.server.engine.held == {}

    run(ask())


def test_a_name_goes_with_its_files_and_memory(place: Place) -> None:
    async def ask() -> None:
        await place.ask("POST", "/v1/adapters/a/load")
        assert len(list((place.store.root / "objects").iterdir())) == 2
        answer = await place.ask("DELETE", "/v1/adapters/a")
        assert answer.json() == {"id": "a", "object": "adapter", "deleted": True}
        assert (await place.ask("GET", "/v1/adapters/a")).status_code == 404
        assert place.server.engine.held == {}
        assert list((place.store.root / "objects").iterdir()) == []

    run(ask())


def test_what_aliases_or_requests_need_goes_only_by_force_and_they_end_on_it(place: Place) -> None:
    async def ask() -> None:
        path = f"/v1/adapters/a@{place.second}"
        answer = await place.ask("DELETE", path)
        assert answer.status_code == 409
        assert "is what latest means" in answer.json()["error"]["message"]
        served = await place.server.running("a")
        answer = await place.ask("DELETE", path)
        assert "1 requests use it" in answer.json()["error"]["message"]
        assert (await place.ask("DELETE", path, params={"force": "true"})).status_code == 200
        shown = (await place.ask("GET", "/v1/adapters/a")).json()
        assert shown["aliases"] == {"latest": place.first}
        assert place.server.engine.held[served.lora_int_id] == served.resolved
        assert served.resolved.folder.is_dir()
        place.server.directory.close(served, was_answered=True)
        async with asyncio.timeout(5):
            while served.resolved.folder.exists():
                await asyncio.sleep(0.01)
        assert place.server.engine.held == {}
        answer = await place.ask("DELETE", f"/v1/adapters/a@{place.first}?force=true")
        assert answer.status_code == 409
        assert "its last version" in answer.json()["error"]["message"]

    run(ask())


def test_an_upload_is_tried_out_before_it_has_a_name(place: Place) -> None:
    """The engine's refusal leaves no name, no file and nothing in memory."""

    async def ask() -> None:
        place.server.admit = place.server.residents.try_out
        objects = place.store.root / "objects"
        before = set(objects.iterdir())
        place.server.engine.errors.append(AdapterMismatchError("no such layer"))
        answer = await place.server.upload(place.third, "b")
        assert answer.status_code == 422
        assert "no such layer" in answer.json()["error"]["message"]
        assert (await place.ask("GET", "/v1/adapters/b")).status_code == 404
        assert (set(objects.iterdir()), place.server.engine.held) == (before, {})
        answer = await place.server.upload(place.third, "b")
        assert [version["tier"] for version in answer.json()["versions"]] == ["host"]

    run(ask())


def test_what_is_refused_takes_nothing_from_requests_on_the_same_weights(place: Place) -> None:
    async def ask() -> None:
        place.server.admit = place.server.residents.try_out
        served = await place.server.running("a")
        objects = place.store.root / "objects"
        before = set(objects.iterdir())
        folder = place.third.with_name("alpha-2")
        (folder / "chat_template.jinja").write_text("{{ a ** b }}")
        answer = await place.server.upload(folder, "b")
        assert answer.status_code == 422
        assert "template is not served: 'a' is undefined" in answer.json()["error"]["message"]
        assert set(objects.iterdir()) == before
        assert place.server.engine.held == {served.lora_int_id: served.resolved}

    run(ask())


def _let_nobody_lock(root: Path) -> None:
    """Make a store what it is where it is mounted to be read."""
    lock = root / ".lock"
    while not lock.is_dir():
        lock.unlink()
        with suppress(FileExistsError):  # a thread of the server's made it anew in between
            lock.mkdir()


def test_what_could_not_be_freed_is_logged_and_was_removed(
    place: Place, caplog: pytest.LogCaptureFixture
) -> None:
    async def ask() -> None:
        served = await place.server.running("a")
        await place.ask("DELETE", "/v1/adapters/a?force=true")
        _let_nobody_lock(place.store.root)
        place.server.directory.close(served, was_answered=True)
        async with asyncio.timeout(5):
            while f"freeing {place.second}" not in caplog.text:
                await asyncio.sleep(0.01)
        assert not place.server.engine.held
        assert (await place.ask("GET", "/v1/adapters/a")).status_code == 404

    run(ask())


def test_an_alias_is_taken_away_by_its_name(place: Place) -> None:
    async def ask() -> None:
        await place.ask("PUT", "/v1/adapters/a/aliases/stable", json={"version": "latest"})
        assert (await place.ask("DELETE", "/v1/adapters/a")).status_code == 409
        assert (await place.ask("DELETE", "/v1/adapters/a@stable")).status_code == 200
        shown = (await place.ask("GET", "/v1/adapters/a")).json()
        assert (list(shown["aliases"]), len(shown["versions"])) == (["latest"], 2)

    run(ask())


def test_names_that_share_weights_do_not_take_them_from_each_other(place: Place) -> None:
    """Each name's pins, requests and files are its own."""

    async def ask() -> None:
        place.store.add(place.third.with_name("alpha-2"), name="b")
        await place.ask("PUT", "/v1/adapters/b/pin")
        for path, expected in (("unload", 200), ("load", 200), ("unload", 200)):
            answer = await place.ask("POST", f"/v1/adapters/a/{path}")
            assert answer.status_code == expected
            assert [v["tier"] for v in answer.json()["versions"]] == ["store", "slot"]
        served = await place.server.running("b")
        assert (await place.ask("DELETE", "/v1/adapters/a")).status_code == 200
        shown = (await place.ask("GET", "/v1/adapters/b")).json()
        assert shown["versions"][0]["is_pinned"]
        assert shown["versions"][0]["num_running_requests"] == 1
        assert place.server.engine.held[served.lora_int_id] == served.resolved
        assert served.resolved.folder.is_dir()

    run(ask())


def test_another_servers_lease_stands_against_a_removal(place: Place) -> None:
    async def ask() -> None:
        with place.store.lease(place.store.resolve("a")):
            answer = await place.ask("DELETE", "/v1/adapters/a")
            assert answer.status_code == 409
            assert "in use by a running server" in answer.json()["error"]["message"]
        assert (await place.ask("DELETE", "/v1/adapters/a")).status_code == 200

    run(ask())
