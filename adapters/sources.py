"""Where an adapter can come from: a folder, a tar or zip archive, or a name on a model hub.

An archive is somebody else's file. Only the files of an adapter are taken out of it, by their own
names, into a folder that we make; a path that climbs, a link, a device or a bomb refuses it whole.
"""

import io
import os
import re
import stat
import tarfile
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from gzip import GzipFile
from pathlib import Path, PurePosixPath
from typing import IO, cast

from adapters.errors import ArtifactError, RoraError
from adapters.folder import CONFIG_FILE, MAX_FILE_BYTES, PICKLED_WEIGHTS_FILE, WEIGHTS_FILE
from adapters.limits import (
    ARCHIVE_RATIO_FROM_BYTES,
    MAX_ADAPTER_BYTES,
    MAX_ARCHIVE_MEMBERS,
    MAX_ARCHIVE_RATIO,
    MIB,
)
from adapters.problems import Code, Problem, refusal, shown
from adapters.reading import open_regular
from adapters.writer import write_error

_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(?:@[\w./-]+)?")
_CHUNK_BYTES = 64 * 1024
_ARCHIVE = "archive"
# What the readers of archives may read to find the next member: extended headers, or the whole
# directory of a zip. Content is read by us.
_MAX_TAR_HEADER_BYTES = 64 * 1024
_MAX_TAR_HEADERS_BYTES = 4 * MIB  # of all members together
_MAX_ZIP_DIRECTORY_BYTES = MIB
# What tarfile and zipfile raise on files that are none, as fuzzing them shows.
_ARCHIVE_ERRORS = (
    tarfile.TarError, zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, RuntimeError,
    ArithmeticError, LookupError, NotImplementedError,
)  # fmt: skip


@contextmanager
def open_source(source: str) -> Iterator[Path]:
    """Yield the adapter folder that `source` names; one that is unpacked is gone afterwards.

    Args:
        source: a folder; a .tar, .tar.gz or .zip with one adapter in it; or `owner/name` or
            `owner/name@revision` on the Hugging Face hub.
    Raises: ArtifactError: there is no such thing, or the archive breaks a rule.
    Cost: an archive is read once and its adapter written to the temporary folder.
    """
    # os.path, since Path's own checks raise for names that no file can have.
    if os.path.isdir(source):  # noqa: PTH112
        yield Path(source)
        return
    with tempfile.TemporaryDirectory(prefix="rora-adapter-") as temporary:
        if os.path.exists(source):  # noqa: PTH110
            with _named(source, temporary):
                folder = unpack(Path(source).resolve(), Path(temporary))
        elif _HUB_NAME.fullmatch(source) and not source.startswith((".", "-")):
            folder = _download(source, Path(temporary))
        else:
            message = "no such folder or archive, an adapter is expected"
            problem = Problem(Code.FOLDER_MISSING, Path(source).name or source, message)
            raise refusal(ArtifactError, source, [problem])
        with _named(source, temporary):
            yield folder


@contextmanager
def _named(source: str, temporary: str) -> Iterator[None]:
    """Let errors name what the user named, not the temporary folder that it was unpacked to."""
    try:
        yield
    except ArtifactError as error:
        if not error.problems or not str(error).startswith((temporary, _ARCHIVE)):
            raise
        raise refusal(type(error), source, error.problems) from error


def _download(source: str, target: Path) -> Path:
    name, _, revision = source.partition("@")
    try:
        from huggingface_hub import snapshot_download  # noqa: PLC0415  (heavy, and not required)

        snapshot_download(
            name,
            revision=revision or None,
            local_dir=target,
            allow_patterns=list(MAX_FILE_BYTES),
        )
    except Exception as error:  # its errors have no common base: network, rights, names, disk
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        message = f"no such folder, and the Hugging Face hub did not give it ({shown(reason)})"
        problem = Problem(Code.FOLDER_MISSING, name, message)
        raise refusal(ArtifactError, source, [problem]) from error
    return target


