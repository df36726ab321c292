"""What is sent is taken whole or leaves nothing."""

import asyncio
import gzip
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from adapters import ResolvedVersion, open_artifact
from adapters.errors import AdapterMismatchError
from rora_serve.api.front_door import FrontDoor
from rora_serve.side_process import SideProcess
from tests.adapters.hostile.build import (
    change_keys,
    change_tensors,
    factor,
    right,
    right_files,
    write_tar,
    write_zip,
)
from tests.rora_serve.adapter_server import (
    BOUNDARY,
    MAX_UPLOAD_BYTES,
    Place,
    Rights,
    form,
    form_headers,
    make_place,
    pieces,
    run,
    tree,
)

TAR = {"content-type": "application/x-tar"}


def test_a_form_becomes_a_version_that_answers_at_its_location(place: Place) -> None:
    async def ask() -> None:
        (place.third / "README.md").write_text("what it is")
        answer = await place.server.upload(place.third, "a", alias="canary")
        assert answer.status_code == 201
        shown = answer.json()
        third = f"sha256:{place.store.resolve('a@canary').version.digest}"
        assert shown["version"] == shown["aliases"]["canary"] == third
        assert shown["aliases"]["latest"] == place.second
        assert answer.headers["location"] == f"/v1/adapters/a?version={third}"
        assert (await place.ask("GET", answer.headers["location"])).json() == shown
        folder = place.store.resolve("a@canary").folder
        assert tree(folder) == tree(place.third)
        assert list((place.store.root / "incoming").iterdir()) == []
        assert list((place.store.root / "leases").iterdir()) == []

    run(ask())


@pytest.mark.parametrize("kind", ["tar", "tar.gz", "zip"])
@pytest.mark.parametrize("content_type", ["application/x-tar", "application/gzip"])
def test_an_archive_is_what_its_first_bytes_say(
    place: Place, tmp_path: Path, kind: str, content_type: str
) -> None:
    async def ask() -> None:
        path = tmp_path / "archive"
        files = {**right_files("deep/down"), "deep/down/optimizer.pt": b"x"}
        if kind == "zip":
            write_zip(path, files)
        else:
            write_tar(path, files, mode="w:gz" if kind == "tar.gz" else "w")
        answer = await place.ask(
            "POST",
            "/v1/adapters?name=b&alias=stable",
            content=pieces(path, 100),
            headers={"content-type": content_type},
        )
        assert answer.status_code == 201
        assert set(answer.json()["aliases"]) == {"latest", "stable"}
        assert {p.name for p in place.store.resolve("b").folder.iterdir()} == {
            "adapter_config.json", "adapter_model.safetensors",
        }  # fmt: skip

    run(ask())


def test_every_broken_rule_is_told(place: Place) -> None:
    async def ask() -> None:
        change_keys(place.third, lora_alpha=-1, r="x", surprise=5)
        (place.third / "chat_template.jinja").write_bytes(b"\xff")
        answer = await place.server.upload(place.third, "b")
        assert answer.status_code == 422
        error = answer.json()["error"]
        assert {problem["code"] for problem in error["problems"]} == {
            "config-alpha", "config-rank", "config-key-unknown", "template-not-text",
        }  # fmt: skip
        assert all(set(p) == {"code", "where", "message"} for p in error["problems"])
        assert error["code"] == "adapter_not_servable"
        assert "lora_alpha" in error["message"]

    run(ask())


def test_an_adapter_of_another_base_never_has_a_name(place: Place) -> None:
    async def ask() -> None:
        before = tree(place.store.root)
        module = "model.layers.7.mlp.up_proj"
        lora_a, lora_b = np.ones((1, 8), "f4"), np.ones((9, 1), "f4")
        change_tensors(place.third, **{factor(module, "A"): lora_a, factor(module, "B"): lora_b})
        ranks = {"v_proj": 3, "up_proj": 1}
        change_keys(place.third, rank_pattern=ranks, target_modules=["q_proj", *ranks])
        answer = await place.server.upload(place.third, "b")
        problems = answer.json()["error"]["problems"]
        assert [(p["code"], p["where"]) for p in problems] == [("module-unmatched", module)]
        assert tree(place.store.root) == before

    run(ask())


