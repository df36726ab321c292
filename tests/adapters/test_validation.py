import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from adapters import AdapterConfig, AdapterStore, open_artifact, write_artifact
from adapters.compact import compact_to_error
from adapters.diff import diff
from adapters.display import described
from adapters.errors import ArtifactError
from adapters.problems import describe
from adapters.sources import open_source
from adapters.validation import validate


def compact(folder: Path) -> object:
    return compact_to_error(open_artifact(folder), folder.with_name("out"), max_error=0.1)


def diff_with_itself(folder: Path) -> object:
    return diff(open_artifact(folder), open_artifact(folder))


def norms(folder: Path) -> object:
    return described(open_artifact(folder), norms=True)


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


def test_every_rule_is_looked_at_even_if_the_configuration_is_wrong(tmp_path: Path) -> None:
    folder = make(tmp_path / "a", a=np.nan)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4.0', '"lora_alpha": 0'))
    (folder / "rora.json").write_text("{")
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    codes = [problem.code for problem in validate(folder).problems]
    expected = {"config-alpha", "values-not-finite", "json-syntax", "template-not-text"}
    assert set(codes) == expected
    config.unlink()
    codes = [problem.code for problem in validate(folder).problems]
    assert set(codes) == expected - {"config-alpha"} | {"config-missing"}


def test_both_factors_are_named(tmp_path: Path) -> None:
    problems = validate(make(tmp_path / "a", a=np.nan, b=np.inf)).problems
    assert [problem.message[:6] for problem in problems if problem.where == "m.q"] == [
        "lora_A",
        "lora_B",
    ]


@pytest.mark.parametrize("use", [compact, diff_with_itself, norms])
def test_numbers_that_are_none_are_refused_wherever_they_are_read(
    tmp_path: Path, use: Callable[[Path], object]
) -> None:
    with pytest.raises(ArtifactError, match=r"m\.q: lora_A holds NaN"):
        use(make(tmp_path / "a", a=np.nan))


@pytest.mark.parametrize("name", ["x" * 300, "a\0b"])
def test_a_path_that_can_not_be_is_no_folder(name: str) -> None:
    assert [problem.code for problem in validate(Path(name)).problems] == ["folder-missing"]
    with pytest.raises(ArtifactError, match="no such folder or archive"), open_source(name):
        pass
