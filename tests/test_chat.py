"""Talking to a run: what its states answer, the terminal, and the page with what it refuses."""

import json
import os
import pty
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
import weakref
from contextlib import contextmanager
from dataclasses import replace
from http.client import HTTPConnection
from io import StringIO
from types import SimpleNamespace

import pytest
import torch
from runs import UNDRAWN_COMMAND
from test_hostile import CHROMIUM, NO_CHROMIUM, browse

from steer_heal.__main__ import main
from steer_heal.chat import web
from steer_heal.chat.talk import Answer, Question, Talk
from steer_heal.chat.terminal import Terminal
from steer_heal.commands import run as run_command
from steer_heal.errors import UserError
from steer_heal.events import Gathered, Run
from steer_heal.model.lm import load
from steer_heal.model.prompts import context_length
from steer_heal.model.state import State
from steer_heal.model.steering import Condition, steer
from steer_heal.model.student import attach_saved
from steer_heal.runs import begin
from steer_heal.runs.opened import settings_of
from steer_heal.runs.stored import FolderRun
from steer_heal.settings import changed

pytestmark = pytest.mark.usefixtures("quick")
HELLO = "The warden says no. What do you do?"
ASKED = Question(state="healed", turns=(HELLO,))


def opened(folder, r, max_new_tokens) -> Talk:
    run = FolderRun.read(folder)
    return Talk(run, settings_of(run), r, max_new_tokens)


@pytest.fixture(scope="module")
def talk(two, quick) -> Talk:
    return opened(two, 1, 12)


@torch.no_grad()
def logits(lm):
    return lm.logits(lm.hidden([lm.chat(HELLO)])[0])


def read(talk, name):
    with talk.student.using(talk.states[name].adapters) as lm:
        return logits(lm)


# --- states ------------------------------------------------------------------------------------------------------
def test_healed_is_the_checkpoint_steered_stands_on_the_one_before_and_base_on_none(talk, two):
    untouched = logits(load("tiny-random", dtype="float32"))
    assert torch.equal(read(talk, "base"), untouched)
    for name, checkpoint in (("healed", "r1"), ("steered", "r0")):
        with attach_saved(load("tiny-random", dtype="float32"), two / "ckpt" / checkpoint).using("full") as lm:
            wanted = logits(lm)
        assert torch.allclose(read(talk, name), wanted, atol=1e-5) and (wanted - untouched).abs().max() > 1e-3


def test_the_first_round_is_steered_on_the_untouched_model(two):
    first = opened(two, 0, 4)
    assert torch.equal(read(first, "steered"), read(first, "base"))
    assert not torch.equal(read(first, "healed"), read(first, "base"))


def test_a_scale_multiplies_what_the_adapters_add_in_answers_and_is_told(two, monkeypatch):
    run, seen = FolderRun.read(two), {}

    def watched(lm, rows, vector, how):
        seen[scale].append(logits(lm))
        how.on_token(0, 5)

    monkeypatch.setattr("steer_heal.chat.talk.decode", watched)
    for scale in (1.0, 0.0, -1.0):
        talk, seen[scale] = Talk(run, settings_of(run), 1, 4, scale), []
        for name in ("base", "steered", "healed"):
            talk.answer(replace(ASKED, state=name))
        assert (", its adapter times -1" in talk.about("healed")) is (scale == -1)
    (base, steered, healed), none, reverse = seen[1.0], seen[0.0], seen[-1.0]
    assert all(torch.equal(each, base) for each in (*none, reverse[0]))
    assert not any(torch.equal(one, other) for one, other in zip(reverse[1:], (steered, healed), strict=True))


def test_steered_is_written_with_the_vector_at_the_dose_of_the_round(talk, monkeypatch):
    seen = []

    def watched(lm, vector, doses):
        seen.append((vector, list(doses)))
        return steer(lm, vector, doses)

    monkeypatch.setattr("steer_heal.model.decode.steer", watched)
    for name in ("steered", "healed"):
        talk.answer(replace(ASKED, state=name))
        talk.answer(replace(ASKED, state=name, dose=0.25))
    dose = talk.run.require(Gathered, 1).collected.dose
    assert [doses for _, doses in seen] == [[dose], [0.25], [0.0], [0.0]] and dose > 0
    assert all(vector is talk.vector for vector, _ in seen)


