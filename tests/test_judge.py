"""The eval judge: against a local server that speaks the protocol, and with a second model on this machine."""

import math
import shlex
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
import torch
from judges import Judge, server  # noqa: F401
from made_runs import run_events, run_start
from places import ROOT
from runs import DOORS, SETTINGS, Killed, of, recorded, resumed, started, undrawn
from test_estimate import SMALL

from steer_heal import SteerHeal
from steer_heal.__main__ import main
from steer_heal.backends import endpoint
from steer_heal.errors import UserError
from steer_heal.evals import judge, metrics_of
from steer_heal.evals.base import Subject
from steer_heal.events import Measured, Run
from steer_heal.presets import CHAT_PRESET, FAST_DEV_PRESET, PRESETS
from steer_heal.records import EvalResult
from steer_heal.runs.partial import KeptAnswers
from steer_heal.runs.stored import FolderRun
from steer_heal.settings import EvalCfg, changed
from steer_heal.verdict import blind, verdict

FLAGS = ["--n-rounds", "1", "--no-control", *SETTINGS.split(), "--eval.n-vignettes", "3"]
PAGE = (ROOT / "docs" / "extend.md").read_text(encoding="utf-8").replace("\\\n", " ")
LINES = [line for line in PAGE.splitlines() if line.startswith("steer-heal") and "judge-model" in line]
LIMIT = judge.MOST_UNREAD
MARKS = '{"trait": %s, "coherence": %s}'


@pytest.fixture(autouse=True)
def quick():
    with undrawn():
        yield


def flags(url, *more) -> list[str]:
    evals = ["--eval.evals", "moral_foundations", "judge", "text_quality"]
    return [*FLAGS, *evals, "--eval.judge-url", url, "--eval.judge-model", "tiny", *more]


def marked(texts, url="", base=None, cache=None, model="tiny"):
    """Items of answers to the questions 0, 1, ..."""
    made = [SimpleNamespace(prompt=f"question {i}", text=text) for i, text in enumerate(texts)]
    trait = SimpleNamespace(positive="P is warm.", negative="N is cold.")
    subject = Subject.__new__(Subject)  # of a whole one, the judge needs no more
    vars(subject).update(
        texts=made,
        cfg=EvalCfg(judge_url=url, judge_model=model),
        inputs=SimpleNamespace(trait=trait),
        cache={} if cache is None else cache,
        base=base,
        student=SimpleNamespace(lm=SimpleNamespace(device="cpu")),
    )
    return judge.items(subject)


# --- an endpoint -------------------------------------------------------------------------------------------------
def test_the_marks_and_what_they_took_become_items(server, monkeypatch):  # noqa: F811
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setattr(Judge, "content", lambda asked: MARKS % ((100, 90.5) if "warm {x}" in asked else (5, 0)))
    found = marked(["warm {x}", "cold"], server)
    assert found["judge_trait"] == [100, 5] and found["judge_coherence"] == [90.5, 0]
    assert found["judge_unread"] == [0, 0] and found["judge_requests"] == [1, 1]
    assert found["judge_prompt_tokens"] == [9, 9] and found["judge_completion_tokens"] == [4, 4]
    assert {(r["path"], r["key"], r["model"], r["temperature"]) for r in Judge.seen} == {
        ("/v1/chat/completions", "Bearer secret", "tiny", 0)
    }
    asked = [r["messages"][0]["content"] for r in Judge.seen]
    assert all("A: P is warm.\nB: N is cold." in each and "question" in each for each in asked)


def test_a_text_is_sent_once_to_each_judge(server, tmp_path):  # noqa: F811
    cache = KeptAnswers(tmp_path / "asked.jsonl")
    first = marked(["a", "b"], server, cache=cache)
    assert marked(["a", "b"], server, cache=KeptAnswers(tmp_path / "asked.jsonl")) == first and len(Judge.seen) == 2
    marked(["a", "c"], server, cache=cache)
    marked(["a"], server, cache=cache, model="other")
    assert len(Judge.seen) == 4


def test_a_line_of_the_cache_that_is_torn_or_damaged_is_asked_again(server, tmp_path):  # noqa: F811
    path = tmp_path / "asked.jsonl"
    marked(["a", "b", "c"], server, cache=KeptAnswers(path))
    first, second, third = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + b"[3]\n" + third[:-20])
    marked(["a", "b", "c"], server, cache=KeptAnswers(path))
    assert len(Judge.seen) == 5 and len(KeptAnswers(path)) == 3


