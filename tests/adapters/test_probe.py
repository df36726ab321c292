import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from adapters import AdapterStore, validate
from adapters.errors import ArtifactError
from adapters.probe import Answer, read_probe
from tests.adapters.hostile.build import PROBE, change_probe, right

Change = Callable[[Any], object]


def test_a_probe_is_read_as_it_stands(tmp_path: Path) -> None:
    folder = right(tmp_path / "a")
    assert read_probe(folder) is None
    change_probe(folder, lambda _: None)
    assert validate(folder).problems == ()
    probe = read_probe(folder)
    assert probe is not None
    assert (probe.dtype, probe.form) == ("float32", "float32")
    (prompt,) = probe.prompts
    assert prompt.token_ids == (1, 9690)
    assert prompt.adapter == Answer((3681, 504), (-0.03, -4.0))
    change_probe(folder, lambda probe: probe.update(quantization="nf4"))
    quantized = read_probe(folder)
    assert quantized is not None
    assert quantized.form == "quantized"


def of_prompt(**keys: Any) -> Change:
    return lambda probe: probe["prompts"][0].update(keys)


def of_answer(**keys: Any) -> Change:
    return lambda probe: probe["prompts"][0]["adapter"].update(keys)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda probe: probe.update(dtype="float64"), "probe.dtype: found float64, one of float32"),
        (lambda probe: probe.update(dtype=["float32"]), "probe.dtype: found"),
        (lambda probe: probe.update(quantization=None), "probe.quantization: found None"),
        (lambda probe: probe.update(engine="x"), "the keys dtype, prompts is expected"),
        (lambda probe: probe.pop("dtype"), "the keys dtype, prompts is expected"),
        (lambda probe: probe.update(prompts={}), "probe.prompts: found {}, a list of prompts"),
        (lambda probe: probe.update(prompts=[]), "0 prompts, 1 to 16 are expected"),
        (lambda probe: probe["prompts"].extend(probe["prompts"] * 16), "17 prompts, 1 to 16"),
        (lambda probe: probe.update(prompts=[1]), r"probe.prompts\[0\]: found 1, an object"),
        (of_prompt(token_ids=[]), "0 token ids, 1 to 256 are expected"),
        (of_prompt(token_ids=[1] * 257), "257 token ids, 1 to 256 are expected"),
        (of_prompt(token_ids=[1, -1]), "found -1, an integer from 0 to below"),
        (of_prompt(token_ids=[2**31]), "found 2147483648, an integer from 0"),
        (of_prompt(token_ids=[1.0]), "found 1.0, an integer from 0"),
        (of_prompt(token_ids=[True]), "found True, an integer from 0"),
        (of_prompt(token_ids="12"), "found 12, a list of token ids"),
        (of_prompt(base=None), r"probe.prompts\[0\].base: found None, an object"),
        (of_answer(token_ids=[5, 5]), "each token once is expected"),
        (of_answer(token_ids=[5]), "1 tokens and 2 log-probs, as many are expected"),
        (of_answer(token_ids=list(range(9))), "9 token ids, 1 to 8 are expected"),
        (of_answer(log_probs=[-0.1, 0.1]), "found 0.1, a number of -1e"),
        (of_answer(log_probs=[-0.1, -1e300]), "found -1e.300, a number of -1e"),
        (of_answer(log_probs=[-0.1, "-1"]), "found -1, a number of -1e"),
        (of_answer(log_probs=[-0.1, False]), "found False, a number of -1e"),
        (of_answer(log_probs=[-0.1, -(10**400)]), "found -1000.*, a number of -1e"),
    ],
)
def test_a_probe_outside_its_form_is_refused(tmp_path: Path, change: Change, reason: str) -> None:
    folder = right(tmp_path / "a")
    change_probe(folder, change)
    with pytest.raises(ArtifactError, match=reason) as caught:
        read_probe(folder)
    assert caught.value.codes == ("probe-form",)
    assert [problem.code for problem in validate(folder).problems] == ["probe-form"]
    with pytest.raises(ArtifactError, match="probe-form"):
        AdapterStore(tmp_path / "store").add(folder, name="a")


def test_whole_numbers_are_log_probs_too(tmp_path: Path) -> None:
    """JSON does not tell 0 from 0.0, and some writers shorten it."""
    folder = right(tmp_path / "a")
    change_probe(folder, of_answer(log_probs=[0, -40]))
    probe = read_probe(folder)
    assert probe is not None
    assert json.dumps(probe.prompts[0].adapter.log_probs) == "[0.0, -40.0]"
    assert PROBE["prompts"][0]["adapter"]["log_probs"] == [-0.03, -4.0]