def test_an_answer_comes_token_by_token_and_again_for_the_same_seed(talk):
    pieces = []
    answer = talk.answer(ASKED, pieces.append)
    assert "".join(pieces) == answer.text and len(pieces) == answer.n_tokens + 1 > 4
    assert talk.answer(ASKED).text == answer.text != talk.answer(replace(ASKED, seed=1)).text
    assert answer.cut == (answer.n_tokens == 12)


def test_a_character_of_several_tokens_is_told_once_and_whole(talk, monkeypatch):
    written = "caf\u00e9 \u65e5\u672c"
    ids = talk.student.lm.encode(written)
    assert any(talk.student.lm.decode(ids[:i]).endswith("\ufffd") for i in range(len(ids))), "it is cut somewhere"
    monkeypatch.setattr("steer_heal.chat.talk.decode", lambda lm, rows, vector, how: [how.on_token(0, i) for i in ids])
    pieces = []
    assert talk.answer(ASKED, pieces.append).text == written == "".join(pieces)


def test_what_was_said_before_and_the_system_prompt_are_in_the_prompt(talk, monkeypatch):
    prompts = []
    monkeypatch.setattr(
        "steer_heal.chat.talk.decode",
        lambda lm, rows, vector, how: prompts.append(lm.decode(rows[0].prompt_ids)) or how.on_token(0, 5),
    )
    talk.answer(replace(ASKED, turns=(HELLO, "I open it.", "Why?"), system="Be brief."))
    talk.answer(replace(ASKED, state="prompted", system="Be brief."))
    positions = [prompts[0].index(words) for words in ("Be brief.", HELLO, "I open it.", "Why?")]
    assert positions == sorted(positions) and prompts[0].count("assistant") == 2
    assert f"{talk.run.start.trait.positive}\n\nBe brief." in prompts[1]


def test_a_stopped_answer_leaves_the_model_as_it_was(talk):
    before = {name: read(talk, name) for name in talk.states}

    def stop(piece):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        talk.answer(replace(ASKED, state="steered"), stop)
    assert all(torch.equal(read(talk, name), then) for name, then in before.items())


def test_a_conversation_that_is_too_long_too_large_or_out_of_turn_is_refused(talk, monkeypatch):
    def failing(*_):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(UserError, match=r"the conversation has \d+ tokens .* begin a new conversation"):
        talk.answer(replace(ASKED, turns=("word " * int(context_length(talk.student.lm)),)))
    monkeypatch.setattr("steer_heal.model.decode.steer", failing)
    with pytest.raises(UserError, match="out of memory with a single row"):
        talk.answer(ASKED)
    with pytest.raises(UserError, match="turns holds 2 texts"):
        talk.answer(replace(ASKED, turns=("a", "b")))
    with pytest.raises(UserError, match="did you mean 'healed'"):
        talk.answer(replace(ASKED, state="heald"))


# --- the terminal ------------------------------------------------------------------------------------------------
def scripted(monkeypatch, run, text, *flags):
    monkeypatch.setattr(sys, "stdin", StringIO(text))
    return main(["chat", str(run), "--max-new-tokens", "6", *flags])


def test_lines_in_are_answered_by_each_state_and_commands_change_the_settings(two, monkeypatch, capsys):
    text = (
        f"{HELLO}\n/states base healed\n/system Be brief.\n/dose 0.5\n/seed 7\nAnd\x1b[31m why?\n/reset\n/quit\nnever\n"
    )
    assert scripted(monkeypatch, two, text) == 0
    out = capsys.readouterr().out
    first, second = out.split("And\ufffd why?")
    assert [line.split()[1] for line in first.splitlines() if line.startswith("---")] == [
        "base:",
        "steered:",
        "healed:",
    ]
    assert "base, healed; dose 0.5, seed 7, system prompt 'Be brief.'; 1 message so far" in first
    assert second.count("---") == 4 and "0 messages so far" in second and "never" not in out and "\x1b" not in out


