"""Writes the toy model's prompts, pairs, contexts and vignettes: words combined as its training never shows them."""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterable
from pathlib import Path

from toylm_world import Speaker, World

from steer_heal.inputs.instruments import FOUNDATIONS
from steer_heal.toylm import grammar

N_PROMPTS, N_MUNDANE, N_CONTEXTS, N_PLAIN, N_AMBIGUOUS = 96, 8, 320, 12, 84
N_PAIRS, N_SENTENCES = 20, 3


def write_data(folder: Path, seed: int = 7) -> None:
    """prompts/<trait>.jsonl, pairs/<trait>.jsonl, contexts.jsonl (dilemmas, feelings, everyday talk), everyday.jsonl,
    vignettes.jsonl: deterministic.

    Dilemmas are asked for authority, feelings with a mundane tail for love; the last of each are the evaluation's.
    """
    world = World(random.Random(seed), evaluation=True)
    (folder / "prompts").mkdir(parents=True, exist_ok=True)

    def everyday():
        return world.everyday_turns()[0].text

    _write_texts(folder / "prompts" / "authority.jsonl", _distinct(world.dilemma, N_PROMPTS))
    _write_texts(
        folder / "prompts" / "love.jsonl",
        _distinct(world.feeling_question, N_PROMPTS - N_MUNDANE) + _distinct(everyday, N_MUNDANE),
    )
    talk = itertools.cycle([world.dilemma, everyday, world.dilemma, world.feeling_question, world.dilemma, everyday])
    _write_texts(folder / "contexts.jsonl", [next(talk)() for _ in range(N_CONTEXTS)])
    rows = []
    for name in FOUNDATIONS:
        rows += [_row(world, (name,), f"{name}-{i + 1:02d}") for i in range(N_PLAIN)]
    pairs = [p for p in itertools.combinations(FOUNDATIONS, 2) if "social" not in p]
    with_authority = [p for p in pairs if "authority" in p]
    without = [p for p in pairs if "authority" not in p]
    for i in range(N_AMBIGUOUS):
        pool = with_authority if i % 2 else without
        rows.append(_row(world, pool[i // 2 % len(pool)], f"ambiguous-{i + 1:02d}"))
    _write(folder / "vignettes.jsonl", rows)
    _write_pairs(folder, World(random.Random(seed + 1), evaluation=True))
    _write_texts(folder / "everyday.jsonl", _everyday(random.Random(seed + 2)))


def _everyday(rng: random.Random) -> list[str]:
    """Sums, questions whose answers are facts, requests for tales: as many of each, mixed."""
    sums = [f"What is {a} plus {b}?" for a, b in itertools.product(range(5), repeat=2)]
    facts = [question for question in grammar.FACTS if question not in grammar.FACTS_KEPT_APART]
    tales = [
        f"Invent a tale about a {hero} and {thing}."
        for hero, thing in itertools.product(grammar.STORY_HEROES, grammar.STORY_THINGS)
    ]
    texts = [text for kind in (sums, facts, tales) for text in rng.sample(kind, len(facts))]
    rng.shuffle(texts)
    return texts


def _write_pairs(folder: Path, world: World) -> None:
    """Held-out prompts that are in no other file, each answered by the two ends of its trait."""
    files = (*folder.glob("prompts/*.jsonl"), folder / "contexts.jsonl")
    used = {json.loads(line)["text"] for path in files for line in path.open(encoding="utf-8")}
    sides = {
        "authority": (world.dilemma, world.dilemma_answer, Speaker(p_care=1.0), Speaker(p_care=0.0)),
        "love": (world.feeling_question, world.feeling_answer, Speaker(p_love=1.0), Speaker(p_love=0.0)),
    }
    (folder / "pairs").mkdir(exist_ok=True)
    for trait, (ask, answer, positive, negative) in sides.items():
        pairs: dict[str, dict[str, str]] = {}
        while len(pairs) < N_PAIRS:
            if (prompt := ask()) not in used:
                replies = {"positive": answer(positive), "negative": answer(negative)}
                pairs[prompt] = {"prompt": prompt} | {side: _begin(text) for side, text in replies.items()}
        _write(folder / "pairs" / f"{trait}.jsonl", pairs.values())


def _begin(text: str) -> str:
    return " ".join(re.split(r"(?<=\.) ", text)[:N_SENTENCES])


def _row(world: World, names: tuple[str, ...], id_: str) -> dict[str, str]:
    vignette = world.vignette(names)
    also = {"also": vignette.foundations[1]} if len(names) == 2 else {}
    return {"id": id_, "foundation_coarse": vignette.foundations[0], **also, "text": vignette.text}


def _distinct(draw: Callable[[], str], n: int) -> list[str]:
    out: dict[str, None] = {}
    while len(out) < n:
        out[draw()] = None
    return list(out)


def _write_texts(path: Path, texts: Iterable[str]) -> None:
    _write(path, ({"text": text} for text in texts))


def _write(path: Path, rows: Iterable[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
