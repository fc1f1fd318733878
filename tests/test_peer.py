"""The benchmark beside TRL's trainer."""

import json
from importlib.util import find_spec

import bench_peer
import common
import pytest
from common import cli

TINY = ["--preset", "fast-dev", "--trait", "authority", "--max-steps", "2", "--tiny", "--arms"]


def test_without_trl_its_arms_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(bench_peer, "find_spec", lambda name: None)
    assert cli(bench_peer.main, [*TINY, "TRL"]) == 2
    assert "pip install 'steer-heal[peers]'" in capsys.readouterr().err


@pytest.mark.skipif(find_spec("trl") is None, reason="needs the extra peers")
def test_every_arm_is_trained_apart_and_measured_here(tmp_path, monkeypatch):
    monkeypatch.setattr(common, "BENCHMARKS", tmp_path / "benchmarks.jsonl")
    arms = ["prompt", "TRL", "TRL, its defaults"]
    assert cli(bench_peer.main, [*TINY, *arms, "--out", str(tmp_path)]) in (0, None)
    rows = json.loads((tmp_path / "peer.json").read_text())["measured"]
    assert [row["arm"] for row in rows] == arms
    assert all(row["seconds"] > 0 and row["peak_gib"] > 0.1 for row in rows)
    assert rows[1]["kl_base"] > rows[2]["kl_base"], "its default rate is a thousandth of the heal's"
