"""The conversation as a page in a browser of this machine. The page keeps the conversations, and asks one state at a
time; the server keeps nothing but the model. Every address begins with a random token, so that only who was told it can
ask: another user of the machine reaches the port too."""

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

from steer_heal.chat.talk import Question, Talk
from steer_heal.errors import UserError, print_safe, validated_json

PAGE = Path(__file__).parent / "page"
FILES = {
    "": ("chat.html", "text/html; charset=utf-8"),
    "chat.js": ("chat.js", "text/javascript; charset=utf-8"),
    "chat.css": ("chat.css", "text/css; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}
"""By the name behind the token: file and kind."""
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
OWN_NAMES = ("127.0.0.1", "localhost")
"""Under another name in Host, a foreign site has made its own name point here (DNS rebinding)."""
LARGEST_BODY = 2**20


class Refused(Exception):
    """A request that is not answered, and why."""

    def __init__(self, status: HTTPStatus, why: str) -> None:
        super().__init__(why)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """GET /TOKEN/: the page, its files, and the facts of the run. POST /TOKEN/answer: a Question, answered as JSON
    lines: {"text"} for each piece, then {"done"}, or {"error"}."""

    timeout = 60

    def __init__(self, facts: dict[str, Any], talk: Talk, token: str, *args: Any) -> None:
        self.facts, self.talk, self.token = facts, talk, token
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
                raise Refused(HTTPStatus.NOT_FOUND, f"there is no {asked!r}")
        except Refused as refused:
            self._refuse(refused)

    def do_POST(self) -> None:
        try:
            asked = self._asked()
            if asked != "answer":
                raise Refused(HTTPStatus.NOT_FOUND, f"there is no {asked!r}")
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
        """What is asked for, behind the token. Refused unless the request has the token and is of this machine's own
        page, or of a program that is no browser."""
        host, origin = self.headers.get("Host", ""), self.headers.get("Origin")
        if host.partition(":")[0].lower() not in OWN_NAMES:
            raise Refused(HTTPStatus.FORBIDDEN, f"Host is {host!r}: open the page as http://127.0.0.1 or localhost")
        if origin is not None and origin != f"http://{host}":
            raise Refused(HTTPStatus.FORBIDDEN, f"Origin is {origin!r}: only the page itself may ask")
        given, _, asked = self.path.removeprefix("/").partition("/")
        if not secrets.compare_digest(given.encode(), self.token.encode()):
            raise Refused(HTTPStatus.FORBIDDEN, "the token is missing or wrong: open the address that was printed")
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
            self.talk.known(question.state)
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
        except (ConnectionError, TimeoutError):  # the page was closed, or its answer stopped: nobody reads on
            self.close_connection = True

    def log_message(self, *_: Any) -> None:
        """Nothing: requests are not logged."""


class Server(ThreadingHTTPServer):
    """Bound to 127.0.0.1, with a token of its own."""

    def __init__(self, facts: dict[str, Any], talk: Talk, port: int) -> None:
        self.token = secrets.token_urlsafe()
        super().__init__(("127.0.0.1", port), partial(Handler, facts, talk, self.token))

    @property
    def address(self) -> str:
        """Of the page."""
        return f"http://127.0.0.1:{self.server_port}/{self.token}/"


def server(talk: Talk, states: Sequence[str], question: Question, port: int) -> Server:
    """UserError where the port is taken, or a state is not known."""
    run, steered = talk.run, talk.states["steered"]
    facts = {
        "run": run.folder.resolve().name,
        "model": run.cfg.model,
        "trait": run.inputs.trait.name,
        "round": talk.round,
        "states": {name: state.about for name, state in talk.states.items()},
        "shown": [talk.known(name) for name in states],
        "system": question.system,
        "dose": question.dose,
        "dose_of_round": steered.dose,
        "seed": question.seed,
    }
    try:
        return Server(facts, talk, port)
    except OSError as error:
        raise UserError(f"port is {port}: {error.strerror}; give another --port, or 0 for any free one") from None


def serve(talk: Talk, states: Sequence[str], question: Question, port: int) -> None:
    """Until Ctrl-C."""
    with server(talk, states, question, port) as made:
        print_safe(f"open {made.address} (only on this machine, and only with this token); Ctrl-C ends it")
        sys.stdout.flush()
        try:
            made.serve_forever()
        except KeyboardInterrupt:
            print_safe("")