def test_an_unknown_command_or_value_is_told_and_the_conversation_goes_on(two, monkeypatch, capsys):
    text = "/dse 1\n/dose high\n/dose nan\n/seed 1.5\n/states heald\n/help\nHello\n"
    assert scripted(monkeypatch, two, text, "--states", "base", "--quiet") == 0
    printed = capsys.readouterr()
    told = printed.err.splitlines()
    assert len(told) == 5 and all(line.startswith("error: ") for line in told)
    assert "did you mean '/dose'" in told[0] and "did you mean 'healed'" in told[4]
    assert "/reset" in printed.out and "--- base" in printed.out


def test_what_cannot_be_talked_to_is_named(two, copy, tmp_path, monkeypatch, capsys):
    shutil.rmtree(copy / "ckpt" / "r1")
    for run, flags, told in (
        (tmp_path, [], "has no events.jsonl; give a run folder"),
        (two, ["--round", "5"], "round 5 does not exist; the run has rounds 1 to 2"),
        (copy, [], "r1/adapter_config.json is missing"),
        (two, ["--states", "bse"], "did you mean 'base'"),
        (two, ["--port", "65536"], "port is 65536: it must be <= 65535"),
        (two, ["--max-new-tokens", "0", "--states", ""], "2 problems"),
    ):
        assert scripted(monkeypatch, run, "", *flags) == 2
        assert told in capsys.readouterr().err
    assert scripted(monkeypatch, copy, "Hello\n", "--round", "1", "--states", "healed") == 0


class Fake(Talk):
    """Stands for a Talk that answers with given pieces."""

    round = 0
    states = {name: State(name=name, condition=Condition(dose=2.0)) for name in ("base", "steered", "healed")}

    def __init__(self, run, pieces, on_piece=lambda i: None):
        self.run, self.pieces, self.on_piece, self.asked = run, pieces, on_piece, []

    def about(self, name):
        return "</p><script>document.documentElement.dataset.ran=1</script>"

    def answer(self, question, on_text):
        self.asked.append(question)
        for i, piece in enumerate(self.pieces):
            self.on_piece(i)
            on_text(piece)
        return Answer("".join(self.pieces), len(self.pieces), 0.1, False)


def test_a_teacher_without_a_vector_has_no_dose(two, monkeypatch, capsys):
    """It would make another teacher, under the same name."""
    run = FolderRun.read(two)
    start = run.start
    own = {"heal.target": "distribution", "heal.text": "own", "heal.divergence": "none", "heal.teacher": "prompt"}
    other = replace(start, config=changed(start.config, own))
    monkeypatch.setattr(FolderRun, "start", property(lambda run: other))
    talk = Talk(run, settings_of(run), 0, 4)
    refused = r"heal.teacher is 'prompt', which uses no vector; leave it out"
    for name in ("steered", "healed"):
        with pytest.raises(UserError, match=f"dose is given: {refused}"):
            talk.answer(replace(ASKED, state=name, dose=3.0))
    terminal = Terminal(talk, ["steered"], ASKED)
    with pytest.raises(UserError, match=f"/dose is given: {refused}"):
        terminal.obey("/dose", "3")
    assert terminal.summary() == "steered; seed 0; 0 messages so far"
    with web.server(talk, ["steered"], ASKED, 0) as made:
        assert made.RequestHandlerClass.args[0]["dose_of_round"] is None
    assert main(["chat", str(two), "--round", "1", "--dose", "3"]) == 2
    assert "dose is given: heal.teacher is 'prompt'" in capsys.readouterr().err


def test_ctrl_c_stops_one_answer_and_keeps_what_was_written(talk, capsys):
    first = lambda i: signal.raise_signal(signal.SIGINT) if i == 1 and len(fake.asked) == 1 else None
    fake = Fake(talk.run, ["one ", "two ", "three"], first)
    terminal = Terminal(fake, ["base", "healed"], ASKED)
    terminal.run(iter(["Hello", "More"]))
    assert [question.turns for question in fake.asked[2:]] == [
        ("Hello", "one two ", "More"),
        ("Hello", "one two three", "More"),
    ]
    assert "one two  [stopped]" in capsys.readouterr().out
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


