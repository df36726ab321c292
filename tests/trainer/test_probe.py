"""Asking a probe again, offline: which side moved."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import trainer.cli
from adapters import AdapterStore, open_artifact
from adapters.errors import AdapterMismatchError
from adapters.probe import Probe, read_probe
from adapters.tolerance import Form
from adapters.verdict import Found, compare
from tests.workloads import chat, write_lines
from trainer.config import AdapterSettings, DataSettings, LoopSettings, TrainConfig
from trainer.inject import inject_artifact
from trainer.model import load_base
from trainer.probe import ask_again
from trainer.run import train

Capture = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    root = tmp_path_factory.mktemp("trained")
    data = write_lines(root / "data.jsonl", [chat(f"Say {n}.", f"{n} it is") for n in range(12)])
    config = TrainConfig(
        output=root / "run",
        data=DataSettings(train=data),
        adapter=AdapterSettings(rank=4),
        train=LoopSettings(epochs=4, batch_tokens=256, learning_rate=1e-2),
    )
    return train(config, load_base("model", tiny_model, dtype="float32"))


@pytest.fixture
def probe(trained: Path) -> Probe:
    found = read_probe(trained)
    assert found is not None
    return found


def run(*arguments: object, expect: int = 0) -> None:
    assert trainer.cli.main(["probe", *(str(argument) for argument in arguments)]) == expect


def moved(capsys: Capture, *arguments: object, expect: int = 0) -> str:
    run(*arguments, "--json", expect=expect)
    content: dict[str, Any] = json.loads(capsys.readouterr().out)
    return str(content["moved"])


def answers(probe: Probe, *, off_by: float, side: str) -> list[Found]:
    """What a server saw whose base model or adapter answers otherwise."""
    found = []
    for prompt in probe.prompts:
        both = {"base": prompt.base, "adapter": prompt.adapter}
        given = {
            name: {
                token: value - (off_by if name == side else 0.0)
                for token, value in zip(answer.token_ids, answer.log_probs, strict=True)
            }
            for name, answer in both.items()
        }
        found.append(Found(**given))
    return found


def change_weights(path: Path, by: float) -> None:
    tensors = load_file(path)
    generator = torch.Generator().manual_seed(0)
    for tensor in tensors.values():
        tensor.add_(by * torch.randn(tensor.shape, generator=generator))
    save_file(tensors, path, metadata={"format": "pt"})


def test_what_was_trained_answers_as_stored(
    trained: Path, tiny_model: Path, probe: Probe, capsys: Capture
) -> None:
    run(trained, "--model", tiny_model)
    out = capsys.readouterr().out
    assert out.count("base model") >= len(probe.prompts)
    first = probe.prompts[0].adapter.log_probs[0]
    line = next(line for line in out.splitlines() if f"  {first:.6f}" in line)
    assert float(line.split()[-1]) == pytest.approx(first, abs=1e-4)
    assert out.splitlines()[-1] == "moved   nothing"
    assert "computed in float32: base model and adapter answer as in training" in out


def test_an_adapter_that_is_not_applied_fails_its_probe(
    trained: Path, tiny_model: Path, probe: Probe
) -> None:
    """The oracle of the comparison: the trainer's own model, with its adapter off."""
    base = load_base("model", tiny_model, dtype="float32")
    layers = inject_artifact(base.model, open_artifact(trained))
    found = ask_again(base, layers, probe)
    forms: tuple[Form, ...] = ("float32", "bfloat16", "float16")
    for form in forms:
        assert compare(probe, found, form).passed
        off = [Found(one.base, one.base) for one in found]
        assert not compare(probe, off, form).passed
    for layer in layers.values():
        layer.scaling /= 4**0.5  # alpha / rank in the place of alpha / sqrt(rank)
    assert not compare(probe, ask_again(base, layers, probe), "float32").passed


def test_files_that_are_not_what_was_trained_are_the_adapters_fault(
    trained: Path, tiny_model: Path, tmp_path: Path, capsys: Capture
) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(trained, folder)
    change_weights(folder / "adapter_model.safetensors", 0.02)
    assert "the adapter: its files" in moved(capsys, folder, "--model", tiny_model, expect=1)


def test_another_base_model_of_the_same_name_is_the_bases_fault(
    trained: Path, tiny_model: Path, tmp_path: Path, capsys: Capture
) -> None:
    base = tmp_path / tiny_model.name
    shutil.copytree(tiny_model, base)
    change_weights(base / "model.safetensors", 0.02)
    assert "the base model: it" in moved(capsys, trained, "--model", base, expect=1)


@pytest.mark.parametrize(
    ("side", "said"),
    [
        ("adapter", "the engine: it does not answer as the adapter's files do here"),
        ("base", "the engine: its base model does not answer as in training, here it does"),
        ("neither", "nothing"),
    ],
)
def test_what_the_server_saw_stands_beside_it(
    trained: Path,
    tiny_model: Path,
    probe: Probe,
    tmp_path: Path,
    capsys: Capture,
    side: str,
    said: str,
) -> None:
    store = AdapterStore(tmp_path / "store")
    version = store.add(trained, name="a")
    store.keep_verdict(
        version, "build", compare(probe, answers(probe, off_by=3.25, side=side), "float32")
    )
    given = ("--store", store.root, "--model", tiny_model)
    assert moved(capsys, "a", *given) == said
    run(version.folder, *given)  # a folder of the same content
    out = capsys.readouterr().out
    assert "server" in out
    stored = getattr(probe.prompts[0], "adapter" if side == "neither" else side).log_probs[0]
    seen = stored if side == "neither" else stored - 3.25
    assert any(
        f"{stored:.6f}" in line and line.endswith(f"{seen:.6f}") for line in out.splitlines()
    )
    assert out.splitlines()[-1] == f"moved   {said}"
    store.lift_quarantine("a", by="Ada")
    run("a", *given)
    assert "lifted  by Ada" in capsys.readouterr().out


def test_what_a_server_did_not_ask_is_left_empty(
    trained: Path, tiny_model: Path, probe: Probe, tmp_path: Path, capsys: Capture
) -> None:
    store = AdapterStore(tmp_path / "store")
    found = [Found({}, {}), *answers(probe, off_by=0, side="base")[1:]]
    store.keep_verdict(store.add(trained, name="a"), "build", compare(probe, found, "float32"))
    run("a", "--store", store.root, "--model", tiny_model)
    assert sum(line.endswith(" -") for line in capsys.readouterr().out.splitlines()) == 16


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no such folder"),
        (["a", "--store", "none"], "the store holds no such name"),
    ],
)
def test_a_mistake_is_one_line(
    tiny_model: Path, capsys: Capture, arguments: list[str], message: str
) -> None:
    run(*arguments, "--model", tiny_model, expect=1)
    assert message in capsys.readouterr().err


def test_an_adapter_without_a_probe_has_nothing_to_ask(
    adapter: Path, tiny_model: Path, capsys: Capture
) -> None:
    run(adapter, "--model", tiny_model, expect=1)
    assert "rora.json holds no probe, one is expected" in capsys.readouterr().err


def test_a_token_that_the_base_model_lacks_is_refused(
    trained: Path, tiny_model: Path, probe: Probe
) -> None:
    base = load_base("model", tiny_model, dtype="float32")
    layers = inject_artifact(base.model, open_artifact(trained))
    strange = replace(probe.prompts[0], token_ids=(1, 49_152))
    with pytest.raises(AdapterMismatchError, match="names token 49152, model has 49152"):
        ask_again(base, layers, replace(probe, prompts=(strange,)))
