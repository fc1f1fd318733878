"""A model behind any endpoint that speaks the OpenAI chat completions protocol. The texts leave this machine."""

from __future__ import annotations

import http.client
import json
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from steer_heal.errors import UserError

KEY = "OPENAI_API_KEY"
"""The environment variable that may hold a key."""
ATTEMPTS = 5
WAIT_S = 1.0
"""Before the second attempt. It doubles with each further one, unless the endpoint says how long to wait."""
LONGEST_WAIT_S = 60.0
LONGEST_REFUSAL = 10_000
"""Bytes that are read of a refusal."""
BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses after which a request is repeated. Any other one is a mistake."""


@dataclass(frozen=True)
class Reply:
    """What an endpoint answered, and what that took."""

    text: str
    n_requests: int
    """Attempts, those that failed included."""
    prompt_tokens: int | None
    """As the endpoint counts them. None: it does not."""
    completion_tokens: int | None


def ask(url: str, body: Mapping[str, Any], key: str | None, timeout_s: float) -> Reply:
    """The answer to a request, which is repeated if the endpoint is busy. UserError if there is none."""
    answer, n_requests = _read(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), key, timeout_s)
    try:
        text = answer["choices"][0]["message"]["content"]
    except (LookupError, TypeError) as error:
        raise _refused(url, error) from None
    usage = answer.get("usage")
    counts = [usage.get(f"{side}_tokens") if isinstance(usage, dict) else None for side in ("prompt", "completion")]
    tokens = [count if type(count) is int else None for count in counts]
    return Reply(text if isinstance(text, str) else "", n_requests, *tokens)


def models(url: str, key: str | None, timeout_s: float) -> Sequence[str]:
    """The names of the endpoint's models. UserError if it does not list them."""
    try:
        return [each["id"] for each in _read(f"{url.rstrip('/')}/models", None, key, timeout_s)[0]["data"]]
    except (LookupError, TypeError) as error:
        raise _refused(url, error) from None


def _read(address: str, body: bytes | None, key: str | None, timeout_s: float) -> tuple[Any, int]:
    """(the JSON value at an address, the number of requests)."""
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    for attempt in range(1, ATTEMPTS + 1):
        wait_s = WAIT_S * 2 ** (attempt - 1)
        try:
            request = urllib.request.Request(address, body, headers)
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return json.load(answer), attempt
        except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError, RecursionError) as error:
            said = ""
            if isinstance(error, urllib.error.HTTPError):
                said = _said(error)
                with suppress(TypeError, ValueError):  # none, or a date
                    wait_s = float(error.headers["Retry-After"])
                final = error.code not in BUSY
            else:
                final = isinstance(getattr(error, "reason", None), ConnectionRefusedError | socket.gaierror)
            if attempt == ATTEMPTS or final:
                raise _refused(address, error, attempt, said) from None
        time.sleep(min(max(wait_s, 0.0), LONGEST_WAIT_S))
    raise AssertionError("the last attempt returns or raises")


def _said(error: urllib.error.HTTPError) -> str:
    """What the endpoint says of its refusal, at most 200 characters."""
    with error, suppress(OSError, http.client.HTTPException):
        text = error.read(LONGEST_REFUSAL).decode("utf-8", "replace")
        with suppress(ValueError, LookupError, TypeError):
            text = str(json.loads(text)["error"]["message"])
        return " ".join(text.split())[:200]
    return ""


def _refused(address: str, error: Exception, n_requests: int = 1, said: str = "") -> UserError:
    tried = f" in {n_requests} attempts" if n_requests > 1 else ""
    why = f"{error} ({said})" if said else str(error)
    fix = "it must speak the OpenAI chat completions protocol"
    if isinstance(error, urllib.error.HTTPError) and error.code in (401, 403):
        fix = f"give its key in the environment variable {KEY}"
    return UserError(f"no answer from {address}{tried}: {why}; {fix}")
