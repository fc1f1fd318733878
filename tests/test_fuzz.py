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
from types import SimpleNamespace

import pytest
import torch
from damage import ANY_TEXT, REPEATED, as_rows, chained, changed, damaged, encode_text, jsonl, toml, valid_events
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from loguru import logger
from made_runs import Page, measured, run_events

from steer_heal import bench
from steer_heal import loop as loop_module
from steer_heal.__main__ import main
from steer_heal.commands import run as run_command
from steer_heal.errors import UserError, printable, validated
from steer_heal.events import HealStepped, Run, RunEnd, decode
from steer_heal.inputs import traits
from steer_heal.inputs.files import DATA, parse_texts, parse_toml, read_file
from steer_heal.inputs.instruments import FOUNDATIONS, parse_instrument, parse_likelihood, parse_vignettes
from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.records import Completion
from steer_heal.report import console, page, plot
from steer_heal.runs import verify
from steer_heal.runs.begin import new_run_folder
from steer_heal.runs.log import EventLog, read_events, schema_errors
from steer_heal.runs.results import append_result, read_results, result_row
from steer_heal.runs.resume import recorded_settings, truncate_events
from steer_heal.runs.stored import FolderRun
from steer_heal.settings import FilterCfg, RunConfig, as_json
from steer_heal.stages.filter import degenerate, loop, repetition, score_text
from steer_heal.verdict import table, verdict

TOTAL = int(os.environ.get("FUZZ", 0))
"""Random examples over all properties; 0: the short run."""


def examples(short: int, share: float, shrink: bool = True) -> settings:
    """`short` examples, always the same, or this property's share of TOTAL new ones; without `shrink` a failure is
    shown as it was met."""
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
    """What `load` returns, or None after a UserError that names one of `words`; any other exception is a bug."""
    try:
        return load()
    except UserError as error:
        assert error.problems and all(any(word in line for word in words) for line in error.problems), error
        return None


# --- files -------------------------------------------------------------------------------------------------------
TRAIT_FILES = [traits.TRAITS / f"{name}.toml" for name in ("authority", "love")]
INSTRUMENT = DATA / "toylm" / "instrument.toml"
LIKELIHOOD = DATA / "instruments" / "likelihood.toml"
VIGNETTES = (DATA / "toylm" / "vignettes.jsonl").read_bytes().splitlines(keepends=True)[:6]


def some_toml(path: Path):
    return st.one_of(damaged(path.read_bytes()), changed(parse_toml(read_file(path)), 2).map(toml))


ROWS = [json.loads(line) for line in VIGNETTES]
SOME_ROWS = st.one_of(damaged(b"".join(VIGNETTES)), changed(ROWS, 3).map(jsonl))


@examples(60, 0.14)
@given(st.one_of(map(some_toml, TRAIT_FILES)), st.sampled_from(["mine", "mine/inner", "mine/", "mine/x", "../mine"]))
def test_a_trait_file_loads_or_is_named(content, name):
    with folder() as here, pytest.MonkeyPatch.context() as patch:
        (here / "mine.toml").write_bytes(content)
        patch.setattr(traits, "TRAITS", here)
        trait = accepted(lambda: traits.load_trait(name), "mine.toml", "trait is")
    if trait is not None:
        assert trait.sign in (-1, 1) and trait.positive.strip() != trait.negative.strip()
        texts = (*trait.prompts, *trait.narration, trait.positive, trait.negative, trait.target, trait.steered_system)
        assert all(text.encode() or text == "" for text in texts), "what is taken can be tokenized"


@examples(60, 0.14)
@given(some_toml(INSTRUMENT))
def test_an_instrument_asks_or_is_named(content):
    with folder() as here:
        (here / "i.toml").write_bytes(content)
        instrument = accepted(lambda: parse_instrument(read_file(here / "i.toml")), "i.toml")
    if instrument is not None:
        asked = [instrument.question("A scene.", order) for order in instrument.frames]
        assert all("A scene." in question for question in asked) and sorted(instrument.order) == sorted(FOUNDATIONS)


@examples(60, 0.14)
@given(some_toml(LIKELIHOOD))
def test_replies_are_read_or_named(content):
    with folder() as here:
        (here / "i.toml").write_bytes(content)
        instrument = accepted(lambda: parse_likelihood(read_file(here / "i.toml")), "i.toml")
    if instrument is not None:
        assert "A scene." in instrument.question("A scene.") and sorted(instrument.answers) == sorted(FOUNDATIONS)
        assert all(text.strip() and text.encode() for texts in instrument.answers.values() for text in texts)


@examples(60, 0.2)
@given(SOME_ROWS)
def test_rows_load_or_name_their_line(content):
    with folder() as here:
        path = here / "rows.jsonl"
        path.write_bytes(content)
        named = ("rows.jsonl line", "rows.jsonl has no rows")
        vignettes = accepted(lambda: parse_vignettes(read_file(path)), *named)
        prompts = accepted(lambda: parse_texts(read_file(path)), *named)
    for v in vignettes or ():
        assert {v.foundation, v.also} <= {*FOUNDATIONS, None}
    assert len({v.id for v in vignettes or ()}) == len(vignettes or ())
    assert all(text.encode() for text in (*(prompts or ()), *(v.text for v in vignettes or ())))


