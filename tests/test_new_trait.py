"""A trait of two sentences: its file, what a model drafts for it, and a first try without a file."""

import json
import re
import threading
import tomllib
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from runs import undrawn
from test_estimate import SMALL, flag

from steer_heal.__main__ import main
from steer_heal.check import check
from steer_heal.commands.run import parse
from steer_heal.draft import (
    BRIEF,
    CONTRAST,
    FEWEST_PAIRS,
    N_PAIRS,
    N_PROMPTS,
    Asked,
    Writer,
    _lines,
    draft,
    fault,
    unlike,
    writer,
)
from steer_heal.errors import UserError
from steer_heal.inputs import load_inputs
from steer_heal.inputs.alike import alike
from steer_heal.inputs.new_trait import trait_text
from steer_heal.inputs.pairs import Pair
from steer_heal.inputs.traits import TraitFile, available, load_trait, read_trait
from steer_heal.model.decode import Decoding, Part, Row, decode
from steer_heal.model.lm import load
from steer_heal.presets import CHAT_PRESET
from steer_heal.records import derive_seed
from steer_heal.report.console import Bar
from steer_heal.runs.stored import FolderRun

BLUNT, FLATTERING = "You are blunt: you say it in bare words.", "You are flattering: you say it in sweet words."
HOSTILE = 'You say "yes\\n", \\ and\nthen ] = \x7f {prompts}.'


