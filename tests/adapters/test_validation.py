import re
from pathlib import Path

import numpy as np
import pytest

from adapters import AdapterConfig, AdapterStore, write_artifact
from adapters.errors import ArtifactError
from adapters.problems import describe
from adapters.validation import validate


def make(folder: Path, *, alpha: float = 4.0, a: float = 1.0, b: float = 1.0) -> Path:
    factors = {
        "m.q": (np.full((2, 5), a, np.float32), np.full((7, 2), b, np.float32)),
        "m.o": (np.ones((2, 5), np.float32), np.full((7, 2), min(b, 1.0), np.float32)),
    }
    config = AdapterConfig(2, alpha, target_modules=("q", "o"))
    write_artifact(folder, config, factors, provenance={})
    return folder


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"a": np.nan}, "m.q: lora_A holds NaN or infinity"),
        ({"b": np.inf}, "m.q: lora_B holds NaN or infinity"),
        ({"b": 1e20}, r"m.q: scaling \* \|A\| \* \|B\| is .*e\+21, at most 1e\+06"),
        ({"alpha": 1e300}, "at most"),
        ({"b": 0.0}, "every delta is zero, so that it would answer as the base"),
    ],
)
def test_numbers_that_no_training_gives_are_refused_and_not_stored(
    tmp_path: Path, numbers: dict[str, float], message: str
) -> None:
    folder = make(tmp_path / "a", **numbers)
    assert re.search(message, describe(validate(folder).problems))
    store = AdapterStore(tmp_path / "store")
    with pytest.raises(ArtifactError, match=message):
        store.add(folder, name="a")
    assert store.names() == []
    assert list((store.root / "objects").iterdir()) == []


def test_numbers_of_training_pass(tmp_path: Path) -> None:
    assert validate(make(tmp_path / "a", a=3.0, b=20.0)).problems == ()