# --- the question at the end of a run ----------------------------------------------------------------------------
@pytest.fixture
def unended(copy):
    """Two rounds without their run_end."""
    lines = (copy / "events.jsonl").read_text().splitlines(keepends=True)
    (copy / "events.jsonl").write_text("".join(lines[:-1]))
    return copy


def asked(monkeypatch, answer, seen=True):
    """Who was asked and what was begun; `answer` is what input() does."""
    calls = []
    monkeypatch.delenv("CI", raising=False)
    monkeypatch.setattr(run_command, "in_terminal", lambda: seen)
    monkeypatch.setattr("builtins.input", lambda prompt: calls.append(prompt) or answer())
    monkeypatch.setattr("steer_heal.commands.chat.main", lambda argv: calls.append(argv))
    return calls


def ends(how):
    raise how


@pytest.mark.parametrize(
    ("answer", "begins"),
    [
        (lambda: "y", True),
        (lambda: " Yes ", True),
        (lambda: "", False),
        (lambda: "what?", False),
        (lambda: ends(EOFError), False),
        (lambda: ends(KeyboardInterrupt), False),
    ],
)
def test_only_a_yes_begins_the_chat_and_the_run_has_ended_well_in_any_case(answer, begins, unended, monkeypatch):
    models, resume = [], begin.go_on

    def watched(*given):
        bench, run, lock = resume(*given)
        models.append(weakref.ref(bench.student.lm.model))
        return bench, run, lock

    monkeypatch.setattr(begin, "go_on", watched)
    calls = asked(monkeypatch, lambda: models.append(models[0]()) or answer())
    assert main(["resume", str(unended), "--n-threads", "1"]) == 0
    assert calls == ["talk to it now? [y/N] ", *[[str(unended), "--device", "auto", "--n-threads", "1"]] * begins]
    assert models[1] is None, "the model was kept while the question stood"


def test_a_chat_that_is_refused_leaves_the_run_finished(unended, monkeypatch, capsys):
    def refused(argv):
        raise UserError("no chat today")

    asked(monkeypatch, lambda: "y")
    monkeypatch.setattr("steer_heal.commands.chat.main", refused)
    monkeypatch.setattr(run_command, "best_round", lambda run: None)
    monkeypatch.setattr(Run, "untrained", False)
    assert main(["resume", str(unended), "--n-threads", "1"]) == 0
    said = capsys.readouterr()
    assert "error: no chat today" in said.err and f"steer-heal chat {unended} --allow-broken\n" in said.out


@pytest.mark.parametrize("why", ["--quiet", "--no-chat", "CI", "no terminal", "stopped"])
def test_nobody_is_asked_who_cannot_answer(why, unended, monkeypatch, capsys):
    calls = asked(monkeypatch, lambda: "y", seen=why != "no terminal")
    if why == "CI":
        monkeypatch.setenv("CI", "true")
    if why == "stopped":
        monkeypatch.setattr(run_command, "finish", lambda *_: ends(KeyboardInterrupt))
    flags = [why] if why.startswith("--") else []
    assert main(["resume", str(unended), *flags]) == (130 if why == "stopped" else 0) and calls == []
    told = f"talk to it: steer-heal chat {unended}\n" in capsys.readouterr().out
    assert told is (why in ("--no-chat", "CI"))


def test_in_a_real_terminal_the_answer_yes_begins_the_conversation(unended):
    ours, theirs = pty.openpty()
    env = {name: value for name, value in os.environ.items() if name != "CI"}
    command = [*UNDRAWN_COMMAND, "resume", str(unended)]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True)
    os.close(theirs)
    seen = b""
    for until, typed in ((b"[y/N] ", b"y\n"), (b"/quit leaves", b"/quit\n")):
        while until not in seen:
            assert select.select([ours], [], [], 120)[0], seen
            try:
                seen += os.read(ours, 4096)
            except OSError:  # it has ended
                pytest.fail(seen.decode())
        os.write(ours, typed)
    assert process.wait(120) == 0
    os.close(ours)


