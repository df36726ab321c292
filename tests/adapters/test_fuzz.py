"""A sample of what `scripts/soak fuzz` runs for longer."""

from pathlib import Path

from tests.adapters.fuzzing import SEEDS, run


def test_mutated_adapters_are_refused_or_read(tmp_path: Path) -> None:
    accepted = [run(tmp_path, seed) for seed in (*SEEDS, *range(2000))]
    # Both happen, or the mutations would test nothing.
    assert 0.01 < sum(accepted) / len(accepted) < 0.9
