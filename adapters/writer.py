"""Writing an adapter folder in one step: a reader sees the whole folder or none.

Owns the order temporary folder, sync, rename, for adapters and for single files; the store uses it
too.
"""

import errno
import json
import os
import secrets
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from adapters.artifact import PEFT_PREFIX, read_folder
from adapters.config import AdapterConfig
from adapters.errors import ArtifactError, StoreError, StoreFullError
from adapters.folder import CHAT_TEMPLATE_FILE, CONFIG_FILE, PROVENANCE_FILE, WEIGHTS_FILE
from adapters.problems import refusal
from adapters.tensors import NUMPY_DTYPES

_NO_ROOM = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
FactorPair = tuple[NDArray[Any], NDArray[Any]]


def write_artifact(
    folder: Path,
    config: AdapterConfig,
    factors: Mapping[str, FactorPair],
    *,
    provenance: Mapping[str, Any],
    embeddings: Collection[str] = (),
    chat_template: bytes | None = None,
) -> None:
    """Write an adapter folder; `folder` appears complete or not at all.

    Equal input gives equal bytes.

    Args:
        folder: must not exist yet; its parents are made.
        config: the scaling of every module, by its patterns.
        factors: per module (without PEFT's prefix) A [rank, in_features] and B [out_features,
            rank], float32, float16 or ml_dtypes' bfloat16, not scaled.
        provenance: content of rora.json.
        embeddings: those of `factors` that are of embeddings: A [rank, vocabulary], B [hidden,
            rank].
        chat_template: content of the adapter's own template.
    Raises: ArtifactError: the folder exists or can not be made, or what it would hold breaks a
        rule.
    """
    tensors = {}
    for module, (lora_a, lora_b) in factors.items():
        for side, factor in (("A", lora_a), ("B", lora_b)):
            if factor.dtype not in NUMPY_DTYPES.values():
                raise ArtifactError(
                    f"{module}: lora_{side} is {factor.dtype}, "
                    "float32, float16 or bfloat16 is expected"
                )
            factor_name = (
                f"lora_embedding_{side}" if module in embeddings else f"lora_{side}.weight"
            )
            name = f"{PEFT_PREFIX}{module}.{factor_name}"
            tensors[name] = np.ascontiguousarray(factor)
    with new_folder(folder) as temporary, _writing(folder):
        # "pt" is what transformers and PEFT ask of a file before they open it.
        write_synced(temporary / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
        # In its own order: the first pattern that matches counts.
        config_text = json.dumps(config.to_peft(), indent=2, ensure_ascii=False) + "\n"
        write_synced(temporary / CONFIG_FILE, config_text.encode())
        write_synced(temporary / PROVENANCE_FILE, _json_bytes(provenance))
        if chat_template is not None:
            write_synced(temporary / CHAT_TEMPLATE_FILE, chat_template)
        # What we write is what we would accept.
        problems = read_folder(temporary)[1]
        if problems:
            raise refusal(ArtifactError, folder, problems)


def write_provenance(folder: Path, content: Mapping[str, Any]) -> None:
    """Replace rora.json of an adapter folder in one step."""
    replace_file(folder / PROVENANCE_FILE, _json_bytes(content))


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ArtifactError(f"{folder}: can not be written ({error.strerror})") from error


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder that becomes `folder` when the block ends without an error.

    Raises: ArtifactError: `folder` exists, before or after the block.
    """
    if folder.exists():
        raise ArtifactError(f"{folder}: exists already, a new folder is expected; name another one")
    temporary = _temporary_name(folder)
    try:
        make_folder(folder.parent)
        temporary.mkdir()
    except OSError as error:
        raise ArtifactError(
            f"{folder}: can not be made ({error.strerror}); name a folder that is yours"
        ) from error
    try:
        yield temporary
        sync_folder(temporary)
        try:
            temporary.rename(folder)
        except OSError as error:
            raise ArtifactError(f"{folder}: can not be put in place ({error.strerror})") from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(folder.parent)


def replace_file(path: Path, content: bytes) -> None:
    """Replace `path` by `content` in one step: a crash leaves the old or the new file."""
    temporary = _temporary_name(path)
    try:
        write_synced(temporary, content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def write_synced(path: Path, content: bytes) -> None:
    """Write a file and wait until the disk has it."""
    write_chunks(path, [content])


def write_chunks(path: Path, chunks: Iterable[bytes]) -> None:
    """Write a file piece by piece and wait until the disk has it."""
    with path.open("wb") as file:
        file.writelines(chunks)
        file.flush()
        os.fsync(file.fileno())


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, unless it is there, and wait until the disk has it."""
    if not folder.is_dir():
        make_folder(folder.parent)
        folder.mkdir(exist_ok=True)
        sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the disk has the names that the folder holds."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_files(folder: Path) -> None:
    """Wait until the disk has the files of a folder, and their names."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sync_folder(folder)


def write_error(place: Path, error: OSError, *, advice: str) -> StoreError:
    """Return the error of a store in which `place` could not be written."""
    kind = StoreFullError if error.errno in _NO_ROOM else StoreError
    return kind(f"{place}: can not be written ({error.strerror}); {advice}")


def _temporary_name(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _json_bytes(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, sort_keys=True) + "\n").encode()