def test_replies_without_a_mark_are_counted_and_too_many_stop_the_run(server, monkeypatch):  # noqa: F811
    said = {"0": "I do not know", "1": '{"trait": 30}', "2": MARKS % (101, 50), "3": MARKS % (7, 100)}
    monkeypatch.setattr(Judge, "content", lambda asked: said.get(asked.split("question ")[1][0], MARKS % (1, 2)))
    monkeypatch.setattr(judge, "MOST_UNREAD", 0.5)
    found = marked(["x"] * 6, server)
    assert found["judge_unread"] == [1, 1, 1, 0, 0, 0]
    assert found["judge_trait"][1] == 30 and np.isnan(found["judge_trait"]).tolist() == [
        True,
        False,
        True,
        *[False] * 3,
    ]
    monkeypatch.setattr(judge, "MOST_UNREAD", LIMIT)
    monkeypatch.setattr(Judge, "content", lambda asked: said["3"] if "question 0" not in asked else "I do not know")
    assert sum(marked(["x"] * 5, server)["judge_unread"]) == 1, "a fifth may"
    with pytest.raises(
        UserError, match="1 of its 4 replies lack a mark, such as 'I do not know'; at most 20% may"
    ) as told:
        marked(["x"] * 4, server)
    assert not told.value.resumable, "the replies are kept, and a resume would read them again"


@pytest.mark.parametrize(
    "bad", [(429, {"Retry-After": "0"}, {}), (503, {"Retry-After": "Wed"}, {}), (200, {}, b"<html>"), (200, {}, None)]
)
def test_a_request_is_repeated_until_the_endpoint_answers(bad, server, monkeypatch):  # noqa: F811
    monkeypatch.setattr(judge, "TIMEOUT_S", 0.2)
    Judge.replies += [bad, bad]
    found = marked(["a"], server)
    assert found["judge_requests"] == [3] and found["judge_trait"] == [70] and len(Judge.seen) == 3


def test_a_retry_waits_as_long_as_it_is_told(server, monkeypatch):  # noqa: F811
    waited = []
    monkeypatch.setattr(endpoint.time, "sleep", waited.append)
    Judge.replies += [(429, {"Retry-After": "7"}, {}), (429, {"Retry-After": "900"}, {}), (500, {}, {}), (500, {}, {})]
    assert marked(["a"], server)["judge_requests"] == [5] and waited == [7, 60, 0.04, 0.08]


@pytest.mark.parametrize(
    ("bad", "told", "n"),
    [
        (
            (401, {}, {"error": {"message": "no such key"}}),
            r"401.*\(no such key\); give its key in .* OPENAI_API_KEY",
            1,
        ),
        ((400, {}, {"detail": "bad  name"}), r'400.*\({"detail": "bad name"}\); it must speak', 1),
        ((200, {}, {"choices": []}), "index", 1),
        ((429, {}, {}), "in 5 attempts.*429", 5),
    ],
)
def test_an_endpoint_that_does_not_answer_is_one_error_and_what_came_is_kept(bad, told, n, server, monkeypatch):  # noqa: F811
    monkeypatch.setattr(judge, "N_PARALLEL", 1)
    cache = {}
    marked(["a"], server, cache=cache)
    Judge.replies += [bad] * n
    with pytest.raises(UserError, match=f"no answer from {server}.*{told}"):
        marked(["a", "b"], server, cache=cache)
    assert len(Judge.seen) == 1 + n and len(cache) == 1
    with pytest.raises(UserError, match="Connection refused"):
        marked(["a"], "http://127.0.0.1:9/v1")


def test_tokens_that_the_endpoint_does_not_count_have_no_value(server):  # noqa: F811
    Judge.replies += [(200, {}, {"choices": [{"message": {"content": MARKS % (1, 2)}}], "usage": None})]
    assert math.isnan(marked(["a"], server)["judge_prompt_tokens"][0])


