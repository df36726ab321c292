"""Adapters that an administrator names by a folder of the server's."""

import json
import os
from pathlib import Path
from typing import Any

from tests.adapters.hostile.build import right
from tests.rora_serve.adapter_server import Place, Rights, run, tree


def ask_import(place: Place, path: Path | str, **keys: str) -> Any:
    return place.ask("POST", "/v1/adapters", json={"name": "b", "path": str(path), **keys})


def test_a_folder_below_an_import_folder_is_imported(place: Place, tmp_path: Path) -> None:
    async def ask() -> None:
        (tmp_path / "imports" / "link").symlink_to("alpha-3")
        for path in (place.third, tmp_path / "imports" / "x" / ".." / "link"):
            (tmp_path / "imports" / "x").mkdir(exist_ok=True)
            answer = await ask_import(place, path, alias="stable")
            assert answer.status_code == 201
            assert set(answer.json()["aliases"]) == {"latest", "stable"}
        assert place.third.is_dir()

    run(ask())


def test_what_lies_elsewhere_is_not_imported_whether_it_is_there_or_not(
    place: Place, tmp_path: Path
) -> None:
    async def ask() -> None:
        outside = right(tmp_path / "outside")
        (tmp_path / "imports" / "out").symlink_to(outside)
        (tmp_path / "imports" / "circle").symlink_to("circle")
        (tmp_path / "imports-too").symlink_to(outside)
        before = tree(place.store.root)
        paths: list[Path | str] = [
            outside, tmp_path / "imports" / "out", tmp_path / "imports" / ".." / "outside",
            tmp_path / "imports-too", tmp_path / "imports" / "nothing", "/etc", "", "a\0b",
            tmp_path / "imports" / "circle", place.third / "adapter_config.json", "x" * 5000,
            os.path.relpath(outside), "owner/name",
        ]  # fmt: skip
        answers = [await ask_import(place, path) for path in paths]
        assert {(answer.status_code, answer.content) for answer in answers} == {
            (400, answers[0].content)
        }
        assert answers[0].json()["error"]["param"] == "path"
        assert tree(place.store.root) == before

    run(ask())


def test_who_may_not_manage_a_name_may_not_import_it(place: Place) -> None:
    async def ask() -> None:
        place.server.tenant = Rights(use=("b",), upload=("b",))
        assert (await ask_import(place, place.third)).status_code == 403
        place.server.tenant = Rights(manage=("b",))
        assert (await ask_import(place, place.third)).status_code == 201

    run(ask())


def test_a_body_of_an_import_is_small_and_complete(place: Place) -> None:
    async def ask() -> None:
        headers = {"content-type": "application/json"}
        for content, status, param in (
            (b"{", 400, None), (b'{"name": "b"}', 400, "path"), (b"x" * 100_000, 413, None),
            (json.dumps({"name": "b", "path": "x", "more": 1}).encode(), 400, "more"),
        ):  # fmt: skip
            answer = await place.ask("POST", "/v1/adapters", content=content, headers=headers)
            assert (answer.status_code, answer.json()["error"]["param"]) == (status, param)
        answer = await place.ask("POST", "/v1/adapters?alias=x", content=b"{}", headers=headers)
        assert answer.json()["error"]["param"] == "alias"

    run(ask())
