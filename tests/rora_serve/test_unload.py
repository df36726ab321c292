"""What is unloaded or deleted is gone from a real server's memory."""

from pathlib import Path

import pytest

from tests.rora_serve.serving import Server
from tests.rora_serve.unloading import KINDS, Visitor, growth, held_without_unloading

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

NUM_ROUNDS = 20  # of which the first few are not counted


def test_memory_does_not_grow_by_adapters_that_are_gone(
    server: Server, default_model: Path, tmp_path: Path
) -> None:
    visitor = Visitor(server, tmp_path / "made", default_model)
    try:
        for turn, kind in enumerate(KINDS):
            before, after = growth(server, visitor, kind, NUM_ROUNDS, first=1000 * turn)
            print(f"{kind}: {(after - before) / 1e6:.1f} MB after {NUM_ROUNDS} rounds")
            assert after - before < 3 * visitor.num_bytes
        # The control: those that stay are seen.
        assert held_without_unloading(server, visitor, 6, first=5000) > 4 * visitor.num_bytes
    finally:
        visitor.close()
