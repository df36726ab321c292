from pathlib import Path

import pytest

from rora_serve.memory import adapter_memory, free_memory


def test_free_memory_is_what_a_container_leaves(tmp_path: Path) -> None:
    model, cgroup = tmp_path / "model", tmp_path / "cgroup"
    for folder in (model, cgroup):
        folder.mkdir()
    (model / "model.safetensors").write_bytes(bytes(1000))
    without = free_memory(model, cgroup)
    (cgroup / "memory.max").write_text("max\n")
    (cgroup / "memory.current").write_text("3000\n")
    assert free_memory(model, cgroup) == pytest.approx(without, rel=0.2)
    (cgroup / "memory.max").write_text("10000\n")
    assert free_memory(model, cgroup) == 6000
    (cgroup / "memory.stat").write_text("anon 500\ninactive_file 2000\n")
    assert free_memory(model, cgroup) == 8000, "what was read of files goes first"
    (model / "config.json").write_text('{"dtype": "bfloat16"}')
    assert free_memory(model, cgroup, dtype="auto") == 8000
    assert free_memory(model, cgroup, dtype="float32") == 7000
    (cgroup / "memory.current").write_text("30000\n")
    assert free_memory(model, cgroup) == 0


def test_adapters_take_a_quarter_of_what_is_free_unless_they_are_told_how_much(
    tmp_path: Path,
) -> None:
    quarter = free_memory(tmp_path) / 4
    assert adapter_memory(None, tmp_path) == pytest.approx(quarter, rel=0.2)
    assert adapter_memory(1000, tmp_path) == 1000
