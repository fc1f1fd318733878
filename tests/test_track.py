"""Trackers get the curves of a run, go on where it goes on, and never stop it."""

import importlib.util
import sys
import types

import pytest
from compare import differences
from made_runs import run_events
from runs import Killed, killing, resumed, started

from steer_heal.backends import track
from steer_heal.backends.track import TRACKERS, Tracking, scalars
from steer_heal.run import main
from steer_heal.runs.events import EventLog
from steer_heal.stages import heal as heal_module

EVENTS = run_events(n_rounds=2)
N_STEPS = sum(event["stage"] == "heal_step" for event in EVENTS)


@pytest.fixture
def stub(monkeypatch):
    """A tracker that only remembers, under the name `stub`."""
    calls = []

    class Stub:
        package = "json"

        def __init__(self, folder, config, step):
            calls.append(("init", folder.name, step))

        def log(self, values, step):
            calls.append(("log", dict(values), step))

        def picture(self, path, step):
            calls.append(("picture", path.name, step))

        def close(self):
            calls.append(("close",))

    monkeypatch.setitem(TRACKERS, "stub", Stub)
    return calls


def test_each_number_of_a_state_is_logged_at_the_optimiser_step_it_was_measured_at(tmp_path, stub):
    tracking = Tracking(["stub"], tmp_path / "run", {}, ())
    for event in EVENTS:
        tracking.see(event)
    logged = [(values, step) for what, *rest in stub if what == "log" for values, step in [rest]]
    steps = [step for _, step in logged]
    assert steps == sorted(steps) and steps[-1] == N_STEPS
    at = {name: [step for values, step in logged if name in values] for values, _ in logged for name in values}
    assert at["heal/fit"] == list(range(N_STEPS // 3 + 1, N_STEPS + 1))
    assert at["control_heal/fit"] == list(range(1, N_STEPS // 3 + 1))
    assert at["base/coherence"] == at["prompted/coherence"] == [0]
    assert at["healed/authority_nats"] == [N_STEPS // 3 * 2, N_STEPS]
    assert not any(name.endswith("_lo") for name in at)
    healed = [values for values, _ in logged if "healed/authority_nats" in values]
    assert [values["round"] for values in healed] == [0, 1]


def test_a_value_that_is_missing_is_left_out():
    event = {"stage": "healed", "round": 0, "items": {}, "metrics": {"a": None, "b": 0.5, "b_lo": 0.1}}
    assert scalars(event) == {"healed/b": 0.5, "round": 0.0}


def test_every_event_of_the_log_reaches_the_trackers(tmp_path):
    seen = []
    log = EventLog(tmp_path, on_event=seen.append)
    written = [log.write("base", -1, a=1), log.write("heal_step", 0, b=2)]
    log.close()
    assert seen == written


def tags(folder) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    read = EventAccumulator(str(folder / "tensorboard"), size_guidance={"scalars": 0})
    read.Reload()
    found = {name: [(each.step, each.value) for each in read.Scalars(name)] for name in read.Tags()["scalars"]}
    return found | {name: [(each.step, 0.0) for each in read.Images(name)] for name in read.Tags()["images"]}


def test_tensorboard_files_hold_the_curves_and_pictures_also_of_a_run_that_went_on(tmp_path):
    pytest.importorskip("tensorboard", reason="its package is not installed")
    import matplotlib.pyplot as plt
    import numpy as np

    for name, cuts in (("whole", [len(EVENTS)]), ("resumed", [len(EVENTS) // 2, len(EVENTS)])):
        folder, done = tmp_path / name, 0
        folder.mkdir()
        plt.imsave(folder / "map.png", np.zeros((4, 4)))
        for cut in cuts:
            tracking = Tracking(["tensorboard"], folder, {"model": "x"}, EVENTS[:done])
            for event in EVENTS[done:cut]:
                tracking.see(event)
            if cut < len(EVENTS):  # steps that were lost, and are taken again
                for event in EVENTS[cut : cut + 5]:
                    tracking.see(event | ({"fit": 99.0} if event["stage"] == "heal_step" else {}))
            done = cut
        tracking.pictures([folder / "trajectory.png", folder / "map.png"])
        tracking.close()
    whole, again = tags(tmp_path / "whole"), tags(tmp_path / "resumed")
    assert whole == again and [step for step, _ in whole["map"]] == [N_STEPS]
    assert len(whole["heal/fit"]) == N_STEPS * 2 // 3 and whole["heal/fit"][0] == (N_STEPS // 3 + 1, 1.0)


def test_a_run_that_was_killed_goes_on_in_its_curves(quick, settings, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard", reason="its package is not installed")
    flags = ("--n-rounds", "1", "--no-control", "--track", "tensorboard")
    whole = started(tmp_path / "whole", settings, *flags)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killing(patch, heal_module, "schedule", 2)
        main(["fast-dev", "--out", str(tmp_path / "killed"), *settings, *flags])
    run = next(path for path in (tmp_path / "killed").iterdir() if (path / "events.jsonl").exists())
    assert tags(resumed(run)) == tags(whole)


class Module(types.ModuleType):
    """Stands for the package of a tracker: remembers what it is called with."""

    def __init__(self, name):
        super().__init__(name)
        self.calls = []
        self.__spec__ = importlib.util.spec_from_loader(name, None)

    def init(self, **how):
        self.calls.append(("init", how))
        return self

    def log(self, values, step):
        self.calls.append(("log", values, step))

    def finish(self):
        self.calls.append(("finish",))

    @staticmethod
    def Image(path):
        return f"image of {path}"


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_a_tracker_of_services_gets_one_named_run_that_can_go_on(name, tmp_path, monkeypatch):
    module = Module(name)
    monkeypatch.setitem(sys.modules, name, module)
    track.check([name])
    (tmp_path / "map.png").touch()
    tracking = Tracking([name], tmp_path, {"model": "x"}, EVENTS[:0])
    for event in EVENTS:
        tracking.see(event)
    tracking.pictures([tmp_path / "map.png", tmp_path / "nowhere.png"])
    tracking.close()
    (_, how), *logged, last = module.calls
    assert how["name"] == tmp_path.name and how["resume"] == "allow" and how["config"] == {"model": "x"}
    assert how["project"] == "steer-heal" and last == ("finish",)
    assert len([1 for _, values, _ in logged if "heal/fit" in values]) == N_STEPS * 2 // 3
    assert logged[-1] == ("log", {"map": f"image of {tmp_path / 'map.png'}"}, N_STEPS)


@pytest.mark.parametrize("name", ["trackio", "wandb"])
def test_the_real_packages_take_it_without_a_network(name, tmp_path, monkeypatch):
    pytest.importorskip(name, reason="its package is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    import warnings

    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        tracking = Tracking([name], tmp_path, {"model": "x"}, ())
        for event in EVENTS[:20]:
            tracking.see(event)
        assert list(tracking.running) == [name]
        tracking.close()
    assert not [each for each in said if "left out" in str(each.message)]


def test_a_tracker_that_fails_is_left_out_and_the_others_go_on(tmp_path, stub, monkeypatch):
    class Failing:
        package = "json"

        def __init__(self, *_):
            pass

        def log(self, *_):
            raise ConnectionError("no network")

    class Refusing:
        package = "json"

        def __init__(self, *_):
            raise RuntimeError("no login")

    monkeypatch.setitem(TRACKERS, "failing", Failing)
    monkeypatch.setitem(TRACKERS, "refusing", Refusing)
    with pytest.warns(UserWarning) as said:
        tracking = Tracking(["refusing", "failing", "stub"], tmp_path, {}, ())
        for event in EVENTS:
            tracking.see(event)
        tracking.close()
    assert [str(each.message).split(" ")[0] for each in said] == ["refusing", "failing"], "each says so once"
    assert "no login" in str(said[0].message) and "ConnectionError: no network" in str(said[1].message)
    assert stub[-1] == ("close",) and sum(call[0] == "log" for call in stub) > N_STEPS


def test_a_run_whose_tracker_fails_ends_as_one_without(quick, settings, one, tmp_path, stub, monkeypatch):
    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(TRACKERS["stub"], "log", fail)
    run = started(tmp_path, settings, "--n-rounds", "1", "--track", "stub")
    assert [line for line in differences(run, one) if "run_start" not in line] == []
    assert stub == [("init", run.name, 0)]


@pytest.mark.parametrize(
    "name, told", [("wnadb", "did you mean 'wandb'?"), ("absent", "pip install 'steer-heal[no_such_package]'")]
)
def test_a_tracker_that_is_not_there_is_refused_before_the_model_loads(name, told, tmp_path, capsys, monkeypatch):
    absent = type("Absent", (), {"package": "no_such_package"})
    monkeypatch.setitem(TRACKERS, "absent", absent)
    monkeypatch.setattr("steer_heal.round.load", None)
    assert main(["fast-dev", "--out", str(tmp_path / "out"), "--track", name]) == 2
    assert f"track is {name!r}" in (err := capsys.readouterr().err) and told in err
    assert not (tmp_path / "out").exists()