def unpack(path: Path, target: Path) -> Path:
    """Take the adapter out of a .tar, .tar.gz or .zip; return its folder, below `target`.

    Args: target: an empty folder.
    Raises: ArtifactError: the archive breaks a rule.
    Cost: reads the archive once and writes the adapter.
    """
    with open_regular(path, max_bytes=2 * MAX_ADAPTER_BYTES) as file:
        try:
            _unpack_into(file, path, target)
        except RoraError:
            raise
        except _ARCHIVE_ERRORS as error:
            message = (
                f"can not be read as an archive ({shown(str(error))}), a folder or an archive of "
                "one is expected; make it again"
            )
            raise _refuse(path.name, Code.ARCHIVE_SYNTAX, message) from error
    folders = [
        folder
        for folder in target.iterdir()
        if any((folder / name).exists() for name in (CONFIG_FILE, WEIGHTS_FILE))
    ]
    if len(folders) != 1:
        code = Code.ARCHIVE_SEVERAL_ADAPTERS if folders else Code.ARCHIVE_NO_ADAPTER
        message = f"holds {len(folders)} folders with {CONFIG_FILE}, one is expected"
        raise _refuse(path.name, code, message)
    return folders[0]


def _unpack_into(file: IO[bytes], path: Path, target: Path) -> None:
    num_bytes = file.seek(0, io.SEEK_END)
    file.seek(0)
    start = file.read(4)
    file.seek(0)
    members = _Members(path.name, target)
    if start.startswith(b"\x1f\x8b"):
        with GzipFile(fileobj=file) as plain:
            _unpack_tar(_Bounded(plain, num_bytes, path.name), members)
    elif start in (b"PK\x03\x04", b"PK\x05\x06"):
        _unpack_zip(_Bounded(file, num_bytes, path.name), members)
    else:
        _unpack_tar(_Bounded(file, num_bytes, path.name), members)


def _unpack_tar(source: "_Bounded", members: "_Members") -> None:
    # Plain mode over our reader: it seeks forward only. Members and headers are let go one by one,
    # since each member keeps a copy of the headers before it.
    source.allow_header(_MAX_TAR_HEADER_BYTES)
    with tarfile.open(fileobj=cast("IO[bytes]", source), mode="r:") as archive:
        while (member := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]
            archive.pax_headers = {}  # what is global in an archive says nothing of adapters
            name = member.name
            if member.issym() or member.islnk():
                raise _refuse(name, Code.ARCHIVE_LINK, "a link, files and folders are expected")
            if not (member.isdir() or member.isreg()) or member.sparse is not None:
                message = "neither a file nor a folder, one of them is expected"
                raise _refuse(name, Code.ARCHIVE_SPECIAL_FILE, message)
            source.allow_content()
            extract = (lambda m=member: archive.extractfile(m)) if member.isreg() else None
            members.take(name, member.size, extract)
            source.allow_header(_MAX_TAR_HEADER_BYTES)
        source.allow_content()
        while source.read(MIB):  # to the end of the stream, where gzip keeps its checksum
            pass


def _unpack_zip(source: "_Bounded", members: "_Members") -> None:
    source.allow_header(_MAX_ZIP_DIRECTORY_BYTES)
    with zipfile.ZipFile(cast("IO[bytes]", source)) as archive:
        source.allow_content()
        source.check_ratio(sum(info.file_size for info in archive.infolist()))
        for info in archive.infolist():
            kind = stat.S_IFMT(info.external_attr >> 16)
            if kind == stat.S_IFLNK:
                message = "a link, files and folders are expected"
                raise _refuse(info.filename, Code.ARCHIVE_LINK, message)
            if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
                message = "neither a file nor a folder, one of them is expected"
                raise _refuse(info.filename, Code.ARCHIVE_SPECIAL_FILE, message)
            if info.flag_bits & 1:
                raise _refuse(info.filename, Code.ARCHIVE_ENCRYPTED, "encrypted; unpack it first")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                message = "a compression other than deflate, which is expected; make it again"
                raise _refuse(info.filename, Code.ARCHIVE_COMPRESSION, message)
            extract = None if info.is_dir() else (lambda i=info: archive.open(i))
            members.take(info.filename, info.file_size, extract)


