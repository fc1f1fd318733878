"""The way from the loop down to a decoded token is short enough to read."""

import sys
from pathlib import Path

import steer_heal
from steer_heal import run
from steer_heal.model import decode

PACKAGE = Path(steer_heal.__file__).parent


def test_from_a_round_to_a_decoded_token_are_at_most_eight_functions(quick, settings, tmp_path, monkeypatch):
    stacks = []

    def watched(config):
        frame, names = sys._getframe(1), []
        while frame is not None:
            if Path(frame.f_code.co_filename).is_relative_to(PACKAGE):
                names.append(frame.f_code.co_name)
            frame = frame.f_back
        stacks.append(names)
        return sampler(config)

    sampler = decode.sampler
    monkeypatch.setattr(decode, "sampler", watched)
    assert run.main(["fast-dev", "--out", str(tmp_path), *settings, "--n-rounds", "1", "--no-control"]) == 0
    down = [names[: names.index("run_round") + 1][::-1] for names in stacks if "run_round" in names]
    written = [names for names in down if names[1] == "collect"]
    assert written and all(len(names) <= 8 for names in written), written
    assert all(len(names) <= 10 for names in down), "an evaluation decodes a little further down"
    assert all("<lambda>" not in names for names in written)
