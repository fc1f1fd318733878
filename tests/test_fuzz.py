"""Any input either runs or ends in one clear error: properties over damaged files, flags, texts and events.

A short and always equal run by default; `just fuzz 20000` spreads that many random examples over the same properties.
"""

import io
import json
import math
import os
from collections.abc import Callable
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import fields, is_dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from made_runs import Page, run_events
from mutations import ANY_TEXT, REPEATED, changed, damaged, toml, valid_events

from steer_heal import console, guard, report, session, traits
from steer_heal.config import FAST_DEV_PRESET, RunConfig, from_dict
from steer_heal.evals.instrument import load_instrument, load_vignettes
from steer_heal.events import EventLog, append_result, jsonable, new_run_folder, read_events, read_results, reading
from steer_heal.files import ROOT, read_toml
from steer_heal.readings import result_row, table, verdict
from steer_heal.records import FOUNDATIONS, Completion, UserError
from steer_heal.resume import recorded, reopen
from steer_heal.run import main
from steer_heal.stages.cfg import FilterCfg, SteerCfg
from steer_heal.stages.filter import degenerate, judge, loop, repetition
from steer_heal.traits import load_contexts, load_trait

TOTAL = int(os.environ.get("FUZZ", 0))
"""Random examples over all properties; 0: the short run."""


def examples(short: int, share: float, shrink: bool = True) -> settings:
    """`short` examples, always the same, or this property's share of TOTAL new ones; without `shrink` a failure is shown as it was met."""
    return settings(
        max_examples=max(1, round(share * TOTAL)) if TOTAL else short,
        derandomize=not TOTAL,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate] + [Phase.shrink] * shrink,
    )


@contextmanager
def folder():
    with TemporaryDirectory(prefix="fuzz ") as name:
        yield Path(name)


def accepted(load: Callable, *words: str):
    """What `load` returns, or None after a UserError that says something and names one of `words`; any other exception is a bug."""
    try:
        return load()
    except UserError as error:
        assert str(error).strip() and any(word in str(error) for word in words), error
        return None


# --- files -----------------------------------------------------------------------------------------------------
TRAIT_FILES = [traits.TRAITS / f"{name}.toml" for name in ("authority", "love")]
INSTRUMENT = ROOT / "data" / "toylm" / "instrument.toml"
VIGNETTES = (ROOT / "data" / "toylm" / "vignettes.jsonl").read_bytes().splitlines(keepends=True)[:6]