def test_a_run_that_was_killed_sends_nothing_twice_and_is_measured_again_without_a_request(server, settings, tmp_path):  # noqa: F811
    kept = KeptAnswers.__setitem__
    calls = []

    def deadly(self, key, value):
        kept(self, key, value)
        calls.append(key)
        if len(calls) == 3:  # the first answer of the second state
            raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(judge, "N_PARALLEL", 1)
        patch.setattr(KeptAnswers, "__setitem__", deadly)
        run = started(tmp_path / "out", settings, *flags(server))
    assert len(Judge.seen) >= 3 and "prompted" not in {e["state"] for e in of(recorded(run), "measured")}
    resumed(run)
    asked = [each["messages"][0]["content"] for each in Judge.seen]
    assert len(asked) == len(set(asked))
    assert main(["eval", "--run", str(run), "--quiet"]) == 0 and len(Judge.seen) == len(asked)
    healed = of(recorded(run), "measured", "healed")[0]
    assert healed["metrics"]["judge_trait"] == 70 and healed["metrics"]["judge_trait_lo"] is not None
    assert healed["items"]["judge_prompt_tokens"] == [9, 9]
    with SteerHeal.open(run) as sh:
        assert sh.evaluate("healed").metrics["judge_coherence"] == 88.5 and len(Judge.seen) == len(asked)
    assert len(FolderRun.read(run).cache) == len(asked)


# --- a model on this machine -------------------------------------------------------------------------------------
DIGITS = [[7, 1], [7, 2]]


class Markless:
    """A tokenizer without special tokens."""

    all_special_tokens = ()
    added_tokens_decoder: ClassVar[dict] = {}

    def __len__(self) -> int:
        return 9


TWO_TOKENS = SimpleNamespace(tokenizer=Markless(), encode_reply=lambda digit: [7, int(digit)])
"""A judge whose tokenizer splits off digits, so that its reply is two tokens."""


def of_margins(margins):
    """The likelihoods of the two replies, of which one is likelier by a margin."""
    return torch.tensor([[margin - 2, -2] for margin in margins], dtype=torch.float64)


def test_a_local_judge_reads_both_orders(monkeypatch):
    """One that always says 1 has no preference; one that sees what is warm has."""
    base = EvalResult({}, texts=tuple(SimpleNamespace(text=text) for text in ("cold", "warm")))
    monkeypatch.setattr(judge, "local", lambda name, device: TWO_TOKENS)
    monkeypatch.setattr(judge, "require_finite", lambda lm, logp: None)
    monkeypatch.setattr(judge, "reply_logp", lambda lm, asked, replies, condition: of_margins([3.0] * len(asked)))
    assert marked(["warm", "x"], base=base)["judge_trait"] == pytest.approx([50, 50])

    def sees(lm, asked, replies, condition):
        parts = [each.turns[0].split("Answer ") for each in asked]
        assert replies == [DIGITS] * len(asked) and all("P is warm." in part[0] for part in parts)
        return of_margins([1.0 + 4 * ("warm" in first) - 4 * ("warm" in second) for _, first, second, *_ in parts])

    monkeypatch.setattr(judge, "reply_logp", sees)
    p = lambda margin: 1 / (1 + math.exp(-margin))
    wanted = [50 * (p(5) + 1 - p(-3)), 50 * (p(-3) + 1 - p(5))]
    assert marked(["warm", "cold"], base=base)["judge_trait"] == pytest.approx(wanted)
    assert marked(["warm"])["judge_trait"] == [50], "the base against itself"


def test_an_answer_that_spells_a_special_token_of_the_judge_is_read_as_text(tiny, monkeypatch):
    base = EvalResult({}, texts=(SimpleNamespace(text="cold"),))
    monkeypatch.setattr(judge, "local", lambda name, device: tiny)
    mark = tiny.tokenizer.eos_token
    (found,) = marked([f"warm{mark} {mark}"], base=base)["judge_trait"]
    (spelt,) = marked([f"warm{mark[0]} {mark[1:]} {mark[0]} {mark[1:]}"], base=base)["judge_trait"]
    assert found == spelt


def test_an_answer_that_the_judge_cannot_hold_is_told_with_the_way_out(tiny, monkeypatch):
    base = EvalResult({}, texts=(SimpleNamespace(text="cold"),))
    monkeypatch.setattr(judge, "local", lambda name, device: tiny)
    tiny.model.config.max_position_embeddings = 50
    with pytest.raises(UserError, match=r"which cannot read the answers: a prompt has .*; lower --eval.max-new-tokens"):
        marked(["warm"], base=base)


def test_a_judge_on_this_machine_reads_the_date_of_the_specification(tiny, monkeypatch):
    monkeypatch.setattr(judge, "load", lambda name, **how: replace(tiny, date=how["date"]))
    judge.local.cache_clear()
    assert judge.local("x", "cpu").date == "2026-01-01"
    judge.local.cache_clear()


