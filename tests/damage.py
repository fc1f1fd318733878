"""Strategies of damage: odd texts and values, files with bytes changed, JSON-like values with fields dropped, doubled
and retyped, runs with any text and any number missing."""

import copy
import json
import math

from hypothesis import strategies as st
from made_runs import run_events

from steer_heal.events import encode, plain
from steer_heal.runs.log import FIRST, line_hash

HOSTILE_TEXTS = [
    *("<script>document.title=1</script>", "](javascript:alert(1))", "$x^{$", "{{ 7*7 }}{% x %}", "{vignette}{schema}"),
    *("%s%n{0}", "```\n# x", "\x1b[31m\x1b]0;t\x07", "\x00", "\ud800", "\udc80", "\u202e", "\ufeff",
        "\U0001f600\u0301"),
    *("\r\n\x0b\x0c\x1c\x85\u2028", "a" * 3000, "i am " * 40, "'\"\\", " ", "", "-", "--"),
]  # fmt: skip
ANY_TEXT = st.one_of(st.sampled_from(HOSTILE_TEXTS), st.text(max_size=60),
    st.text(st.characters(categories=("Cc", "Cs", "Cf", "Zl", "Zp", "Lu", "Nd")), max_size=20),
    st.text("ab .!?\n", max_size=80))  # fmt: skip
REPEATED = st.tuples(ANY_TEXT, st.integers(1, 60), ANY_TEXT).map(lambda t: t[0] * t[1] + t[2])
NUMBERS = [0, 1, -1, 2**70, 1e308, -1e308, 5e-324, math.nan, math.inf, -math.inf]
HOLDERS = [[], {}, [[]], {"a": {"b": []}}, [None], [1, "a"]]
ODD = st.one_of(
    st.sampled_from([None, True, False, *NUMBERS, *HOLDERS]).map(copy.deepcopy), ANY_TEXT, st.integers(), st.floats()
)


@st.composite
def accident(draw, content: bytes) -> bytes:
    """The bytes after one accident."""
    at, n = (draw(st.integers(0, len(content))) for _ in range(2))
    lines = content.splitlines(keepends=True) or [b""]
    line = draw(st.integers(0, len(lines) - 1))
    damages = [
        lambda: draw(st.binary(max_size=200)),
        lambda: b"",
        lambda: b"\xef\xbb\xbf" + content,
        lambda: content.replace(b"\n", b"\r\n"),
        lambda: content.replace(b"\n", b"\r"),
        lambda: content[:at],
        lambda: content[:at] + draw(st.binary(max_size=8)) + content[at + 1 :],
        lambda: content[:at] + content[at + n % 50 :],
        lambda: b"".join(lines[:line] + lines[line + 1 :]),
        lambda: b"".join(lines[: line + 1] + lines[line:]),
        lambda: content.decode("utf-8", "replace").encode("utf-16"),
        lambda: content[:at] + b"[" * 20_000 + content[at:],
        lambda: content[:at] + b"9" * 5000 + content[at:],
        lambda: content.replace(b'"', b"'"),
    ]
    return draw(st.sampled_from(damages))()


@st.composite
def damaged(draw, content: bytes) -> bytes:
    """The bytes after one to three accidents."""
    for _ in range(draw(st.integers(1, 3))):
        content = draw(accident(content))
    return content


def places(value, path=()) -> list[tuple]:
    """Paths to everything inside."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path] + [found for key, item in inner for found in places(item, (*path, key))]


@st.composite
def changed(draw, whole, most: int):
    """A value made of dicts, lists and scalars after one to `most` changes at random places."""
    value = copy.deepcopy(whole)
    for _ in range(draw(st.integers(1, most))):
        found = places(value)
        # a field of an event as often as one of its hundred texts
        depth = draw(st.sampled_from(sorted({len(path) for path in found})))
        path = draw(st.sampled_from([path for path in found if len(path) == depth]))
        if not path:
            continue
        holder = value
        for key in path[:-1]:
            holder = holder[key]
        key, how = path[-1], draw(st.sampled_from(["odd", "odd", "drop", "double", "rename", "wrap", "swap"]))
        if how == "odd":
            holder[key] = draw(ODD)
        elif how == "drop":
            del holder[key]
        elif how == "wrap":
            holder[key] = draw(st.sampled_from([lambda x: [x], lambda x: {"a": x}, lambda x: str(x)]))(holder[key])
        elif how == "double" and isinstance(holder, list):
            holder.insert(key, copy.deepcopy(holder[key]))
        elif how == "swap":
            other = draw(st.sampled_from(list(holder) if isinstance(holder, dict) else range(len(holder))))
            holder[key], holder[other] = holder[other], holder[key]
        elif isinstance(holder, dict):
            name = draw(ANY_TEXT) if how == "double" else f"{key}{draw(st.sampled_from('sx_ '))}"
            holder[name] = copy.deepcopy(holder[key])
            if how == "rename":
                del holder[key]
    return value


def jsonl(rows: list) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def chained(rows: list) -> bytes:
    """JSON lines in which every object names the hash of the line before it."""
    lines, before = [], FIRST
    for row in rows:
        lines.append(jsonl([row | {"prev": before} if isinstance(row, dict) else row]))
        before = line_hash(lines[-1])
    return b"".join(lines)


def toml(table: dict) -> bytes:
    """The value as TOML, inner tables on their line; what TOML cannot say becomes something that is not TOML."""
    lines = [f"{json.dumps(str(key))} = {_toml(item)}\n" for key, item in table.items()]
    return "".join(lines).encode("utf-8", "surrogatepass")


def _toml(value) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(str(key))} = {_toml(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    return json.dumps(value, ensure_ascii=False)


MAY_LACK = {"fit", "divergence", "retain", "slope", "pressure", "cosine_to_first", "cosine_student_teacher", "kl_p95"}
"""Numbers of a run that need not be finite, besides those of metrics, items, scores and norms."""
NAMED = ("metrics", "items", "scores", "norms")


def encode_text(text: str) -> str:
    """The text as a record holds it: without halves of characters."""
    return plain(text)


def as_rows(events) -> list[dict]:
    """The events as JSON objects."""
    return [encode(event, "") for event in events]


@st.composite
def valid_events(draw) -> list[dict]:
    """A run with texts of any kind and numbers that were not finite, cut anywhere."""
    text = draw(st.one_of(ANY_TEXT, REPEATED))
    chance = draw(st.sampled_from([0.0, 0.1, 1.0]))
    random = draw(st.randoms(use_true_random=False))

    def walk(value, may_lack=False):
        if isinstance(value, dict):
            return {k: walk(v, may_lack or k in MAY_LACK or k in NAMED) for k, v in value.items()}
        if isinstance(value, list):
            return [walk(item, may_lack) for item in value]
        missing = isinstance(value, float) and may_lack and random.random() < chance
        return random.choice(["NaN", "Infinity", "-Infinity"]) if missing else value

    start, *rest = as_rows(run_events(1, 2, 1, 6, text))
    told = encode_text(text)
    start |= {"trait": start["trait"] | {"name": told, "positive": told}, "command": [told]}
    return [start, *walk(rest[: draw(st.integers(0, len(rest)))])]