def jsonl(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


ROWS = [json.loads(line) for line in VIGNETTES]
A_TRAIT = st.one_of(
    *(damaged(path.read_bytes()) for path in TRAIT_FILES),
    *(changed(read_toml(path), 2).map(toml) for path in TRAIT_FILES),
)
AN_INSTRUMENT = st.one_of(damaged(INSTRUMENT.read_bytes()), changed(read_toml(INSTRUMENT), 2).map(toml))
SOME_ROWS = st.one_of(damaged(b"".join(VIGNETTES)), changed(ROWS, 3).map(jsonl))


@examples(60, 0.14)
@given(A_TRAIT, st.sampled_from(["mine", "mine/inner", "mine/", "mine/x", "../mine"]))
def test_a_trait_file_loads_or_is_named(content, name):
    with folder() as here, pytest.MonkeyPatch.context() as patch:
        (here / "mine.toml").write_bytes(content)
        patch.setattr(traits, "TRAITS", here)
        trait = accepted(lambda: load_trait(name), "mine.toml", "trait is")
    if trait is not None:
        assert (
            trait.target in FOUNDATIONS and trait.sign in (-1, 1) and trait.positive.strip() != trait.negative.strip()
        )
        assert all(
            isinstance(text, str)
            for text in (*trait.prompts, *trait.narration, trait.positive, trait.negative, trait.steered_system)
        )


@examples(60, 0.14)
@given(AN_INSTRUMENT)
def test_an_instrument_asks_or_is_named(content):
    with folder() as here:
        (here / "i.toml").write_bytes(content)
        instrument = accepted(lambda: load_instrument(here / "i.toml"), "i.toml")
    if instrument is not None:
        asked = [instrument.question("A scene.", order) for order in instrument.frames]
        assert all(isinstance(question, str) and question for question in asked) and sorted(instrument.order) == sorted(
            FOUNDATIONS
        )


@examples(60, 0.2)
@given(SOME_ROWS, st.integers(1, 6))
def test_rows_load_or_name_their_line(content, n):
    with folder() as here:
        path = here / "rows.jsonl"
        path.write_bytes(content)
        vignettes = accepted(lambda: load_vignettes(path), "rows.jsonl line", "rows.jsonl holds no rows")
        contexts = accepted(
            lambda: load_contexts(SteerCfg(contexts=path, n_contexts=n)), "rows.jsonl line", "rows.jsonl holds"
        )
        prompts = accepted(lambda: load_trait("love", path).prompts, "rows.jsonl line", "rows.jsonl holds")
    if vignettes is not None:
        assert len({v.id for v in vignettes}) == len(vignettes) and all(
            {v.foundation, v.also} <= {*FOUNDATIONS, None} for v in vignettes
        )
    assert contexts is None or len(contexts) == n and all(contexts)
    assert all(text.encode() for text in (*(contexts or ()), *(prompts or ()), *(v.text for v in vignettes or ()))), (
        "what is taken can be tokenized"
    )


# --- configuration ---------------------------------------------------------------------------------------------
def flags_of(kind: type = RunConfig, prefix: str = "") -> list[str]:
    """Every flag of the command."""
    out = []
    for f in fields(kind):
        inner = f.default_factory if is_dataclass(f.default_factory) else None
        out += flags_of(inner, f"{prefix}{f.name}.") if inner else [f"--{prefix}{f.name}".replace("_", "-")]
    return out


FLAGS = [flag for flag in flags_of() if flag not in ("--out", "--resume", "--export")]
VALUES = st.one_of(
    ANY_TEXT,
    st.sampled_from(
        [
            "",
            "0",
            "1",
            "-1",
            "2.5",
            "nan",
            "inf",
            "-inf",
            "1e400",
            "1e-400",
            "9" * 400,
            "0x1",
            "True",
            "None",
            "authority",
            "../x",
            "data/toylm",
            "README.md",
            "builtin",
            "tinymfv",
            "nll",
            "fixed",
            "data/toylm/vignettes.jsonl",
            "data/traits/authority.toml",
            "/dev/null",
            "/proc/self/mem",
            "x" * 5000,
        ]
    ),
)
PATHS = st.one_of(
    ANY_TEXT,
    st.sampled_from(
        ["a b", "caf\u00e9/\u65e5\u672c", "x" * 300, "../..", ".", "a/../../b", "\x00", "\udcff", "file/x"]
    ),
).map(lambda p: p.lstrip("/"))


@examples(12, 0.02, shrink=False)
@given(
    st.lists(st.tuples(st.sampled_from(FLAGS), st.lists(VALUES, max_size=2)), max_size=3),
    PATHS,
    st.sampled_from(["--out", "--export", "--resume"]),
    st.booleans(),
)
def test_a_command_starts_or_ends_in_one_message(given_flags, path, flag, bare):
    with folder() as here, pytest.MonkeyPatch.context() as patch:
        base, opened = here / "a" / "b" / "c", []
        base.mkdir(parents=True)
        (base / "file").touch()

        class Opened:
            def __init__(self, cfg, preset, trait):
                assert from_dict(RunConfig, json.loads(json.dumps(jsonable(cfg)[0]))) == cfg, (
                    "what is accepted comes back from its event"
                )
                run = new_run_folder(cfg.out, f"{preset}-{cfg.trait}-s{cfg.seed}")
                assert run.parent == cfg.out
                opened.append(run)

        patch.setattr(session, "open_session", Opened)
        patch.setattr(guard, "guard", lambda session, loop: 0)
        out = ["--out", str(base / "runs")] if flag != "--out" else []
        words = [word for name, values in given_flags for word in (name, *values)]
        argv = ([] if bare and flag == "--resume" else ["fast-dev", *out, *words]) + [flag, f"{base}/{path}"]
        told = io.StringIO()
        with redirect_stderr(told), redirect_stdout(told):
            try:
                status = main(argv)
            except SystemExit as stopped:
                status = stopped.code
    assert status in (0, 2) and bool(opened) == (status == 0) or "--help" in words or "-h" in words, told.getvalue()
    assert status == 0 or told.getvalue().strip() and "Traceback" not in told.getvalue()


CONFIG = jsonable(FAST_DEV_PRESET)[0]


def kinds(value) -> dict | str:
    """The kind of each setting; a whole number may stand for a number with a point, and null for a path."""
    if isinstance(value, dict):
        return {name: kinds(item) for name, item in value.items() if name not in ("export", "resume", "prompts")}
    return "number" if type(value) in (int, float) else type(value).__name__


@examples(60, 0.13)
@given(changed(CONFIG, 2))
def test_recorded_settings_come_back_whole_or_are_refused(config):
    start = {"stage": "run_start", "round": None, "preset": "toy", "config": config}
    with folder() as here:
        (here / "events.jsonl").write_text(json.dumps(start) + "\n")
        found = accepted(lambda: recorded(here), "events.jsonl")
    if found is not None:
        again = jsonable(found[1])[0]
        assert from_dict(RunConfig, json.loads(json.dumps(again))) == found[1] and kinds(again) == kinds(CONFIG)


# --- texts -----------------------------------------------------------------------------------------------------
NLLS = st.lists(st.one_of(st.floats(0, 30), st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30])), max_size=40)


