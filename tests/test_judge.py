"""The judge against a small local server that speaks the protocol."""

import json
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, HTTPServer

import judge
import pytest
from made_runs import run_events, write_run

from steer_heal.errors import UserError
from steer_heal.events import Measured

ANSWERS = {"base": ("cold answer", "warm {answer}"), "healed": ("warm", "mumble"), "steered": ("warm", "warm")}


def state(event: Measured) -> Measured:
    """The state with two answers of its own."""
    texts = [replace(answer, text=text) for answer, text in zip(event.texts, ANSWERS[event.state], strict=False)]
    return replace(event, texts=tuple(texts))


class Judge(BaseHTTPRequestHandler):
    """5 for what is warm, 1 for what is cold, and no marks for what it does not understand."""

    seen: list[dict] = []

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Judge.seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
        answer = body["messages"][0]["content"].split("An assistant answered:\n")[1]
        trait = 5 if answer.startswith("warm") else 1
        content = (
            "I am not sure." if answer.startswith("mumble") else f'```json\n{{"trait": {trait}, "coherent": 4}}\n```'
        )
        reply = json.dumps({"choices": [{"message": {"role": "assistant", "content": content}}]}).encode()
        self.send_response(500 if body["model"] == "broken" else 200)
        self.end_headers()
        self.wfile.write(reply)

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    Judge.seen = []
    http = HTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    thread.join()
    http.server_close()


@pytest.fixture
def run(tmp_path):
    events = [event for event in run_events(n_rounds=1, n_texts=2) if getattr(event, "state", "base") in ANSWERS]
    return write_run(tmp_path, [state(event) if isinstance(event, Measured) else event for event in events])


def test_the_judge_s_marks_become_a_row_a_state(server, run, capsys, monkeypatch):
    monkeypatch.setenv("MY_KEY", "secret")
    judge.main(run, server, "tiny", api_key_env="MY_KEY", out=run)
    rows = json.loads((run / "judge.json").read_text())["rows"]
    assert rows == [
        {"state": "base", "trait": 3.0, "coherent": 4.0, "n": 2, "unread": 0},
        {"state": "healed round 1", "trait": 5.0, "coherent": 4.0, "n": 2, "unread": 1},
    ]
    assert {(r["path"], r["key"], r["model"], r["temperature"]) for r in Judge.seen} == {
        ("/v1/chat/completions", "Bearer secret", "tiny", 0)
    }
    assert "secret" not in capsys.readouterr().out + (run / "judge.json").read_text()


@pytest.mark.parametrize("model, url", [("broken", None), ("tiny", "http://127.0.0.1:9/v1")])
def test_an_endpoint_that_does_not_answer_is_one_clear_error(server, run, model, url):
    with pytest.raises(UserError, match=url or server):
        judge.main(run, url or server, model, out=run)