# --- settings ----------------------------------------------------------------------------------------------------
def flags_of(kind: type = RunConfig, prefix: str = "") -> list[str]:
    """Every flag of the command."""
    out = []
    for f in fields(kind):
        inner = f.default_factory if is_dataclass(f.default_factory) else None
        out += flags_of(inner, f"{prefix}{f.name}.") if inner else [f"--{prefix}{f.name}".replace("_", "-")]
    return out


FLAGS = [flag for flag in flags_of() if flag not in ("--out", "--folder")]
WORDS = (
    "0 1 -1 2.5 nan inf -inf 1e400 1e-400 0x1 True None authority ../x data/toylm README.md builtin tinymfv fixed "
    "data/toylm/vignettes.jsonl data/traits/authority.toml /dev/null /proc/self/mem"
)
VALUES = st.one_of(ANY_TEXT, st.sampled_from(["", "9" * 400, "x" * 5000, *WORDS.split()]))
ODD_PATHS = ["a b", "caf\u00e9/\u65e5\u672c", "x" * 300, "../..", ".", "a/../../b", "\x00", "\udcff", "file/x"]
PATHS = st.one_of(ANY_TEXT, st.sampled_from(ODD_PATHS)).map(lambda path: path.lstrip("/"))


@examples(12, 0.02, shrink=False)
@given(
    st.lists(st.tuples(st.sampled_from(FLAGS), st.lists(VALUES, max_size=2)), max_size=3),
    PATHS,
    st.sampled_from(["--out", "--folder", "resume", "verify"]),
    st.booleans(),
)
def test_a_command_starts_or_ends_in_one_message(given_flags, path, flag, bare):
    with folder() as here, pytest.MonkeyPatch.context() as patch:
        base, opened = here / "a" / "b" / "c", []
        base.mkdir(parents=True)
        (base / "file").touch()

        @contextmanager
        def opening(cfg, inputs, *, preset, command):
            assert validated(RunConfig, as_json(cfg), "config") == cfg, "what is taken comes back from its event"
            run = new_run_folder(cfg.out, f"{preset}-{cfg.trait}-s{cfg.seed}")
            assert run.parent == cfg.out
            opened.append(run)
            yield SimpleNamespace(loop=None, end=lambda **_: 0)

        patch.setattr(run_command, "running", opening)
        patch.setattr(loop_module, "run_loop", lambda loop: None)
        out = ["--out", str(base / "runs")] if flag != "--out" else []
        words = [word for name, values in given_flags for word in (name, *values)]
        own, first = [flag, f"{base}/{path}"], flag in ("resume", "verify")
        argv = [*own, *([] if bare else words)] if first else ["run", "fast-dev", *out, *words, *own]
        told = io.StringIO()
        with redirect_stderr(told), redirect_stdout(told):
            try:
                status = main(argv)
            except SystemExit as stopped:
                status = stopped.code
    assert status in (0, 2) and bool(opened) == (status == 0) or {"--help", "-h"} & {*words}, told.getvalue()
    assert status == 0 or told.getvalue().strip() and "Traceback" not in told.getvalue()


CONFIG = as_json(FAST_DEV_PRESET)


NULLABLE = ("folder", "prompts", "pairs", "out", "temperature", "top_p", "rehearsal_prompts")


def kinds(value) -> dict | str:
    """The kind of each setting; a whole number may stand for a number with a point, and null for a path or for what the
    model's own settings say."""
    if isinstance(value, dict):
        return {name: kinds(item) for name, item in value.items() if name not in NULLABLE}
    return "number" if type(value) in (int, float) else type(value).__name__


@examples(60, 0.13)
@given(changed(CONFIG, 2))
def test_recorded_settings_come_back_whole_or_are_refused(config):
    start = as_rows(run_events(1))[0] | {"config": config}
    with folder() as here:
        (here / "events.jsonl").write_text(json.dumps(start) + "\n")
        found = accepted(lambda: recorded_settings(here), "events.jsonl")
    if found is not None:
        again = as_json(found)
        assert validated(RunConfig, again, "config") == found and kinds(again) == kinds(CONFIG)


# --- texts -------------------------------------------------------------------------------------------------------
NLLS = st.lists(st.one_of(st.floats(0, 30), st.sampled_from([math.nan, math.inf, -math.inf, 1e30, -1e30])), max_size=40)


