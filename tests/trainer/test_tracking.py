import json
import struct
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from tensorboardX.proto.event_pb2 import Event, SessionLog

from adapters.errors import ConfigError
from trainer.config import TrackingSettings
from trainer.tracking import open_trackers

CONFIG_JSON = '{"adapter": {"rank": 4}}'
# Stands in for the package, which the lock leaves out. Its run keeps what it is told in a file.
# Checked by hand against wandb 0.31.0, offline.
WANDB = """
import json
from pathlib import Path

class Error(Exception): pass

class Run:
    def __init__(self, folder, **settings):
        self.file = Path(folder) / "told.jsonl"
        self.tell("init", **settings)
    def tell(self, *what, **more):
        with self.file.open("a") as file:
            file.write(json.dumps([*what, more]) + "\\n")
    def log(self, values, step): self.tell("log", step, values)
    def finish(self): self.tell("finish")

def init(*, dir, project, **settings):
    if project == "refused":
        raise Error("No API key configured.\\nUse `wandb login`.")
    return Run(dir, project=project, **settings)
"""


def events(path: Path) -> Iterator[Any]:
    """Yield the events of a file: length, its checksum, data, its checksum."""
    content = path.read_bytes()
    while content:
        (length,) = struct.unpack("<Q", content[:8])
        yield Event.FromString(content[12 : 12 + length])
        content = content[16 + length :]


def curves(folder: Path) -> dict[str, dict[int, float]]:
    """Return what TensorBoard would show: a start drops what earlier files have from its step."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.iterdir()):
        for event in events(path):
            if event.HasField("session_log") and event.session_log.status == SessionLog.START:
                found = {
                    name: {step: v for step, v in curve.items() if step < event.step}
                    for name, curve in found.items()
                }
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard_gets_every_value(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    expected = {
        name: {step: float(generator.normal()) for step in range(1, 41)}
        for name in ("train/loss", "train/learning_rate")
    }
    tracker = open_trackers(TrackingSettings(tensorboard=True), tmp_path, CONFIG_JSON)
    for step in range(1, 41):
        tracker.log(step, {name: curve[step] for name, curve in expected.items()})
    tracker.log(40, {"eval_loss/default": 1.5, "odd": float("nan")})
    tracker.close()
    found = curves(tmp_path / "tensorboard")
    assert np.isnan(found.pop("odd")[40])
    assert found.pop("eval_loss/default") == {40: 1.5}
    assert found == {
        name: {step: float(np.float32(value)) for step, value in curve.items()}
        for name, curve in expected.items()
    }


def test_the_configuration_stands_beside_the_curves(tmp_path: Path) -> None:
    tracker = open_trackers(TrackingSettings(tensorboard=True), tmp_path, CONFIG_JSON)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    (path,) = (tmp_path / "tensorboard").iterdir()
    (text,) = [
        value.tensor.string_val[0].decode()
        for event in events(path)
        for value in event.summary.value
        if value.tag.startswith("config")
    ]
    assert all(line.startswith("    ") for line in text.splitlines())
    assert json.loads(text) == json.loads(CONFIG_JSON)


def test_a_resumed_run_goes_on_where_its_checkpoint_was(tmp_path: Path) -> None:
    """All in one second, in which the names of the files would be equal."""
    for steps, value in (((1, 2, 3, 4, 5), 1.0), ((4, 5, 6), 2.0), ((5,), 3.0)):
        tracker = open_trackers(TrackingSettings(tensorboard=True), tmp_path, CONFIG_JSON)
        for step in steps:
            tracker.log(step, {"loss": value})
        tracker.close()
    folder = tmp_path / "tensorboard"
    assert len(list(folder.iterdir())) == 3
    assert curves(folder) == {"loss": {1: 1, 2: 1, 3: 1, 4: 2, 5: 3}}


def test_nothing_is_written_unless_asked(tmp_path: Path) -> None:
    tracker = open_trackers(TrackingSettings(), tmp_path, CONFIG_JSON)
    tracker.log(1, {"loss": 1.0})
    tracker.close()
    unused = open_trackers(TrackingSettings(tensorboard=True), tmp_path, CONFIG_JSON)
    unused.close()
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("package", "settings"),
    [
        ("tensorboardX", TrackingSettings(tensorboard=True)),
        ("wandb", TrackingSettings(wandb_project="p")),
    ],
)
def test_a_missing_package_is_one_line_that_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str, settings: TrackingSettings
) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as Python marks what can not be imported
    with pytest.raises(ConfigError) as caught:
        open_trackers(settings, tmp_path, CONFIG_JSON)
    message = str(caught.value)
    assert f"the package {package} is not installed" in message
    assert "pip install 'rora-serve[tracking]'" in message
    assert "\n" not in message
    assert not any(tmp_path.iterdir())


@pytest.fixture
def _wandb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "packages").mkdir()
    (tmp_path / "packages" / "wandb.py").write_text(WANDB)
    monkeypatch.syspath_prepend(tmp_path / "packages")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    yield
    sys.modules.pop("wandb", None)


@pytest.mark.usefixtures("_wandb")
def test_a_resumed_run_is_the_same_run_at_weights_and_biases(tmp_path: Path) -> None:
    run = tmp_path / "my-run"
    run.mkdir()
    for step in (1, 2):
        tracker = open_trackers(TrackingSettings(wandb_project="p"), run, CONFIG_JSON)
        tracker.log(step, {"loss": 0.5})
        tracker.close()
    told = [json.loads(line) for line in (run / "told.jsonl").read_text().splitlines()]
    identity = (run / "wandb_run_id").read_text().strip()
    assert len(identity) == 16
    start = [
        "init",
        {
            "project": "p",
            "name": "my-run",
            "config": json.loads(CONFIG_JSON),
            "id": identity,
            "resume": "allow",
        },
    ]
    assert told == [
        start,
        ["log", 1, {"loss": 0.5}, {}],
        ["finish", {}],
        start,
        ["log", 2, {"loss": 0.5}, {}],
        ["finish", {}],
    ]


@pytest.mark.usefixtures("_wandb")
def test_what_weights_and_biases_refuses_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"wandb says 'No API key .* login`\.', a run is expected"
    ):
        open_trackers(TrackingSettings(wandb_project="refused"), tmp_path, CONFIG_JSON)


def test_a_project_without_a_name_is_refused() -> None:
    with pytest.raises(ValidationError, match="wandb_project"):
        TrackingSettings(wandb_project="")
