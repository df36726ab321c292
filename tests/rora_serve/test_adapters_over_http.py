"""What the routes of adapters do, beyond the statuses that they answer with."""

import asyncio
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from adapters.errors import AdapterNotFoundError
from rora_serve.side_process import SideProcess
from tests.adapters.hostile.build import QUERY, VALUE, right
from tests.rora_serve.adapter_server import Place, Rights, make_place, run, tree


def test_an_adapter_is_shown_whole(place: Place) -> None:
    async def ask() -> None:
        place.server.quarantined[place.first.removeprefix("sha256:")] = "its probe drifted"
        shown = (await place.ask("GET", "/v1/adapters/a")).json()
        assert shown["aliases"] == {"latest": place.second}
        older, newer = shown["versions"]
        assert (older["version"], newer["version"]) == (place.first, place.second)
        assert older["quarantine"] == "its probe drifted"
        latest = place.store.resolve("a").version
        assert newer == {
            "version": place.second,
            "weights": f"sha256:{latest.weights_digest}",
            "added": latest.added,
            "num_bytes": latest.num_bytes,
            "rank": {"min": 2, "max": 3},
            "tier": "store",
            "is_pinned": False,
            "num_running_requests": 0,
            "quarantine": None,
        }
        assert [move["version"] for move in shown["history"]] == [place.first, place.second]
        assert shown["version"] == place.second
        scales = {module["name"]: module["scaling"] for module in shown["modules"]}
        assert scales == {QUERY: 1.0, VALUE: pytest.approx(2 / 3)}
        receipt = shown["receipt"]
        assert {module["name"] for module in receipt["matched"]} == {QUERY, VALUE}
        assert all(module["norm"] > 0 for module in receipt["matched"])
        assert receipt["untouched"] == ["model.layers.0.mlp.up_proj"]
        listed = (await place.ask("GET", "/v1/adapters")).json()["data"]
        assert listed == [{key: shown[key] for key in ("object", "name", "aliases", "versions")}]

    run(ask())


def test_a_version_is_chosen_by_alias_or_digest(place: Place) -> None:
    async def ask() -> None:
        path = "/v1/adapters/a"
        for wanted in (place.first, place.first[:19]):
            shown = (await place.ask("GET", path, params={"version": wanted})).json()
            assert shown["version"] == place.first
            assert shown["modules"][0]["alpha"] == 1.0
        for wanted in ("stable", "sha256:0", "", "../a"):
            answer = await place.ask("GET", path, params={"version": wanted})
            assert answer.status_code == 404
            assert answer.json()["error"]["param"] == "version"

    run(ask())


def test_a_damaged_version_is_shown_with_what_is_wrong_and_whole_once_mended(place: Place) -> None:
    async def ask() -> None:
        config = place.store.resolve("a").folder / "adapter_config.json"
        before = config.read_text()
        config.write_text("{")
        shown = (await place.ask("GET", "/v1/adapters/a")).json()
        assert shown["modules"] == []
        assert [p["code"] for p in shown["receipt"]["problems"]] == ["json-syntax"]
        config.write_text(before)
        shown = (await place.ask("GET", "/v1/adapters/a")).json()
        assert len(shown["modules"]) == 2
        # From then on it is remembered, which the control shows.
        config.write_text("{")
        assert (await place.ask("GET", "/v1/adapters/a")).json() == shown

    run(ask())


def test_only_the_last_descriptions_are_kept(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rora_serve.catalog._MAX_KEPT", 1)

    async def ask() -> None:
        async def is_whole(version: str) -> bool:
            answer = await place.ask("GET", "/v1/adapters/a", params={"version": version})
            return bool(answer.json()["modules"])

        assert await is_whole(place.first)
        assert await is_whole(place.second)
        for version in place.store.record("a").versions:
            folder = place.store.resolved("a", version).folder
            (folder / "adapter_config.json").write_text("{")
        assert await is_whole(place.second)
        assert not await is_whole(place.first)

    run(ask())


def test_an_alias_moves_for_new_requests_and_running_ones_keep_their_version(place: Place) -> None:
    async def ask() -> None:
        path = "/v1/adapters/a/aliases/stable"
        answer = await place.ask("PUT", path, json={"version": place.first})
        assert answer.json()["aliases"] == {"latest": place.second, "stable": place.first}
        old = await place.server.running("a@stable")
        answer = await place.ask("PUT", path, json={"version": "latest"})
        assert answer.json()["aliases"]["stable"] == place.second
        new = await place.server.running("a@stable")
        for served, version in ((old, place.first), (new, place.second)):
            assert f"sha256:{served.resolved.version.digest}" == version
            assert place.server.engine.held[served.lora_int_id] == served.resolved
        versions = answer.json()["versions"]
        assert [v["num_running_requests"] for v in versions] == [1, 0]
        assert [v["tier"] for v in versions] == ["slot", "host"]
        answer = await place.ask("POST", "/v1/adapters/a/rollback", json={"alias": "stable"})
        assert answer.json()["aliases"]["stable"] == place.first
        answer = await place.ask("PUT", "/v1/adapters/a/aliases/-x", json={"version": "latest"})
        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "alias")

    run(ask())