class _Members:
    """Takes an adapter's files out of an archive, each folder of it into one of ours."""

    def __init__(self, archive: str, target: Path) -> None:
        self._archive = archive
        self._target = target
        self._folders: dict[PurePosixPath, Path] = {}
        self._seen: set[PurePosixPath] = set()
        self._num_members = 0
        self._num_bytes = 0

    def take(
        self, name: str, num_bytes: int, extract: Callable[[], IO[bytes] | None] | None
    ) -> None:
        """Check a member's name and write it, if it is a file of an adapter."""
        self._num_members += 1
        if self._num_members > MAX_ARCHIVE_MEMBERS:
            message = f"more than {MAX_ARCHIVE_MEMBERS} members, an adapter has six files"
            raise _refuse(self._archive, Code.ARCHIVE_TOO_MANY, message)
        path = PurePosixPath(name)
        if path.is_absolute() or ".." in path.parts or "\\" in name:
            message = "a path that climbs out of the folder, one below it is expected"
            raise _refuse(name, Code.ARCHIVE_CLIMBS, message)
        if extract is None:
            return
        if path in self._seen:
            raise _refuse(
                name, Code.ARCHIVE_DUPLICATE, "stands twice in the archive, once is expected"
            )
        self._seen.add(path)
        if path.name == PICKLED_WEIGHTS_FILE:
            # Its name is enough to refuse it with the right words.
            (self._folder(path.parent) / PICKLED_WEIGHTS_FILE).touch()
        max_bytes = MAX_FILE_BYTES.get(path.name)
        if max_bytes is None:
            return
        if num_bytes > max_bytes:
            message = f"{num_bytes} bytes, at most {max_bytes} are expected"
            raise _refuse(name, Code.FILE_TOO_LARGE, message)
        self._num_bytes += num_bytes
        if self._num_bytes > MAX_ADAPTER_BYTES + MIB:
            message = f"holds more than {MAX_ADAPTER_BYTES} bytes of adapters, one is expected"
            raise _refuse(self._archive, Code.ARCHIVE_TOO_MANY, message)
        content = extract()
        assert content is not None
        target = self._folder(path.parent) / path.name
        with content, target.open("wb") as file:
            while chunk := content.read(_CHUNK_BYTES):
                try:
                    file.write(chunk)
                except OSError as error:  # ours, not the archive's
                    advice = "set TMPDIR to a folder with room"
                    raise write_error(target, error, advice=advice) from error

    def _folder(self, parent: PurePosixPath) -> Path:
        if parent not in self._folders:
            self._folders[parent] = self._target / str(len(self._folders))
            self._folders[parent].mkdir()
        return self._folders[parent]


class _Bounded:
    """A binary file that refuses to be read past what its compressed size can honestly hold."""

    def __init__(self, inner: IO[bytes] | GzipFile, compressed_bytes: int, name: str) -> None:
        self._inner = inner
        self._compressed_bytes = compressed_bytes
        self._name = name
        self._header_bytes: int | None = 0
        self._all_header_bytes = 0

    def allow_header(self, num_bytes: int) -> None:
        """Let at most this many bytes be read until content is."""
        self._header_bytes = num_bytes

    def allow_content(self) -> None:
        """Let content be read, which the caller does piece by piece."""
        self._header_bytes = None

    def read(self, size: int = -1) -> bytes:
        """Read at most `size` bytes; without a size, to the end."""
        allowed = self._header_bytes
        if allowed is None:
            content = self._inner.read(size)
        else:
            content = self._inner.read(allowed + 1 if size < 0 else min(size, allowed + 1))
            self._header_bytes = allowed - len(content)
            self._all_header_bytes += len(content)
            if self._header_bytes < 0 or self._all_header_bytes > _MAX_TAR_HEADERS_BYTES:
                message = "a header above any that an adapter needs"
                raise _refuse(self._name, Code.ARCHIVE_BOMB, message)
        self.check_ratio(self._inner.tell())
        return content

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move; forward in a compressed file by reading, so that it is bounded too."""
        if isinstance(self._inner, GzipFile):
            if whence != io.SEEK_SET or offset < self._inner.tell():
                raise OSError("a compressed archive is read from its beginning to its end")
            while (left := offset - self._inner.tell()) > 0:
                skipped = self._inner.read(min(left, MIB))
                self.check_ratio(self._inner.tell())
                if not skipped:
                    break
            return self._inner.tell()
        return self._inner.seek(offset, whence)

    def tell(self) -> int:
        """Return the position in the uncompressed file."""
        return self._inner.tell()

    def seekable(self) -> bool:
        """Archives are read by seeking."""
        return True

    def check_ratio(self, num_bytes: int) -> None:
        """Refuse more bytes than the archive's own can honestly hold."""
        limit = max(MAX_ARCHIVE_RATIO * self._compressed_bytes, ARCHIVE_RATIO_FROM_BYTES)
        if num_bytes > limit:
            message = (
                f"{self._compressed_bytes} bytes hold more than {limit}, at most "
                f"{MAX_ARCHIVE_RATIO} for one are expected"
            )
            raise _refuse(self._name, Code.ARCHIVE_BOMB, message)


def _refuse(where: str, code: Code, message: str) -> ArtifactError:
    return refusal(ArtifactError, _ARCHIVE, [Problem(code, where, message)])