# --- the file ----------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    "prompts, pairs", [([], []), (["a{}", HOSTILE], [Pair("p", HOSTILE, "b"), Pair("q", "c", "d")])]
)
def test_the_file_says_what_it_was_given_and_names_every_field(prompts, pairs, tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(trait_text(HOSTILE, FLATTERING, prompts, pairs, "A note."), encoding="utf-8")
    found = read_trait(str(file))[1]
    assert found.persona is not None and (found.persona.positive, found.persona.negative) == (HOSTILE, FLATTERING)
    assert (list(found.prompts), list(found.pairs)) == (prompts, pairs)
    for name in TraitFile.__dataclass_fields__:
        assert re.search(rf"^(# )?\[*{name}\b", file.read_text(encoding="utf-8"), re.MULTILINE), name


def test_the_command_for_a_file_without_pairs_passes_all_checks(tmp_path, capsys):
    file = tmp_path / "mine.toml"
    assert main(["new-trait", str(file), "--positive", BLUNT, "--negative", FLATTERING]) == 0
    *_, with_pairs, without = capsys.readouterr().out.strip().splitlines()
    assert with_pairs == f"wrote {file}; add pairs, then: steer-heal run chat --trait {file}"
    words = without.removeprefix("or without pairs: steer-heal run ").split()
    _, cfg, _ = parse([*words, "--model", "tiny-random", "--out", str(tmp_path)])
    assert check(cfg).trait.target == "persona_log_odds"


def test_what_may_be_empty_may_be_left_out(tmp_path):
    (tmp_path / "least.toml").write_text('[persona]\npositive = "You open doors."\nnegative = "You lock doors."\n')
    (tmp_path / "whole.toml").write_text(trait_text("You open doors.", "You lock doors."))
    least, whole = (
        load_inputs(replace(CHAT_PRESET, trait=str(tmp_path / f"{name}.toml"))) for name in ("least", "whole")
    )
    assert (least.trait.prompts, least.targets, least.trait.sign) == (whole.trait.prompts, whole.targets, 1)
    assert len(least.prompts) == 36 and len(least.eval_prompts) == 12 and not {*least.prompts} & {*least.eval_prompts}


def test_every_mistake_in_the_arguments_is_told_at_once(tmp_path, capsys):
    (tmp_path / "is.there").touch()
    assert main(["new-trait", str(tmp_path / "is.there"), "--positive", "Be kind.", "--negative", " Be kind. "]) == 2
    told = capsys.readouterr().err
    assert "3 problems" in told and "must end in .toml" in told and "it exists" in told and "must be different" in told


# --- drafts ------------------------------------------------------------------------------------------------------
def stub(n_messages: int, answer=lambda side, i: f"{side} answer {i} stands here in full.") -> Writer:
    """Writes messages where it is asked for some, and otherwise an answer that differs by persona."""
    made = iter(range(10**6))

    def write(asked, max_new_tokens):
        if not asked[0].persona:
            each = -(-n_messages // len(asked))
            numbers = [[next(made) for _ in range(each)] for _ in asked]
            line = '{k}. "How is cake{n} with tea{n} and bread{n}?"'
            return ["\n".join(line.format(k=k, n=n) for k, n in enumerate(own)) for own in numbers]
        sides = [
            "Sour words of an honest" if "blunt" in each.persona else "Sweet praise from a gentle" for each in asked
        ]
        return [answer(side, i) for i, side in enumerate(sides)]

    return write


@pytest.mark.parametrize("n_messages", [0, 40, 400])
def test_drafts_are_whole_and_held_out(n_messages, tmp_path):
    prompts, pairs, note = draft(BLUNT, FLATTERING, stub(n_messages))
    assert len(prompts) == N_PROMPTS and len(pairs) == N_PAIRS
    forms = [alike(text) for text in (*prompts, *(pair.prompt for pair in pairs))]
    assert len({*forms}) == len(forms), "no prompt stands twice"
    assert all(pair.positive.startswith("Sour") and pair.negative.startswith("Sweet") for pair in pairs)
    n_own = sum(text.startswith("How is cake") for text in prompts)
    bundled = {text for name in available() for text in load_trait(name).prompts}
    assert sum(text in bundled for text in prompts) == N_PROMPTS - n_own
    assert f"{n_own} of the {N_PROMPTS} prompts" in note and (n_own == N_PROMPTS) == (n_messages == 400)
    (tmp_path / "mine.toml").write_text(trait_text(BLUNT, FLATTERING, prompts, pairs, note))
    inputs = load_inputs(replace(CHAT_PRESET, trait=str(tmp_path / "mine.toml")))
    assert len(inputs.pairs) == N_PAIRS and len(inputs.prompts) == 36


def test_messages_that_repeat_each_other_or_a_persona_are_left_out():
    texts = [
        "How do I like my cake?",
        "Do I like my cake, how?",
        BLUNT,
        f"Remember: {BLUNT}",
        "Is it too late for tea?",
    ]
    assert unlike(iter(texts), (BLUNT, FLATTERING)) == [texts[0], texts[-1]]


@pytest.mark.parametrize("n_faulty, n_asked", [(0, [20, 176]), (2, [20, 176]), (6, [20, 176, 132, 100])])
def test_only_prompts_without_a_pair_are_answered_again_until_there_are_enough(n_faulty, n_asked):
    write = stub(400, lambda side, i: "No." if i % 8 < n_faulty else f"{side} answer {i} stands here in full.")
    asked = []

    def counted(requests, max_new_tokens):
        asked.append(len(requests))
        return write(requests, max_new_tokens)

    _, pairs, _ = draft(BLUNT, FLATTERING, counted)
    assert asked == n_asked and len(pairs) == min(N_PAIRS, 22 + 16 + 12 if n_faulty == 6 else N_PAIRS)
    assert all(pair.positive.startswith("Sour") and pair.negative.startswith("Sweet") for pair in pairs)


def test_a_model_whose_pairs_are_all_faulty_is_refused():
    with pytest.raises(UserError, match=f"fewer than {FEWEST_PAIRS} .*a side does not answer"):
        draft(BLUNT, FLATTERING, stub(400, lambda side, i: "No."))


GOOD = "It is far too dry. Bake it for ten minutes less."
SWEET = "What a dream, you gifted cook! Only take it out sooner."


@pytest.mark.parametrize(
    "positive, negative, told",
    [
        (GOOD, SWEET, ""),
        ("", SWEET, "a side does not answer"),
        ("Dry as dust.", SWEET, "a side does not answer"),
        (GOOD, SWEET[:-1], "a side breaks off"),
        (
            "\u092f\u0939 \u0915\u0947\u0915 \u0938\u0942\u0916\u093e \u0939\u0948\u0964",
            "\u0906\u092a \u092c\u0939\u0941\u0924 \u0905\u091a\u094d\u091b\u0947 \u0939\u0948\u0902\u0964",
            "",
        ),
        (GOOD, f"{SWEET} {SWEET}", "the lengths differ"),
        (GOOD, GOOD.replace("ten", "two"), "the sides hardly differ"),
        (GOOD, "How is my cake with lemon? What a dream it is, cook!", "one side alone copies the prompt"),
        ("\u8fd9\u4e2a\u86cb\u7cd5\u592a\u5e72\u4e86\u3002", "\u4f60\u505a\u7684\u5f88\u597d\u5403\u3002", ""),
    ],
)
def test_a_degenerate_pair_is_told(positive, negative, told):
    assert fault("How is my cake with lemon and mint?", positive, negative) == told
    assert fault("How is my cake with lemon and mint?", negative, positive) == told


class Endpoint(BaseHTTPRequestHandler):
    seen: list[dict] = []

    def do_GET(self):
        self._send({"data": [{"id": "first"}, {"id": "second"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Endpoint.seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
        self._send({"choices": [{"message": {"content": f" to {body['messages'][-1]['content']} "}}]})

    def _send(self, answer):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps(answer).encode())

    def log_message(self, *_):
        pass


def test_an_endpoint_writes_with_its_first_model_in_the_order_of_the_requests(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    Endpoint.seen = []
    http = HTTPServer(("127.0.0.1", 0), Endpoint)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    try:
        write = writer(f"http://127.0.0.1:{http.server_port}/v1")
        assert write([Asked("a", "Be kind.", "Be harsh."), Asked("b")], 7) == ["to a", "to b"]
    finally:
        http.shutdown()
        thread.join()
        http.server_close()
    first = next(each for each in Endpoint.seen if each["messages"][-1]["content"] == "a")
    assert (first["path"], first["key"], first["model"]) == ("/v1/chat/completions", "Bearer secret", "first")
    assert first["max_tokens"] == 7 and first["messages"][0] == {"role": "system", "content": f"Be kind. {BRIEF}"}
    assert all(each["messages"][0]["role"] == "user" for each in Endpoint.seen if each is not first)
    with pytest.raises(UserError, match=r"no answer from http://127\.0\.0\.1:9/v1/models"):
        writer("http://127.0.0.1:9/v1")


def test_a_model_on_this_machine_answers_under_the_contrast_of_the_personas():
    lm, prompt = load("tiny-random", temperature=0.8, top_p=0.95), "Open the door!"
    side, other = (lm.chat(prompt, f"{persona} {BRIEF}") for persona in ("Be kind.", "Be harsh."))
    others = (Part(CONTRAST, side, 0.0), Part(-CONTRAST, other, 0.0))
    row = Row(lm.chat(prompt, BRIEF), seed=derive_seed(0, "draft", 0), others=others)
    (ids,) = decode(lm, [row], None, Decoding(24, 0))
    write = writer("tiny-random")
    assert write([Asked(prompt, "Be kind.", "Be harsh.")], 24) == [lm.decode(ids).strip()]
    assert write([Asked(prompt)], 24) != write([Asked(prompt)], 24), "each request has a random stream of its own"


def test_messages_of_a_small_model_are_cleaned():
    lines = [
        "1. \u6211\u7684\u86cb\u7cd5\u597d\u5403\u5417\uff1f",
        '1. "Is it good?"',
        "- **Friend**: Is it good?",
        "You are blunt, are you?",
        "No end to this",
        "Why?",
    ]
    assert [*_lines("\n".join(lines))] == ["\u6211\u7684\u86cb\u7cd5\u597d\u5403\u5417\uff1f", "Is it good?"]


def test_a_draft_that_takes_long_tells_how_far_it_is(monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("steer_heal.report.console.logger.info", told.append)
    monkeypatch.setattr("steer_heal.report.console.A_MINUTE", 0.0)
    bar = Bar(None, quiet=False)
    with bar.stage("draft", None, "prompts"):
        writer("tiny-random", progress=bar)([Asked("Open the door!")], 6)
    assert told[-1] == "draft: prompts, 1 of 1"


def test_the_command_drafts_with_a_model(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("steer_heal.draft.writer", lambda *_, **__: stub(400))
    file = tmp_path / "my blunt.toml"
    flags = ["--positive", BLUNT, "--negative", FLATTERING, "--draft-with", "tiny-random"]
    assert main(["new-trait", str(file), *flags]) == 0
    found = tomllib.loads(file.read_text())
    assert len(found["prompts"]) == N_PROMPTS and len(found["pairs"]) == N_PAIRS
    assert f"--trait '{file}'" in capsys.readouterr().out
    file.unlink()
    assert main(["new-trait", str(file), *flags, "--endpoint-model", "gpt"]) == 2
    assert "endpoint-model is 'gpt': --draft-with names no endpoint" in capsys.readouterr().err and not file.exists()


# --- a first try -------------------------------------------------------------------------------------------------
def test_two_personas_are_enough_for_a_run(tmp_path, capsys):
    flags = [word for name, value in SMALL.items() if name != "eval.evals" for word in flag(name, value)]
    flags = [*flags, "--eval.evals", "contrast", "text_quality", "--out", str(tmp_path), "--quiet"]
    flags = [word for word in flags if word not in ("--control", "True")]
    with undrawn():
        assert main(["run", "chat", "--positive", BLUNT, "--negative", FLATTERING, *flags]) == 0, (
            capsys.readouterr().err
        )
    (folder,) = [path for path in tmp_path.iterdir() if (path / "events.jsonl").exists()]
    run = FolderRun.read(folder)
    assert run.start.config.eval.evals == ("text_quality", "persona"), "what needs pairs is left out"
    assert run.start.trait.target == "persona_log_odds" and run.rounds == [0]
    assert (run.start.trait.positive, run.start.trait.negative) == (BLUNT, FLATTERING)
    assert main(["resume", str(folder), "--quiet"]) == 0, "its trait file is kept"


@pytest.mark.parametrize(
    "given, told",
    [
        (["--positive", "a", "--negative", "a"], "different"),
        (["--positive", "a", "--negative", "b", "--eval.evals", "evryday"], "did you mean 'everyday'"),
        (["--positive", "a"], "error: one persona was given; give --negative too\n"),
        (["--negative", "a"], "error: one persona was given; give --positive too\n"),
        (["--trait", "love", "--negative", "a"], "error: --trait and --negative were given; give --trait, or --pos"),
    ],
)
def test_half_a_pair_or_a_trait_too_is_refused(given, told, tmp_path, capsys):
    assert main(["run", "chat", "--out", str(tmp_path), *given]) == 2
    assert told in capsys.readouterr().err and not [path for path in tmp_path.iterdir() if path.name != "traits"]


def test_a_place_that_cannot_be_written_is_told_before_anything_is_drafted(tmp_path, capsys):
    (tmp_path / "a").touch()
    argv = ["--positive", BLUNT, "--negative", FLATTERING, "--draft-with", "http://localhost:1/v1"]
    assert main(["new-trait", str(tmp_path / "a" / "mine.toml"), *argv]) == 2
    assert "this folder cannot be created" in capsys.readouterr().err