def test_what_is_not_admitted_is_stored_only_while_it_is_asked(place: Place) -> None:
    async def ask() -> None:
        await place.server.upload(place.third.with_name("alpha-1"), "a")  # makes what folders are
        (place.store.root / "trash").mkdir()
        before = tree(place.store.root)

        async def refuse(staged: ResolvedVersion, _: str) -> None:
            assert open_artifact(staged.folder).config.lora_alpha == 3
            assert staged.name == "a"
            # Nobody takes it away meanwhile.
            assert place.store.collect_garbage().digests == ()
            raise AdapterMismatchError("its probe differs by 0.3, at most 0.01 is expected")

        place.server.admit = refuse
        answer = await place.server.upload(place.third, "a")
        assert answer.status_code == 422
        assert "differs by 0.3" in answer.json()["error"]["message"]
        assert tree(place.store.root) == before

        async def fail(*_: object) -> None:
            raise RuntimeError("lost the engine")

        place.server.admit = fail
        answer = await place.server.upload(place.third, "a")
        assert (answer.status_code, "lost" in answer.text) == (500, False)
        assert tree(place.store.root) == before
        # A version that is there already stays, whoever refuses it.
        assert (await place.server.upload(place.third.with_name("alpha-1"), "b")).status_code == 500
        assert tree(place.store.root) == before
        place.server.admit = None
        assert (await place.server.upload(place.third, "a")).status_code == 201

    run(ask())


@pytest.mark.parametrize(
    ("parts", "param", "message"),
    [
        ([], "name", "missing"),
        ([("adapter_config.json", b"{}"), ("name", b"b")], "name", "missing; name the adapter"),
        ([("name", b"b"), ("rora.json", b"{}"), ("alias", b"x")], "alias", "before the files"),
        ([("name", b"b"), ("name", b"c")], "name", "once"),
        ([("name", b"b"), ("rora.json", b"{}"), ("rora.json", b"{}")], "rora.json", "twice"),
        ([("name", b"b"), ("../evil", b"x")], "../evil", "no part of an adapter"),
        ([("name", b"b"), ("optimizer.pt", b"x")], "optimizer.pt", "no part of an adapter"),
        ([("name", b"x" * 300)], "name", "above 256 bytes"),
        ([("name", b"\xff")], "name", "not UTF-8"),
        ([("name", b"../b")], "name", "1 to 64 lower-case letters"),
        ([("name", b"base")], "name", "it is the base model's"),
        ([("name", b"latest")], "name", "reserved"),
        ([("name", b"b"), ("alias", b"A")], "alias", "1 to 64 lower-case letters"),
    ],
)
def test_a_form_that_is_none_of_an_adapter_is_a_400_before_anything_is_read(
    place: Place, parts: list[tuple[str, bytes]], param: str, message: str
) -> None:
    async def ask() -> None:
        before = tree(place.store.root)
        content = b"".join(
            form({name: text})["content"].removesuffix(f"--{BOUNDARY}--\r\n".encode())
            for name, text in parts
        )
        content += f"--{BOUNDARY}--\r\n".encode()
        answer = await place.ask("POST", "/v1/adapters", content=content, headers=form_headers())
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == param
        assert message in error["message"]
        assert tree(place.store.root) == before

    run(ask())


@pytest.mark.parametrize(
    ("content", "content_type", "message"),
    [
        (b"--x\r\n", "multipart/form-data", "without a boundary"),
        (b"nothing of the kind", f"multipart/form-data; boundary={BOUNDARY}", "not a multipart"),
        (b"", f"multipart/form-data; boundary={BOUNDARY}", "before its last boundary"),
        (b"--x", f"multipart/form-data; boundary={'x' * 300}", "exceeds maximum"),
        (f"--{BOUNDARY}\r\nX: y\r\n\r\n".encode() + b"z" * 99, None, "no part of an adapter"),
        (f"--{BOUNDARY}\r\nX: {'y' * 9999}\r\n\r\n".encode(), None, "header size exceeded"),
    ],
)
def test_what_is_no_form_is_a_400(
    place: Place, content: bytes, content_type: str | None, message: str
) -> None:
    async def ask() -> None:
        headers = form_headers() if content_type is None else {"content-type": content_type}
        answer = await place.ask("POST", "/v1/adapters", content=content, headers=headers)
        assert answer.status_code == 400
        assert message in answer.json()["error"]["message"].replace("Maximum header", "header")

    run(ask())


def test_data_that_looks_like_a_boundary_and_chunks_of_any_size_are_written_as_they_are(
    place: Place,
) -> None:
    async def ask() -> None:
        text = b"".join(b"\r\n--b-o-u-n-d-a-r" + b"\r" * number for number in range(50))
        (place.third / "README.md").write_bytes(text)
        content = form(
            {"name": b"b", **{path.name: path.read_bytes() for path in place.third.iterdir()}}
        )["content"]
        for chunk_size in (1, 7, 1000):

            async def chunks(chunk_size: int = chunk_size) -> AsyncIterator[bytes]:
                for start in range(0, len(content), chunk_size):
                    yield content[start : start + chunk_size]

            answer = await place.ask(
                "POST", "/v1/adapters", content=chunks(), headers=form_headers()
            )
            assert answer.status_code == 201
            assert tree(place.store.resolve("b").folder) == tree(place.third)
            await place.ask("DELETE", "/v1/adapters/b")

    run(ask())


