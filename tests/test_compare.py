"""Two runs are the same only where nothing differs: what the drill and the tests of resuming rely on."""

import json
import shutil

import pytest
from compare import differences

from steer_heal.runs.log import last_hash
from steer_heal.runs.results import append_result


@pytest.fixture
def copy(two, tmp_path):
    run = tmp_path / two.name
    shutil.copytree(two, run)
    append_result(tmp_path, {"run": run.name, "last_hash": last_hash(run)})
    return run


def test_a_copy_is_the_same(copy, two):
    assert differences(copy, two) == []


def edit(run, kind, change):
    """Changes the first event of a kind."""
    path = run / "events.jsonl"
    lines = path.read_text().splitlines()
    i = next(i for i, line in enumerate(lines) if json.loads(line)["event"] == kind)
    event = json.loads(lines[i])
    change(event)
    path.write_text("\n".join([*lines[:i], json.dumps(event), *lines[i + 1 :], ""]))


def move(event):
    event["metrics"]["authority_nats"] += 1e-6


def flip(path):
    path.write_bytes(path.read_bytes()[:-1] + b"\1")


def cut(path):
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:-1]))


@pytest.mark.parametrize("named, damage", [
    ("metrics", lambda run: edit(run, "measured", move)),
    ("events.jsonl", lambda run: edit(run, "measured", lambda event: event.update(wall_s=0.0))),
    ("run_end", lambda run: cut(run / "events.jsonl")),
    ("ckpt/r1/adapter_model.safetensors", lambda run: flip(run / "ckpt/r1/adapter_model.safetensors")),
    ("vectors/r0.safetensors", lambda run: (run / "vectors/r0.safetensors").unlink()),
    ("partial", lambda run: (run / "partial").mkdir()),
    ("results.tsv", lambda run: (run.parent / "results.tsv").unlink()),
])  # fmt: skip
def test_every_kind_of_loss_is_named(copy, two, named, damage):
    damage(copy)
    assert any(named in line for line in differences(copy, two))
