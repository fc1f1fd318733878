"""Two runs are the same only where nothing differs: what the drill and the tests of resuming rely on."""

import json
import os

import pytest
from compare import differences


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


@pytest.mark.parametrize("named, damage", [
    ("metrics", lambda run: edit(run, "measured", lambda event: event["metrics"].update(authority_nats=0.5))),
    ("events.jsonl", lambda run: edit(run, "measured", lambda event: event.update(wall_s=0.0))),
    ("run_end", lambda run: os.truncate(run / "events.jsonl", 5000)),
    ("ckpt/r1/adapter_model.safetensors", lambda run: (run / "ckpt/r1/adapter_model.safetensors").write_bytes(b"x")),
    ("vectors/r0.safetensors", lambda run: (run / "vectors/r0.safetensors").unlink()),
    ("partial", lambda run: (run / "partial").mkdir()),
    ("results.tsv", lambda run: (run.parent / "results.tsv").unlink()),
])  # fmt: skip
def test_every_kind_of_loss_is_named(copy, two, named, damage):
    damage(copy)
    assert any(named in line for line in differences(copy, two))
