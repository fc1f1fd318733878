"""Two runs are the same only where nothing differs: what the drill and the tests of resuming rely on."""

import pytest
from compare import differences
from runs import of, rewritten


def test_a_copy_is_the_same(copy, two):
    assert differences(copy, two) == []


def nudge(metrics):
    metrics["authority_nats"] += 1e-6


@pytest.mark.parametrize(
    "named, damage",
    [
        ("metrics", lambda run: rewritten(run, lambda events: nudge(of(events, "measured")[0]["metrics"]))),
        ("events.jsonl", lambda run: rewritten(run, lambda events: of(events, "measured")[0].update(wall_s=0.0))),
        ("run_end", lambda run: rewritten(run, lambda events: events.pop())),
        (
            "ckpt/r1/adapter_model.safetensors",
            lambda run: (run / "ckpt/r1/adapter_model.safetensors").write_bytes(b"x"),
        ),
        ("vectors/r0.safetensors", lambda run: (run / "vectors/r0.safetensors").unlink()),
        ("partial", lambda run: (run / "partial").mkdir()),
        ("results.tsv", lambda run: (run.parent / "results.tsv").unlink()),
    ],
)
def test_every_kind_of_loss_is_named(copy, two, named, damage):
    damage(copy)
    assert any(named in line for line in differences(copy, two))
