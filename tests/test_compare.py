"""Two runs are the same only where nothing differs: what the drill and the tests of resuming rely on."""

import json
import shutil

import pytest

from steer_heal.compare import differences
from steer_heal.events import append_result, read_events


@pytest.fixture
def copy(two, tmp_path):
    run = tmp_path / two.name
    shutil.copytree(two, run)
    append_result(tmp_path, {"run": run.name})
    return run


def test_a_copy_is_the_same(copy, two):
    assert differences(copy, two) == []


def test_every_kind_of_loss_is_named(copy, two):
    events = read_events(copy)
    healed = next(i for i, event in enumerate(events) if event["stage"] == "healed")
    events[healed]["metrics"]["auth_nats"] += 1e-6
    (copy / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    file = copy / "ckpt" / "r1" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    (copy / "vectors" / "r0.safetensors").unlink()
    (copy / "partial").mkdir()
    (copy.parent / "results.tsv").unlink()
    said = differences(copy, two)
    for words in (
        "of round 0: metrics differ",
        "ckpt/r1/adapter_model.safetensors differs",
        "vectors/r0.safetensors differs",
        "vector of round 0 does not hold",
        "partial/ was left",
        "has rows []",
    ):
        assert any(words in line for line in said), words


def test_a_run_that_ended_early_is_not_the_same(copy, two):
    path = copy / "events.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))
    assert any("is None of round None, should be 'run_end'" in line for line in differences(copy, two))