def test_a_body_above_the_limit_is_refused_unread_or_when_it_has_grown_so_large(
    place: Place,
) -> None:
    async def ask() -> None:
        before = tree(place.store.root)
        num_read = 0

        async def endless() -> AsyncIterator[bytes]:
            nonlocal num_read
            while True:
                num_read += 1
                yield b"\0" * 1024 * 1024

        for headers, expected in (({}, 65), ({"content-length": str(MAX_UPLOAD_BYTES + 1)}, 0)):
            num_read = 0
            answer = await place.ask(
                "POST", "/v1/adapters?name=b", content=endless(), headers={**TAR, **headers}
            )
            assert answer.status_code == 413
            assert num_read == expected
            assert tree(place.store.root) == before

    run(ask())


def test_a_file_above_its_own_limit_is_refused_while_it_comes(place: Place) -> None:
    async def ask() -> None:
        parts = {"name": b"b", "adapter_config.json": b" " * 5 * 1024 * 1024}
        answer = await place.ask("POST", "/v1/adapters", **form(parts))
        assert answer.status_code == 422
        (problem,) = answer.json()["error"]["problems"]
        assert (problem["code"], problem["where"]) == ("file-too-large", "adapter_config.json")

    run(ask())


@pytest.mark.parametrize("after", [0, 1, 2])
def test_a_client_that_hangs_up_leaves_nothing(place: Place, after: int) -> None:
    async def ask() -> None:
        before = tree(place.store.root)
        content = form({"name": b"b", "rora.json": b"{}" * 1000, "README.md": b"x" * 5000})
        half = content["content"][:4000]
        messages: list[dict[str, Any]] = [
            {"type": "http.request", "body": half[: 2000 * number], "more_body": True}
            for number in range(1, after + 1)
        ]
        sent: list[Any] = []

        async def receive() -> dict[str, Any]:
            return messages.pop(0) if messages else {"type": "http.disconnect"}

        async def note(message: Any) -> None:
            sent.append(message)

        headers = [(b"content-type", form_headers()["content-type"].encode())]
        scope = {
            "type": "http", "method": "POST", "path": "/v1/adapters", "query_string": b"",
            "headers": headers, "app": place.server.app, "root_path": "", "http_version": "1.1",
        }  # fmt: skip
        await FrontDoor(place.server.app)(scope, receive, note)
        assert tree(place.store.root) == before
        assert sent[0]["status"] == 400

    run(ask())


def test_pickled_weights_are_refused_unread_by_their_name(place: Place) -> None:
    async def ask() -> None:
        parts = {
            "name": b"b",
            "adapter_config.json": (place.third / "adapter_config.json").read_bytes(),
            "adapter_model.bin": b"\x80" * 9000,
        }
        answer = await place.ask("POST", "/v1/adapters", **form(parts))
        codes = {problem["code"] for problem in answer.json()["error"]["problems"]}
        assert (answer.status_code, codes) == (422, {"weights-pickle"})

    run(ask())


def test_a_tenant_may_only_upload_what_it_may_whoever_uses_or_manages_it(place: Place) -> None:
    async def ask() -> None:
        before = tree(place.store.root)
        for tenant in (Rights(), Rights(use=("a", "z"), manage=("a", "z")), Rights(upload=("b",))):
            place.server.tenant = tenant
            answers = [await place.server.upload(place.third, name) for name in ("a", "z")]
            assert {answer.status_code for answer in answers} == {403}
            texts = {answer.text.replace("'z'", "'a'") for answer in answers}
            assert len(texts) == 1, "whether there is such an adapter does not show"
        assert tree(place.store.root) == before
        place.server.tenant = Rights(upload=("b",))
        assert (await place.server.upload(place.third, "b")).status_code == 201
        archive = gzip.compress(b"")
        answer = await place.ask("POST", "/v1/adapters?name=a", content=archive, headers=TAR)
        assert answer.status_code == 403

    run(ask())


def test_uploads_at_once_are_all_kept_and_one_of_them_is_the_latest(tmp_path: Path) -> None:
    async def ask() -> None:
        place = make_place(tmp_path, process)
        folders = []
        for alpha in (11, 12, 13):
            folders.append(right(tmp_path / f"alpha-{alpha}"))
            change_keys(folders[-1], lora_alpha=alpha)
        uploads = [place.server.upload(folder, "new") for folder in folders * 2]
        answers = await asyncio.gather(*uploads)
        assert [answer.status_code for answer in answers] == [201] * 6
        record = place.store.record("new")
        versions = {answer.json()["version"] for answer in answers}
        assert {f"sha256:{version.digest}" for version in record.versions} == versions
        assert (len(versions), len(record.versions)) == (3, 3)
        assert list((place.store.root / "incoming").iterdir()) == []

    process = SideProcess()
    try:
        run(ask())
    finally:
        process.close()
