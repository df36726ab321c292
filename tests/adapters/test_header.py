import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from adapters.errors import ArtifactError
from adapters.header import read_header

GOOD = save({"b": np.ones((2, 3), np.float32), "a": np.zeros(4, np.float16)})


def write(tmp_path: Path, header: object, data: bytes = b"") -> Path:
    path = tmp_path / "file.safetensors"
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)
    return path


def entry(
    shape: object = (1,), offsets: object = (0, 4), dtype: object = "F32"
) -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def test_tensors_are_where_safetensors_put_them(tmp_path: Path) -> None:
    path = tmp_path / "good.safetensors"
    path.write_bytes(GOOD)
    tensors = read_header(path)
    assert set(tensors) == {"a", "b"}
    assert tensors["b"].shape == (2, 3)
    raw = path.read_bytes()[tensors["b"].start : tensors["b"].stop]
    assert raw == np.ones((2, 3), np.float32).tobytes()


@pytest.mark.parametrize("claimed", [3, 2**40, 2**63], ids=["past-end", "tebibyte", "sign-bit"])
def test_header_longer_than_the_file_is_refused_unread(tmp_path: Path, claimed: int) -> None:
    """The length field is compared with the file size before anything is allocated."""
    path = tmp_path / "adapter_model.safetensors"
    path.write_bytes(claimed.to_bytes(8, "little") + b"{}")
    with pytest.raises(ArtifactError, match=f"header claims {claimed} bytes, 2 follow"):
        read_header(path)


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"{", b"", "not JSON"),
        (b"\xff\xff", b"", "not UTF-8"),
        (b"[" * 50_000, b"", "not JSON"),
        ([], b"", "header: holds a list"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 5000 + b"]}}", b"", "not JSON"),
        ({"a": entry(dtype=["F32"])}, b"1234", "is unknown"),
        ({"a": entry(shape=[1] * 9)}, b"1234", "at most 8 sizes"),
        ({"a": {}}, b"", "dtype, shape and data_offsets are expected"),
        ({"a": entry(dtype="F4")}, b"1234", "dtype F4 is unknown"),
        ({"a": entry(shape=[-1])}, b"1234", r"shape \[-1\]"),
        ({"a": entry(shape=[True])}, b"1234", r"shape \[True\]"),
        ({"a": entry(shape="1")}, b"1234", "shape 1, at most 8 sizes"),
        ({"a": entry(offsets=[0, 4, 8])}, b"1234", "data_offsets"),
        ({"a": entry(offsets=[4, 0])}, b"1234", "-4 bytes for F32"),
        ({"a": entry(shape=[2**40, 2**40])}, b"1234", "4 bytes for F32"),
        ({"a": entry(offsets=[4, 8])}, b"12345678", "starts at byte"),
        ({"a": entry(), "b": entry()}, b"1234", "tensors lie end to end"),
        ({"a": entry()}, b"12345", "the file has"),
        ({"a": entry()}, b"123", "the file has"),
    ],
)
def test_a_wrong_frame_is_refused(
    tmp_path: Path, header: object, data: bytes, message: str
) -> None:
    with pytest.raises(ArtifactError, match=message):
        read_header(write(tmp_path, header, data))


def test_a_file_shorter_than_its_length_field_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "short"
    path.write_bytes(b"1234567")
    with pytest.raises(ArtifactError, match="7 bytes, a safetensors file begins with"):
        read_header(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such file"):
        read_header(tmp_path / "nowhere")
    with pytest.raises(ArtifactError, match="can not be read"):
        read_header(tmp_path)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(position=st.integers(0, len(GOOD) - 1), byte=st.integers(0, 255), cut=st.integers(0, 20))
def test_a_damaged_file_is_read_or_refused_but_never_crashes(
    tmp_path: Path, position: int, byte: int, cut: int
) -> None:
    damaged = bytearray(GOOD)
    damaged[position] = byte
    path = tmp_path / "damaged"
    path.write_bytes(damaged[: len(damaged) - cut])
    try:
        tensors = read_header(path)
    except ArtifactError:
        return
    assert all(t.start <= t.stop <= path.stat().st_size for t in tensors.values())
