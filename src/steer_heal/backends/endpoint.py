"""A model behind any endpoint that speaks the OpenAI chat completions protocol. The texts leave this machine."""

from __future__ import annotations

import http.client
import json
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from typing import Any

from steer_heal.errors import UserError

KEY = "OPENAI_API_KEY"
"""The environment variable that may hold a key."""


def reply(url: str, body: Mapping[str, Any], key: str | None, timeout_s: float) -> str:
    """The text with which the endpoint answers a request. UserError if it does not."""
    try:
        answer = _read(f"{url.rstrip('/')}/chat/completions", json.dumps(body).encode(), key, timeout_s)
        return answer["choices"][0]["message"]["content"] or ""
    except (LookupError, TypeError) as error:
        raise _refused(url, error) from None


def models(url: str, key: str | None, timeout_s: float) -> Sequence[str]:
    """The names of the endpoint's models. UserError if it does not list them."""
    try:
        return [each["id"] for each in _read(f"{url.rstrip('/')}/models", None, key, timeout_s)["data"]]
    except (LookupError, TypeError) as error:
        raise _refused(url, error) from None


def _read(address: str, body: bytes | None, key: str | None, timeout_s: float) -> Any:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    try:
        request = urllib.request.Request(address, body, headers)
        with urllib.request.urlopen(request, timeout=timeout_s) as answer:
            return json.load(answer)
    except (urllib.error.URLError, http.client.HTTPException, OSError, ValueError) as error:
        raise _refused(address, error) from None


def _refused(address: str, error: Exception) -> UserError:
    return UserError(f"no answer from {address}: {error}; it must speak the OpenAI chat completions protocol")
