"""A small local server that speaks the protocol of a judge."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Judge(BaseHTTPRequestHandler):
    """Gives every answer the marks of `content`, after the `replies`."""

    seen: list[dict] = []
    replies: list[tuple[int, dict, object]] = []
    """(status, headers, body) of the next requests. A body that is None is never sent."""
    content = '```json\n{"trait": 70, "coherence": 88.5}\n```'

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        Judge.seen.append({"path": self.path, "key": self.headers["Authorization"], **body})
        asked = body["messages"][0]["content"]
        content = Judge.content(asked) if callable(Judge.content) else Judge.content
        content = "70" if "polite" in asked[:20] else content
        message = {
            "choices": [{"message": {"content": content}}],
            "usage": {"prompt_tokens": 9, "completion_tokens": 4},
        }
        status, headers, answer = Judge.replies.pop(0) if Judge.replies else (200, {}, message)
        if answer is None:
            threading.Event().wait(0.5)
            return
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(answer if isinstance(answer, bytes) else json.dumps(answer).encode())

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    """The URL of the judge."""
    monkeypatch.setattr(Judge, "seen", [])
    monkeypatch.setattr(Judge, "replies", [])
    monkeypatch.setattr("steer_heal.backends.endpoint.WAIT_S", 0.01)
    http = ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    thread = threading.Thread(target=http.serve_forever, args=(0.01,))
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}/v1"
    http.shutdown()
    thread.join()
    http.server_close()
