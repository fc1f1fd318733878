"""The conversation as a page in a browser on this machine.

The page keeps the conversations and asks one state at a time. The server keeps only the model. Each URL begins with a
random token, because other users of the machine can reach the port too.
"""

from __future__ import annotations

import json
import secrets
import sys
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from steer_heal.chat import known_state
from steer_heal.chat.talk import Question, Talk
from steer_heal.errors import UserError, print_safe, validated_json

PAGE = Path(__file__).parent / "page"
FILES = {
    "": ("chat.html", "text/html; charset=utf-8"),
    "chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "chat.css": ("chat.css", "text/css; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
"""(file, content type) by the name that follows the token."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
OWN_NAMES = ("127.0.0.1", "localhost")
"""Host has another name if a foreign site made its own name point here (DNS rebinding)."""
LARGEST_BODY = 2**20


class Refused(Exception):
    """A request is refused, for this reason."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """Answers GET /TOKEN/... with the page, its files and the facts of the run, and POST /TOKEN/answer with JSON lines.

    The body of the POST is a Question. The answer has a line {"text"} for each piece, then {"done"} or {"error"}.
    """

    timeout = 60

    def __init__(self, facts: dict[str, Any], talk: Talk, token: str, *args: Any) -> None:
        self.facts = facts
        self.talk = talk
        self.token = token
        super().__init__(*args)

    def do_GET(self) -> None:
        try:
            asked = self._asked()
            if asked == "facts":
                self._send(HTTPStatus.OK, "application/json", json.dumps(self.facts).encode())
            elif asked in FILES:
                name, kind = FILES[asked]
                self._send(HTTPStatus.OK, kind, (PAGE / name).read_bytes())
            else:
                raise Refused(HTTPStatus.NOT_FOUND, f"{asked!r} was not found")
        except Refused as refused:
            self._refuse(refused)

    def do_POST(self) -> None:
        try:
            asked = self._asked()
            if asked != "answer":
                raise Refused(HTTPStatus.NOT_FOUND, f"{asked!r} was not found")
            question = self._question()
        except Refused as refused:
            self._refuse(refused)
            return
        self._head(HTTPStatus.OK, "application/x-ndjson")
        try:
            answer = self.talk.answer(question, lambda piece: self._line({"text": piece}) if piece else None)
            self._line({"done": asdict(answer)})
        except UserError as error:
            self._line({"error": str(error)})

    def _asked(self) -> str:
        """The part of the URL after the token. Refused unless the request has the token and comes from the page itself,
        or from a program that is not a browser."""
        host = self.headers.get("Host", "")
        origin = self.headers.get("Origin")
        if host.partition(":")[0].lower() not in OWN_NAMES:
            raise Refused(HTTPStatus.FORBIDDEN, f"Host is {host!r}: open the page as http://127.0.0.1 or localhost")
        if origin is not None and origin != f"http://{host}":
            raise Refused(HTTPStatus.FORBIDDEN, f"Origin is {origin!r}: only the page itself may send requests")
        given, _, asked = self.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(given.encode(), self.token.encode()):
            raise Refused(HTTPStatus.FORBIDDEN, "the token is missing or wrong: open the URL that was printed")
        return asked

    def _question(self) -> Question:
        if self.headers.get_content_type() != "application/json":  # a form of a foreign page cannot send it
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the Content-Type must be application/json")
        try:
            length = int(self.headers.get("Content-Length", ""))
        except ValueError:
            length = -1
        if not 0 <= length <= LARGEST_BODY:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"Content-Length must be 0 to {LARGEST_BODY}")
        try:
            question = validated_json(Question, self.rfile.read(length), "the question")
            known_state(question.state)
            return question
        except UserError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, str(error)) from None

    def _line(self, value: dict[str, Any]) -> None:
        self.wfile.write(json.dumps(value).encode() + b"\n")
        self.wfile.flush()

    def _head(self, status: HTTPStatus, kind: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Type": kind, **HEADERS}.items():
            self.send_header(name, value)
        self.end_headers()

    def _send(self, status: HTTPStatus, kind: str, body: bytes) -> None:
        self._head(status, kind)
        self.wfile.write(body)

    def _refuse(self, refused: Refused) -> None:
        self._send(refused.status, "application/json", json.dumps({"error": str(refused)}).encode())

    def handle(self) -> None:
        try:
            super().handle()
        except (ConnectionError, TimeoutError):  # the page was closed, or the user stopped the answer
            self.close_connection = True

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


class Server(ThreadingHTTPServer):
    """A server on 127.0.0.1 with its own token."""

    def __init__(self, facts: dict[str, Any], talk: Talk, port: int) -> None:
        self.token = secrets.token_urlsafe()
        super().__init__(("127.0.0.1", port), partial(Handler, facts, talk, self.token))

    @property
    def url(self) -> str:
        """URL of the page."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"


def server(talk: Talk, states: Sequence[str], question: Question, port: int) -> Server:
    """A server of the page. UserError if the port is taken."""
    start = talk.run.start
    facts = {
        "run": talk.run.folder.resolve().name,
        "model": start.config.model,
        "trait": start.trait.name,
        "round": talk.round + 1,
        "states": {name: talk.about(name) for name in talk.states},
        "shown": states,
        "system": question.system,
        "dose": question.dose,
        "dose_of_round": talk.states["steered"].condition.dose if talk.recipe.uses_vector else None,
        "seed": question.seed,
    }
    try:
        return Server(facts, talk, port)
    except OSError as error:
        raise UserError(f"port {port} is not available ({error.strerror}); give another --port, or 0") from None


def serve(talk: Talk, states: Sequence[str], question: Question, port: int) -> None:
    """Serves the page until Ctrl-C."""
    with server(talk, states, question, port) as made:
        print_safe(
            f"open {made.url} (it works only on this machine, and only with this token); Ctrl-C stops the server"
        )
        sys.stdout.flush()
        try:
            made.serve_forever()
        except KeyboardInterrupt:
            print_safe("")