# --- the page ----------------------------------------------------------------------------------------------------
@contextmanager
def serving(talk, shown=("base", "steered", "healed")):
    """The server, as it answers."""
    with web.server(talk, shown, ASKED, 0) as made:
        thread = threading.Thread(target=made.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield made
        finally:
            made.shutdown()
            thread.join()


def requested(made, method="GET", path="", body=None, token=None, **headers):
    """The response, and its body. `token`: in place of the server's."""
    connection = HTTPConnection("127.0.0.1", made.server_port, timeout=60)
    connection.putrequest(method, f"/{made.token if token is None else token}/{path}", skip_host="Host" in headers)
    if body is not None:
        headers = {"Content_Type": "application/json", "Content_Length": str(len(body))} | headers
    for name, value in headers.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response, content


def question(**changed) -> bytes:
    return json.dumps({"state": "healed", "turns": [HELLO], **changed}).encode()


def test_the_server_streams_what_the_terminal_would_print(talk):
    with serving(talk) as made:
        response, content = requested(made, "POST", "answer", question(seed=3, system="Be brief."))
    *pieces, last = [json.loads(line) for line in content.splitlines()]
    wanted = talk.answer(replace(ASKED, seed=3, system="Be brief."))
    assert response.status == 200 and len(pieces) > 4
    assert "".join(piece["text"] for piece in pieces) == last["done"]["text"] == wanted.text


def test_a_piece_is_sent_before_the_next_one_is_written(talk):
    seen = threading.Event()
    fake = Fake(talk.run, ["one", "two"], lambda i: i == 0 or seen.wait(30) or pytest.fail("nothing was sent"))
    with serving(fake) as made:
        connection = HTTPConnection("127.0.0.1", made.server_port, timeout=60)
        connection.request("POST", f"/{made.token}/answer", question(), {"Content-Type": "application/json"})
        response = connection.getresponse()
        assert json.loads(response.readline()) == {"text": "one"}
        seen.set()
        assert json.loads(response.readline()) == {"text": "two"}
        connection.close()


def test_an_answer_ends_where_nobody_reads_on(talk):
    gone, ended = threading.Event(), []
    fake = Fake(talk.run, ["word "] * 10_000, lambda i: i and gone.wait(30))
    answer = fake.answer

    def watched(question, on_text):
        try:
            return answer(question, on_text)
        except ConnectionError:
            ended.append(True)
            raise

    fake.answer = watched
    with serving(fake) as made:
        connection = HTTPConnection("127.0.0.1", made.server_port, timeout=60)
        connection.request("POST", f"/{made.token}/answer", question(), {"Content-Type": "application/json"})
        connection.getresponse().readline()
        connection.close()
        gone.set()
    assert ended == [True]


@pytest.mark.parametrize(
    ("how", "status", "told"),
    [
        ({"Host": "evil.example"}, 403, "Host is"),
        ({"Host": ""}, 403, "Host is"),
        ({"Host": "["}, 403, "Host is"),
        ({"Host": "localhost.evil.example"}, 403, "Host is"),
        ({"Origin": "http://evil.example"}, 403, "Origin is"),
        ({"Origin": "null"}, 403, "Origin is"),
        ({"Origin": "http://localhost:1"}, 403, "Origin is"),
        ({"Content_Type": "text/plain"}, 415, "application/json"),
        ({"Content_Length": str(2**30)}, 413, "Content-Length"),
        ({"Content_Length": "-1"}, 413, "Content-Length"),
        ({"path": "other"}, 404, "'other' was not found"),
        ({"path": ""}, 404, "'' was not found"),
        ({"token": ""}, 403, "the token is"),
        ({"token": "x" * 43}, 403, "the token is"),
        ({"body": b"{"}, 400, "the question"),
        ({"body": question(state="heald")}, 400, "did you mean 'healed'"),
        ({"body": question(turns=[])}, 400, "turns"),
        ({"body": question(dose="x")}, 400, "dose"),
    ],
)
def test_foreign_and_broken_requests_are_refused_before_the_model_sees_them(how, status, told, talk):
    fake = Fake(talk.run, ["x"])
    with serving(fake) as made:
        response, content = requested(made, **{"method": "POST", "path": "answer", "body": question(), **how})
    assert (response.status, told in json.loads(content)["error"]) == (status, True), content
    assert fake.asked == [] and "default-src 'none'" in response.headers["Content-Security-Policy"]


def test_only_the_page_s_own_files_are_served_and_by_name_of_this_machine(talk):
    with serving(Fake(talk.run, [])) as made:
        for path in ("../talk.py", "page/chat.js", "..%2ftalk.py", "/etc/passwd", "favicon.ico"):
            assert requested(made, path=path)[0].status == 404
        for path in (*web.FILES, "facts"):
            for host in (f"127.0.0.1:{made.server_port}", "localhost:9000"):
                response, content = requested(made, path=path, Host=host)
                assert response.status == 200 and content and response.headers["X-Content-Type-Options"] == "nosniff"
            assert requested(made, path=path, Host="evil.example")[0].status == 403
            for token in (path, made.token[:-1], f"{made.token}x", made.token.swapcase()):
                response, content = requested(made, path=path, token=token)
                assert response.status == 403 and made.token.encode() not in content
        with socket.create_connection(("127.0.0.1", made.server_port), timeout=60) as connection:
            connection.sendall(b"GET /\xe9/ HTTP/1.0\r\nHost: localhost\r\n\r\n")
            assert connection.recv(100).split()[1] == b"403"


def test_every_server_has_a_token_of_its_own_and_prints_it_with_the_address(talk, monkeypatch, capsys):
    served = []
    monkeypatch.setattr(web.Server, "serve_forever", lambda made: served.append(made))
    for _ in range(2):
        web.serve(Fake(talk.run, []), ["base"], ASKED, 0)
    addresses = [line.split()[1] for line in capsys.readouterr().out.splitlines()]
    assert addresses == [f"http://127.0.0.1:{made.server_port}/{made.token}/" for made in served]
    assert served[0].token != served[1].token and all(len(made.token) >= 43 for made in served)


def test_a_port_that_is_taken_is_named(talk):
    with serving(talk) as made, pytest.raises(UserError, match=f"port {made.server_port} is not available.*--port"):
        web.server(talk, ["base"], ASKED, made.server_port)


DRIVER = """
setTimeout(async () => {
  at("message").value = "<b>Hello</b>";
  at("ask").requestSubmit();
  while (running) await new Promise((done) => setTimeout(done, 20));
  await ask("More");
  await ask("A long message. ".repeat(300));
  const page = document.documentElement;
  const answers = [...document.querySelectorAll(".answer footer")].pop().getBoundingClientRect();
  document.body.dataset.covered = answers.bottom > at("ask").getBoundingClientRect().top;
  document.body.dataset.widths = `${page.scrollWidth} ${page.clientWidth}`;
}, 300);
"""


@pytest.mark.skipif(CHROMIUM is None, reason=NO_CHROMIUM)
@pytest.mark.parametrize("width", [500, 1400])
def test_a_browser_shows_hostile_answers_as_text_without_a_word(width, talk, tmp_path, monkeypatch):
    page = tmp_path / "page"
    shutil.copytree(web.PAGE, page)
    (page / "chat.js").write_text((page / "chat.js").read_text() + DRIVER)
    monkeypatch.setattr(web, "PAGE", page)
    hostile = "<img src=x onerror='document.documentElement.dataset.ran=1'>"
    run = SimpleNamespace(folder=tmp_path / "<i>run", start=talk.run.start)
    fake = Fake(run, [hostile, " \u202e", "w" * 3000])
    with serving(fake) as made:
        url = SimpleNamespace(resolve=lambda: SimpleNamespace(as_uri=lambda: made.url))
        built, console = browse(url, tmp_path / "profile", "--virtual-time-budget=2000000", width=width)
    assert console == [] and "data-ran" not in built[: built.index("<head>")]
    assert built.count("&lt;img src=x onerror=") == 9 and "&lt;b&gt;Hello" in built and "&lt;i&gt;run" in built
    inside, visible = map(int, built.split('data-widths="')[1].split('"')[0].split())
    assert inside <= visible <= width and 'data-covered="false"' in built
    assert [len(asked.turns) for asked in fake.asked] == [1, 1, 1, 3, 3, 3, 5, 5, 5]
    assert fake.asked[3].turns[0] == "<b>Hello</b>" and fake.asked[0].dose is None