@examples(120, 0.2)
@given(st.one_of(ANY_TEXT, REPEATED), NLLS)
def test_every_text_is_scored_within_its_range(text, nlls):
    assert 0 <= repetition(text) <= 1 and 0 <= loop(text) <= 1
    ids = tuple(range(len(nlls)))
    row = judge(
        Completion(0, "p", (1,), ids, text, 1.0, 1.0, 0),
        torch.tensor(nlls, dtype=torch.float32),
        ("i am",),
        FilterCfg(),
    )
    assert all(not math.isnan(value) and value >= 0 for value in row.scores.values())
    assert set(row.reasons) <= set(row.failed) and row.kept == (not row.reasons)
    assert all(math.isfinite(x) for x in nlls) and nlls or degenerate(row), (
        "a text without a probability is never trained on"
    )


@examples(60, 0.05)
@given(st.lists(st.tuples(ANY_TEXT, ANY_TEXT), max_size=4))
def test_texts_come_back_from_events_and_results(texts):
    pairs = [
        t
        for pair in texts
        for t in pair
        if not any("\ud800" <= a <= "\udbff" and "\udc00" <= b <= "\udfff" for a, b in zip(t, t[1:]))
    ]
    with folder() as here:
        log = EventLog(here)
        for text in pairs:
            log.write("base", -1, text=text)
        log.close()
        assert [e["text"] for e in read_events(here)] == pairs
        for i, text in enumerate(pairs):
            append_result(here, {"run": str(i), "arm": text, "verdict": "v"})
        assert [(row["run"], row["verdict"]) for row in read_results(here / "results.tsv")] == [
            (str(i), "v") for i in range(len(pairs))
        ]


# --- events ----------------------------------------------------------------------------------------------------
EVENTS = run_events(n_rounds=1, n_texts=2, n_prompts=1, n_completions=3)
EVENTS = [e for i, e in enumerate(EVENTS) if e["stage"] != "heal_step" or i % 24 == 0]
SOME_EVENTS = st.one_of(
    damaged(jsonl(EVENTS)), st.integers(1, len(EVENTS)).flatmap(lambda n: changed(EVENTS[:n], 3)).map(jsonl)
)


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    """The pictures have a property of their own: they take a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "pictures", lambda run: [])
        console.start(quiet=True)
        yield


def inside(here: Path, read: Callable):
    def load():
        with reading(here):
            return read()

    return accepted(load, "events.jsonl")


@examples(40, 0.08, shrink=False)
@given(SOME_EVENTS)
def test_every_reader_of_changed_events_says_so_or_reads(content):
    with folder() as here, redirect_stderr(io.StringIO()):
        (here / "events.jsonl").write_bytes(content)
        events = accepted(lambda: read_events(here), "events.jsonl line")
        if events is not None:
            assert all(isinstance(e["stage"], str) and type(e["round"]) in (int, type(None)) for e in events)
            for read in (table, verdict, result_row):
                inside(here, lambda: read(events))
        inside(here, lambda: report.report(here))
        accepted(lambda: recorded(here), "events.jsonl", "resume is")
        accepted(lambda: reopen(here, lambda path: 0), "events.jsonl")
        assert {path.name for path in here.iterdir()} <= {"events.jsonl", "report.html", "diary.md"}


@examples(10, 0.015, shrink=False)
@given(valid_events())
def test_a_page_is_made_of_every_valid_run(events):
    with folder() as here:
        (here / "events.jsonl").write_bytes(jsonl(events))
        assert report.report(here) == here / "report.html"
        page = Page((here / "report.html").read_text(encoding="utf-8"))
        assert (
            not page.tags["script"]
            and not page.tags["iframe"]
            and {name for name, _ in page.attributes if name.startswith("on")} == set()
        )
        assert (here / "diary.md").read_text(encoding="utf-8").startswith("# Diary of")


@examples(10, 0.02, shrink=False)
@given(valid_events(frozenset()))
def test_the_console_says_every_event_of_a_run(events):
    for i, event in enumerate(events):
        console.show(event, events[: i + 1])


@examples(2, 0.003, shrink=False)
@given(valid_events())
def test_pictures_are_drawn_of_every_valid_run(events):
    from steer_heal.plot import plot

    with folder() as here:
        (here / "events.jsonl").write_bytes(jsonl(events))
        drawn = plot(here)
        assert (drawn is None) == (not any(e["stage"] == "base" for e in events))
