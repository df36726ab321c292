"""The corpus of malformed adapters and archives, over HTTP."""

from collections.abc import AsyncIterator
from pathlib import Path

from tests.adapters.hostile.build import CASES, Case, build, right
from tests.rora_serve.adapter_server import (
    BOUNDARY,
    MAX_UPLOAD_BYTES,
    Place,
    form,
    form_headers,
    pieces,
    run,
    tree,
)

TAR = {"content-type": "application/x-tar"}


def in_a_form(folder: Path) -> AsyncIterator[bytes] | None:
    """Yield a folder's files as a form; None if one of them is none, or there are none."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    if not paths or not all(path.is_file() and not path.is_symlink() for path in paths):
        return None

    async def content() -> AsyncIterator[bytes]:
        yield form({"name": b"hostile"})["content"].removesuffix(f"--{BOUNDARY}--\r\n".encode())
        for path in paths:
            head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{path.name}"\r\n\r\n'
            yield head.encode()
            async for piece in pieces(path):
                yield piece
            yield b"\r\n"
        yield f"--{BOUNDARY}--\r\n".encode()

    return content()


def size(path: Path) -> int:
    paths = [path, *path.rglob("*")]
    return sum(each.lstat().st_size for each in paths if each.is_file())


async def send(place: Place, one: Case, path: Path) -> tuple[int, set[str]] | None:
    """Upload a case; return the status and the codes of its problems."""
    length = {"content-length": str(size(path))}
    if one.suffix:
        target, headers = "/v1/adapters?name=hostile", {**TAR, **length}
        content: AsyncIterator[bytes] | None = pieces(path)
    else:
        # The form's own length, a little more, where it counts: above the limit.
        target = "/v1/adapters"
        headers = form_headers() | (length if size(path) > MAX_UPLOAD_BYTES else {})
        content = in_a_form(path)
    if content is None:
        return None
    answer = await place.ask("POST", target, content=content, headers=headers)
    problems = answer.json()["error"].get("problems", [])
    assert str(place.store.root.parent) not in answer.text
    return answer.status_code, {problem["code"] for problem in problems}


def test_every_hostile_adapter_is_refused_and_leaves_the_store_as_it_was(
    place: Place, tmp_path: Path
) -> None:
    async def ask() -> None:
        await place.server.upload(place.third, "a")  # which makes what folders there are
        before = tree(place.store.root)
        wrong, tried = {}, 0
        for one, path in build(tmp_path / "hostile"):
            found = await send(place, one, path)
            if found is None:
                continue
            tried += 1
            too_large = size(path) > MAX_UPLOAD_BYTES
            expected = (413, set()) if too_large else (422, {one.code})
            if found != expected or tree(place.store.root) != before:
                wrong[one.name] = found
                before = tree(place.store.root)
        assert wrong == {}
        assert tried >= len(CASES) - 6  # links, pipes and folders can not be sent
        answer = await place.server.upload(right(tmp_path / "control"), "control")
        assert answer.status_code == 201

    run(ask())
