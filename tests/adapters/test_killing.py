"""A sample of what `scripts/soak kill` runs for longer."""

from pathlib import Path

from tests.adapters.hostile.build import right
from tests.adapters.killing import kill_once


def several_adapters(folder: Path) -> Path:
    """Write six adapters that differ in their templates."""
    for number in range(6):
        (right(folder / str(number)) / "chat_template.jinja").write_text(str(number))
    return folder


def test_a_store_is_whole_whenever_its_writer_is_killed(tmp_path: Path) -> None:
    adapters = several_adapters(tmp_path / "adapters")
    held = [kill_once(tmp_path / "store", adapters, seed) for seed in range(10)]
    assert max(held) > 0