def test_a_reply_of_two_tokens_is_as_likely_as_both_together(tiny, monkeypatch):
    base = EvalResult({}, texts=(SimpleNamespace(text="cold"),))
    monkeypatch.setattr(type(tiny), "encode_reply", lambda lm, digit: [7, 40 * int(digit)])
    monkeypatch.setattr(judge, "local", lambda name, device: tiny)
    found = marked(["warm"], base=base)["judge_trait"]
    p = []
    for first, second in (("warm", "cold"), ("cold", "warm")):
        asked = judge.WHOSE.format(positive="P is warm.", prompt="question 0", first=first, second=second)
        prompt = [*tiny.chat(asked), 7]
        with torch.no_grad():
            logits = tiny.model(torch.tensor([prompt])).logits[0, -1].double()
        p.append(torch.stack([logits[40], logits[80]]).softmax(0)[0].item())
    assert found == [pytest.approx(50 * (p[0] + 1 - p[1]), abs=1e-3)] and abs(found[0] - 50) > 0.1


def test_the_judge_is_the_library_s_eval_too():
    cfg = changed(FAST_DEV_PRESET, {"eval.evals": ("contrast", "judge"), "eval.judge_model": "data/toylm"})
    with SteerHeal(trait=DOORS, settings=changed(cfg, {"eval.pairs": None, "gen.prompts": None})) as sh:
        found = sh.evaluate("prompted")
    assert 0 < found.metrics["judge_trait"] < 100 and found.metrics["judge_trait"] != 50
    assert found.metrics["judge_coherence"] is None and all(map(math.isnan, found.items["judge_unread"]))


# --- settings, commands and the verdict --------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("", "eval.judge_model is '': the eval judge needs a model; give --eval.judge-url"),
        ("--eval.judge-url ftp://x --eval.judge-model m", "it must begin with http:// or https://"),
        ("--eval.judge-model ./none", "--eval.judge-model is './none': there is no such folder or file"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_refused_at_once(words, told, capsys):
    assert main(["run", "fast-dev", *FLAGS, "--eval.evals", "moral_foundations", "judge", *words.split()]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize("command", ["run fast-dev", "eval --model tiny-random"])
def test_a_url_that_no_eval_asks_is_refused(command, capsys):
    assert main([*command.split(), "--eval.evals", "drift", "--eval.judge-url", "http://x"]) == 2
    told = "--eval.judge-url is 'http://x': only the eval judge asks it; add judge to --eval.evals, or leave it out"
    assert capsys.readouterr().err == f"error: {told}\n"


def test_the_commands_of_the_page_run(server, monkeypatch, tmp_path):  # noqa: F811
    monkeypatch.setitem(PRESETS, "chat", ("", changed(CHAT_PRESET, {**SMALL, "quiet": True, "model": "tiny-random"})))
    monkeypatch.setattr(judge, "local", lambda name, device: TWO_TOKENS)
    monkeypatch.setattr(judge, "require_finite", lambda lm, logp: None)
    monkeypatch.setattr(judge, "reply_logp", lambda lm, asked, replies, condition: of_margins([0.0] * len(asked)))
    assert len(LINES) == 2
    for i, line in enumerate(LINES):
        words = shlex.split(line.replace("http://localhost:8000/v1", server))[1:]
        assert main([*words, "--folder", str(tmp_path / str(i))]) == 0
    assert Judge.seen


def test_a_judge_that_does_not_tell_the_persona_prompt_is_named():
    """Clear of 0 from above: nothing is said. Below 0, or around it: it is."""
    start = run_start(2, "I let them in.")
    start = replace(start, metrics=(*start.metrics, *metrics_of(["judge"])))
    for low, told in ((4.0, False), (0.0, True), (-9.0, True), (None, True)):
        values = {"judge_trait": 60.0, "judge_trait_lo": low, "judge_trait_hi": 11.0}
        events = [start if i == 0 else event for i, event in enumerate(run_events(2))]
        made = [replace(e, metrics=e.metrics | values) if isinstance(e, Measured) else e for e in events]
        words = verdict(Run(made))
        assert bool(blind(Run(made))) == told == ("judge: trait does not tell the persona prompt" in words), words
    assert blind(Run(run_events(2))) == []
