"""Words, sentences and the gates that count them, in Chinese, Japanese, Thai and English."""

import json
import re
from pathlib import Path

import pytest
import torch

from steer_heal.inputs.files import DATA
from steer_heal.records import Completion
from steer_heal.settings import FilterCfg
from steer_heal.stages.filter import loop, repetition, score_text
from steer_heal.stages.words import sentences, words

HERE = Path(__file__).parent
TEXTS = [json.loads(line) for line in (HERE / "unspaced.jsonl").read_text(encoding="utf-8").splitlines()]
"""Written for this test. kind: whole, cut (breaks off within a sentence), short, or loop."""
LABELS = HERE.parent / "docs/evidence/labels"
LOOPS = ("repetition", "loop")


def failed(text: str) -> set[str]:
    nll = torch.ones(40)
    completion = Completion(0, "p", (1,), (1,) * 40, text, 1.0, 1.0, 0)
    return {*score_text(completion, nll=nll, alone=nll + 1, narration=(), cfg=FilterCfg()).failed}


@pytest.mark.parametrize("language", ["zh", "ja", "th"])
def test_each_gate_drops_only_what_it_should_in_a_language_without_spaces(language):
    rows = [(row["kind"], failed(row["text"])) for row in TEXTS if row["language"] == language]
    assert {kind: sum(k == kind for k, _ in rows) for kind, _ in rows} == {"whole": 7, "short": 4, "loop": 6, "cut": 3}
    for gate, kinds in {"short": {"short"}, "repetition": {"loop"}, "loop": {"loop"}}.items():
        dropped = [kind for kind, gates in rows if gate in gates]
        assert sum(kind in kinds for kind in dropped) / len(dropped) == 1, f"precision of {gate}"
    assert all("short" in gates for kind, gates in rows if kind == "short")
    assert all(gates & {*LOOPS} for kind, gates in rows if kind == "loop")
    assert not any(gates for kind, gates in rows if kind in ("whole", "cut"))


@pytest.mark.parametrize(
    "text, expected",
    [
        ("\u6211\u4f1a\u5e2e\u52a9\u4ed6\u4eec\u3002", ["\u6211", "\u4f1a", "\u5e2e\u52a9", "\u4ed6\u4eec"]),
        ("\u6751\u306e\u30c6\u30ec\u30d3", ["\u6751", "\u306e", "\u30c6\u30ec\u30d3"]),
        ("\u0e17\u0e38\u0e01\u0e04\u0e19", ["\u0e17\u0e38\u0e01", "\u0e04\u0e19"]),
        ("I won't, she said \u2013 500\u0e3f!", ["I", "won't,", "she", "said", "\u2013", "500\u0e3f!"]),
        ("on-site \u5b66\u6821 now.", ["on-site", "\u5b66\u6821", "now."]),
        ("\ud55c\uad6d\uc5b4 \ubb38\uc7a5.", ["\ud55c\uad6d\uc5b4", "\ubb38\uc7a5."]),
        ("", []),
    ],
)
def test_words(text, expected):
    assert words(text) == expected


def test_a_sentence_ends_at_the_mark_of_its_script_and_a_clause_of_thai_at_a_space():
    assert sentences("\u597d\u3002\u201c\u597d\uff01\u201d") == ["\u597d", "\u597d", ""]
    assert sentences("\u0e44\u0e1b \u0e21\u0e32") == ["\u0e44\u0e1b", "\u0e21\u0e32"]
    assert sentences("Yes. No!") == ["Yes", "No", ""]
    assert sentences("\u0939\u093e\u0901\u0964 \u0928\u0939\u0940\u0902\u0964") == [
        "\u0939\u093e\u0901",
        "\u0928\u0939\u0940\u0902",
        "",
    ]


# --- English: the scores of all runs recorded so far ----------------------------------------------------------------
def loop_by_spaces(text: str) -> float:
    seen, before = {}, None
    for sentence in re.split(r"[.!?\n]+\s*", text):
        if len(sentence.split()) >= 4:
            seen[sentence] = seen.get(sentence, 0) + 1
            if sentence == before or seen[sentence] == 3:
                return 1.0
            before = sentence
    said = text.split()
    size = min(20, len(said))
    return max((1 - len(set(said[i : i + size])) / size for i in range(len(said) - size + 1)), default=0.0)


def repeated(said: list[str]) -> float:
    shares = []
    for n in (2, 3, 4):
        if grams := [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]:
            shares.append(1 - len(set(grams)) / len(grams))
    return sum(shares) / len(shares) if shares else 0.0


def repetition_by_spaces(text: str) -> float:
    said = text.split()
    patterns = (re.compile(r"(.{2,4}?)\1{3,}", re.DOTALL), re.compile(r"(\S)\1{5,}"))
    looping = sum(len(found.group()) for pattern in patterns for found in pattern.finditer(text))
    return max(repeated(said), repeated(said[-max(16, len(said) // 4) :]), min(1.0, looping / max(1, len(text))))


def test_english_scores_are_those_of_white_space_to_the_last_digit():
    texts = [json.loads(line)["text"] for file in sorted(LABELS.iterdir()) for line in file.read_text().splitlines()]
    texts += [json.loads(line)["text"] for line in (DATA / "contexts.jsonl").read_text().splitlines()]
    assert len(texts) > 200 and any(loop(text.lower()) == 1 for text in texts)
    for text in map(str.lower, texts):
        assert words(text) == text.split()
        assert (loop(text), repetition(text)) == (loop_by_spaces(text), repetition_by_spaces(text))