@examples(120, 0.2)
@given(st.one_of(ANY_TEXT, REPEATED), NLLS)
def test_every_text_is_scored_within_its_range(text, nlls):
    assert 0 <= repetition(text) <= 1 and 0 <= loop(text) <= 1
    completion = Completion(0, "p", (1,), tuple(range(len(nlls))), text, 1.0, 1.0, 0)
    row = score_text(
        completion,
        nll=torch.tensor(nlls, dtype=torch.float32),
        alone=torch.tensor(nlls[::-1], dtype=torch.float32),
        narration=("i am",),
        cfg=FilterCfg(),
    )
    assert not any(map(math.isnan, row.scores.values()))
    assert all(value >= 0 for name, value in row.scores.items() if name != "relevance")
    assert {*row.reasons} <= {*row.failed} and row.kept == (not row.reasons)
    assert nlls and all(map(math.isfinite, nlls)) or degenerate(row), "text without a probability is never trained on"


def is_text(text: str) -> bool:
    """Without a surrogate pair, which JSON reads as the one character it stands for."""
    return text == text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")


@examples(15, 0.05)
@given(st.lists(ANY_TEXT.filter(is_text), max_size=8))
def test_texts_come_back_from_events_and_results(texts):
    with folder() as here:
        log = EventLog(here)
        for i, text in enumerate(texts):
            log.write(measured("steered", 0, 1, 1, text))
            append_result(here, {"run": str(i), "arm": text, "verdict": "v"})
        log.close()
        assert [e.texts[0].text for e in read_events(here)] == [encode_text(text) for text in texts]
        rows = read_results(here / "results.tsv")
    assert [(row["run"], row["verdict"]) for row in rows] == [(str(i), "v") for i in range(len(texts))]


# --- events ------------------------------------------------------------------------------------------------------
EVENTS = [e for i, e in enumerate(as_rows(run_events(1, 2, 1, 3))) if e["event"] != "heal_step" or i % 24 == 0]
SOME_EVENTS = st.one_of(
    damaged(jsonl(EVENTS)), st.integers(1, len(EVENTS)).flatmap(lambda n: changed(EVENTS[:n], 3)).map(chained)
)


@pytest.fixture(scope="module", autouse=True)
def undrawn():
    """The pictures have a property of their own: they take a second."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(page, "pictures", lambda run: [])
        patch.setattr(plot, "data_uri", lambda figure: "data:image/svg+xml;base64,")  # of the curves of heals
        patch.setattr(verify, "changed_weights", lambda folder, now: None)
        patch.setattr(bench, "read_model", lambda cfg: None)
        patch.setattr(bench, "weights_of", lambda lm: None)
        console.start(quiet=True)
        yield


@examples(40, 0.08, shrink=False)
@given(SOME_EVENTS)
def test_every_reader_of_changed_events_says_so_or_reads(content):
    def inside(read):
        with schema_errors(here):
            return read()

    with folder() as here, redirect_stderr(io.StringIO()):
        (here / "events.jsonl").write_bytes(content)
        events = accepted(lambda: read_events(here), "events.jsonl line")
        for read in (table, verdict, result_row) if events is not None else ():
            accepted(lambda read=read: inside(lambda: read(FolderRun.read(here))), "events.jsonl", "the run has no")
        accepted(lambda: inside(lambda: page.save(FolderRun.read(here), here)), "events.jsonl", "the run has no")
        problems = accepted(lambda: verify.violations(here), "events.jsonl")
        assert problems is None or all(isinstance(problem, str) for problem in problems)
        accepted(lambda: recorded_settings(here), "events.jsonl")
        left = accepted(lambda: truncate_events(here), "events.jsonl")
        assert left is None or str(left) == str(read_events(here))
        assert {path.name for path in here.iterdir()} <= {"events.jsonl", "report.html", "diary.md"}


@examples(10, 0.015, shrink=False)
@given(valid_events())
def test_a_page_is_made_of_every_valid_run(events):
    with folder() as here:
        page.save(Run(decode(json.dumps(event)) for event in events), here)
        html = Page((here / "report.html").read_text(encoding="utf-8"))
        assert (here / "diary.md").read_text(encoding="utf-8").startswith("# Diary of")
    assert not html.tags["script"] and not html.tags["iframe"]
    assert not any(name.startswith("on") for name, _ in html.attributes)


SILENT = (HealStepped, RunEnd)


@examples(10, 0.02, shrink=False)
@given(valid_events())
def test_the_console_says_each_event_in_one_printable_message(events):
    said = []
    sink = logger.add(lambda line: said.append(line.record["message"]), format="{message}", level="INFO")
    try:
        run = Run()
        found = [decode(json.dumps(event)) for event in events]
        for event in found:
            run.add(event)
            console.show(event, run)
    finally:
        logger.remove(sink)
    assert len(said) == sum(not isinstance(event, SILENT) for event in found)
    assert all(message.strip() and message == printable(message) for message in said)


@examples(2, 0.003, shrink=False)
@given(valid_events())
def test_pictures_are_drawn_of_every_valid_run(events):
    with folder() as here:
        plot.save(Run(decode(json.dumps(event)) for event in events), here)
        assert (here / "trajectory.png").exists() == any(e.get("state") == "base" for e in events)