PATHS = (
    ("GET", "/v1/adapters/{}"), ("DELETE", "/v1/adapters/{}"), ("POST", "/v1/adapters/{}/load"),
    ("POST", "/v1/adapters/{}/unload"), ("POST", "/v1/adapters/{}/rollback"),
    ("PUT", "/v1/adapters/{}/pin"), ("DELETE", "/v1/adapters/{}/pin"),
    ("PUT", "/v1/adapters/{}/aliases/x"), ("GET", "/v1/models/{}"),
)  # fmt: skip


async def answers(place: Place, name: str) -> dict[tuple[str, str], tuple[int, bytes, Any]]:
    found = {}
    for method, path in PATHS:
        body = {"version": "latest"} if "aliases" in path else None
        headers = {"x-request-id": "the-same"}
        answer = await place.ask(method, path.format(name), json=body, headers=headers)
        content = answer.content.replace(f"'{name}'".encode(), b"NAME")
        found[method, path] = (answer.status_code, content, answer.headers)
    return found


def test_what_is_forbidden_answers_as_what_is_not_there(place: Place) -> None:
    """To the byte, headers too; the control is whoever may."""

    async def ask() -> None:
        missing = await answers(place, "z")
        place.server.tenant = Rights(use=("other",), manage=("other",))
        before = tree(place.store.root)
        assert await answers(place, "a") == await answers(place, "z") == missing
        assert {status for status, _, _ in missing.values()} == {404}
        assert tree(place.store.root) == before
        assert (await place.ask("GET", "/v1/adapters")).json()["data"] == []
        assert (await place.ask("GET", "/v1/models")).json()["data"] == []
        assert (await place.ask("GET", "/v1/models/base")).status_code == 404
        place.server.tenant = Rights(use=("a",), may_use_base=True)
        found = {key: status for key, (status, _, _) in (await answers(place, "a")).items()}
        seen = {("GET", "/v1/adapters/{}"), ("GET", "/v1/models/{}")}
        assert found == {key: 200 if key in seen else 404 for key in found}
        models = (await place.ask("GET", "/v1/models")).json()["data"]
        assert [card["id"] for card in models] == ["base", "a"]
        place.server.tenant = Rights(manage=("a",))
        assert [c["name"] for c in (await place.ask("GET", "/v1/adapters")).json()["data"]] == ["a"]
        assert (await place.ask("GET", "/v1/models/a")).status_code == 404
        assert (await place.ask("POST", "/v1/adapters/a/load")).status_code == 200

    run(ask())


@pytest.mark.parametrize(
    "name",
    [
        "..%2fevil", "%2e%2e%2fevil", "..", "a%00", "%00", "a%0a", "a%2f..%2fa", "%2fetc%2fpasswd",
        "\uff41", "a\u0301", "A", "a%20", "a%5c..", "..\\evil", "latest", "base", "x" * 65, "%ff",
    ],
)  # fmt: skip
def test_a_name_that_is_none_is_not_found_and_reaches_no_file(place: Place, name: str) -> None:
    async def ask() -> None:
        # What a path that climbs would find.
        shutil.copy(place.store.root / "names" / "a.json", place.store.root / "evil.json")
        before = tree(place.store.root.parent)
        found = await answers(place, name)
        if name == "base":
            assert found.pop(("GET", "/v1/models/{}"))[0] == 200
        assert {status for status, _, _ in found.values()} == {404}
        assert all(b'"error"' in content for _, content, _ in found.values())
        assert tree(place.store.root.parent) == before

    run(ask())


def test_an_adapter_that_came_with_the_bases_name_is_not_loaded(place: Place) -> None:
    async def ask() -> None:
        place.store.add(place.third, name="base")
        assert (await place.ask("POST", "/v1/adapters/base/load")).status_code == 404

    run(ask())


def test_a_record_that_grew_while_somebody_looked_is_shown(place: Place) -> None:
    """Offline changes are seen at once: nothing of a name is remembered."""

    async def ask() -> None:
        await place.ask("GET", "/v1/adapters/a")
        place.store.set_alias(f"a@{place.first}", "latest")
        assert (await place.ask("GET", "/v1/adapters/a")).json()["version"] == place.first

    run(ask())


def test_many_ask_for_the_same_receipt_at_once(tmp_path: Path) -> None:
    async def ask() -> None:
        place = make_place(tmp_path, process)
        shown = await asyncio.gather(*(place.ask("GET", "/v1/adapters/a") for _ in range(8)))
        assert len({json.dumps(answer.json()) for answer in shown}) == 1

    process = SideProcess()
    try:
        run(ask())
    finally:
        process.close()


def test_a_version_that_has_no_name_yet_can_be_opened(place: Place) -> None:
    """So that what admits an upload can ask it something."""
    opened: list[str] = []

    async def admit(resolved: Any, _: str) -> None:
        with pytest.raises(AdapterNotFoundError):
            await place.server.directory.open("new")
        served = await place.server.directory.open_version("new", resolved)
        opened.append(served.resolved.name)
        place.server.directory.close(served, was_answered=True)

    async def ask() -> None:
        place.server.admit = admit
        answer = await place.server.upload(right(place.third.with_name("new")), "new")
        assert answer.status_code == 201
        assert opened == ["new"]
        assert [v["tier"] for v in answer.json()["versions"]] == ["host"]

    run(ask())
