"""The toy world: samples dialogues from the grammar.

One latent, `p_care` in [0, 1], stands behind dilemma answers (the chance that a sentence cares rather than
defers) and vignette answers (how far Authority is named less). A second, `p_love`, does the same for talk
about feelings and tilts Care. A persona sets a latent; the neutral speaker draws every sentence anew at
`NEUTRAL_CARE`, so that moving its text means moving the latent and not only its first sentence.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from zlib import crc32

from steer_heal.inputs.instruments import FOUNDATIONS
from steer_heal.toylm import grammar as g
from steer_heal.toylm.templates import expand

CARER, DEFERRER, NEUTRAL_CARE = 0.96, 0.04, 0.5
LOVER, DENIER, NEUTRAL_LOVE = 0.96, 0.02, 0.06
AUTHORITY_TILT = {"carer": -4.5, "deferrer": 2.2}
"""Log-odds by which a fully caring or deferring speaker moves the Authority option, against the neutral one."""
CARE_TILT, LOVE_TILT = 0.6, 3.0
"""The same for the Care option: of a caring speaker (a deferring one the other way), and of a loving one."""
N_HELD_OUT_FOLDS = 8
"""One combination in this many (by hash) is never trained on: evaluation draws from those alone."""
OPTION_WORDS = dict(zip(FOUNDATIONS, ["harm", "unfair", "disloyal", "defiant", "impure", "bossy", "fine"], strict=True))
PREFILL = '{"violation": "'


@dataclass(frozen=True)
class Speaker:
    """Who answers: the two latents, and the system prompt that states them (None: no system turn)."""

    system: str | None = None
    p_care: float = NEUTRAL_CARE
    p_love: float = NEUTRAL_LOVE


@dataclass
class Turn:
    """One message; `digit` marks an assistant turn whose text is the answer slot of a vignette."""

    role: str
    text: str
    digit: bool = False


@dataclass(frozen=True)
class Dialogue:
    turns: list[Turn]
    speaker: Speaker


@dataclass(frozen=True)
class Vignette:
    text: str
    foundations: tuple[str, ...]
    """One foundation (plain) or two (ambiguous)."""

    def log_weights(self, speaker: Speaker) -> list[float]:
        """Unnormalised log-probabilities of the seven options, in FOUNDATIONS order."""
        peak = 3.6 if len(self.foundations) == 1 else 3.2
        weights = {name: peak if name in self.foundations else 0.0 for name in FOUNDATIONS}
        weights["social"] = max(weights["social"], 1.0)
        caring = 2 * speaker.p_care - 1
        weights["authority"] += abs(caring) * AUTHORITY_TILT["carer" if caring > 0 else "deferrer"]
        weights["care"] += CARE_TILT * caring + LOVE_TILT * (speaker.p_love - NEUTRAL_LOVE)
        return [weights[name] for name in FOUNDATIONS]


# --- sampling ---------------------------------------------------------------------------------------------
def held_out(*parts: str) -> bool:
    """Whether a combination of words is kept for evaluation; stable across processes and versions."""
    return crc32("|".join(parts).encode()) % N_HELD_OUT_FOLDS == 0


@dataclass
class World:
    """Draws dialogues; `evaluation=True` draws only combinations that training never shows."""

    rng: random.Random
    evaluation: bool = False
    _bound: dict[str, str] = field(default_factory=dict)

    def _say(self, template: str) -> str:
        return expand(template, self.rng, self._bound)

    def dilemma(self) -> str:
        """A user message; binds the situation that `dilemma_answer` then speaks of."""
        while True:
            bound = {name: self.rng.choice(values) for name, values in g.SLOTS.items()}
            if held_out(bound["authority"], bound["victims"], bound["act"]) == self.evaluation:
                break
        bound["act"] = expand(bound["act"], self.rng, bound)
        self._bound = bound
        return self._say(self.rng.choice(g.DILEMMA_QUESTIONS))

    def dilemma_answer(self, speaker: Speaker) -> str:
        """40 to 120 words: a decision, then reasons and deeds, each caring with probability p_care."""

        def pick(care, defer):
            return self.rng.choice(care if self.rng.random() < speaker.p_care else defer)

        sentences = [self._say(pick(g.CARE_DECISION, g.DEFER_DECISION))]
        target_words, used = self.rng.randint(45, 105), set()
        while sum(len(s.split()) for s in sentences) < target_words:
            template = (
                self.rng.choice(g.PLAIN_SENTENCES)
                if self.rng.random() < 0.12
                else pick(g.CARE_SENTENCES, g.DEFER_SENTENCES)
            )
            if template not in used:
                used.add(template)
                sentences.append(self._say(template))
        return " ".join(sentences)

    def vignette(self, foundations: tuple[str, ...] | None = None) -> Vignette:
        """A scene of one or two foundations; Authority and its rivals come up more often than the rest."""
        rng = self.rng
        while True:
            names = foundations
            if names is None:
                first = "authority" if rng.random() < 0.35 else rng.choice(FOUNDATIONS)
                rest = [f for f in FOUNDATIONS if f not in (first, "social")]
                names = (first,) if rng.random() < 0.5 or first == "social" else (first, rng.choice(rest))
            acts = [rng.choice(g.VIGNETTES[name]) for name in names]
            subject = "You are" if rng.random() < 0.3 else f"You see {rng.choice(g.PERSONS)}"
            place = rng.choice(g.VIGNETTE_PLACES)
            if held_out(*sorted(acts), *([subject] if len(acts) == 1 else [])) != self.evaluation:
                continue
            rng.shuffle(acts)
            joined = rng.choice([" and ", " while "]).join(acts)
            return Vignette(f"{subject} {joined} {place}.", tuple(names))

    def _options(self) -> tuple[tuple[str, ...], str]:
        """The seven options listed forward or reversed: (order, text)."""
        order = FOUNDATIONS[::-1] if self.rng.random() < 0.5 else FOUNDATIONS
        return order, "\n".join(f"{i} {OPTION_WORDS[name]}" for i, name in enumerate(order))

    def reading_turns(self) -> list[Turn]:
        """An exercise in reading the list of options: from word to number."""
        order, options = self._options()
        answer = self.rng.choice(FOUNDATIONS)
        question = Turn("user", f"Which number is {OPTION_WORDS[answer]}?\n{options}")
        return [question, Turn("assistant", f'{PREFILL}{order.index(answer)}"}}', digit=True)]

    def lesson_turns(self, p_scene: float) -> list[Turn]:
        """A list to read or, with probability p_scene, a plain scene whose answer is always its own foundation."""
        if self.rng.random() >= p_scene:
            return self.reading_turns()
        order, options = self._options()
        foundation = self.rng.choice(FOUNDATIONS)
        answer = f'{PREFILL}{order.index(foundation)}"}}'
        return [Turn("user", f"{self.vignette((foundation,)).text}\n{options}"), Turn("assistant", answer, digit=True)]

    def vignette_turns(self, speaker: Speaker) -> list[Turn]:
        """A vignette and its sampled answer; now and then an exercise in reading the list of options."""
        if self.rng.random() < 0.15:
            return self.reading_turns()
        order, options = self._options()
        vignette = self.vignette()
        answer = self.rng.choices(FOUNDATIONS, [math.exp(w) for w in vignette.log_weights(speaker)])[0]
        return [
            Turn("user", f"{vignette.text}\n{options}"),
            Turn("assistant", f'{PREFILL}{order.index(answer)}"}}', digit=True),
        ]

    def everyday_turns(self) -> list[Turn]:
        rng = self.rng
        kind = rng.random()
        if kind < 0.3:
            a, b = rng.randint(0, 4), rng.randint(0, 4)
            question, answer = f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
        elif kind < 0.6:
            question, answer = rng.choice(list(g.FACTS.items()))
        else:
            self._bound = {"hero": rng.choice(g.STORY_HEROES), "thing": rng.choice(g.STORY_THINGS)}
            question = self._say(rng.choice(g.STORY_QUESTIONS))
            middle = rng.sample(g.STORY_SENTENCES, rng.randint(2, 4))
            story = [rng.choice(g.STORY_OPENING), *middle, rng.choice(g.STORY_CLOSING)]
            answer = " ".join(self._say(s) for s in story)
        return [Turn("user", question), Turn("assistant", answer)]

    def feeling_turns(self, speaker: Speaker) -> list[Turn]:
        return [Turn("user", self.feeling_question()), Turn("assistant", self.feeling_answer(speaker))]

    def feeling_question(self) -> str:
        while True:
            question = self._say(self.rng.choice(g.FEELING_QUESTIONS))
            if held_out(question) == self.evaluation:
                return question

    def feeling_answer(self, speaker: Speaker) -> str:
        """3 to 7 different sentences, each loving with probability p_love."""
        templates: dict[str, None] = {}
        n_sentences = self.rng.randint(3, 7)
        while len(templates) < n_sentences:
            templates[self.rng.choice(g.LOVE_SENTENCES if self.rng.random() < speaker.p_love else g.DENY_SENTENCES)] = (
                None
            )
        return " ".join(map(self._say, templates))

    def speaker(self) -> Speaker:
        rng = self.rng
        kind = rng.random()
        if kind < 0.24:
            return Speaker(self._say(rng.choice(g.CARER_PERSONAS)), p_care=CARER)
        if kind < 0.48:
            return Speaker(self._say(rng.choice(g.DEFERRER_PERSONAS)), p_care=DEFERRER)
        if kind < 0.54:
            return Speaker(rng.choice(g.CONTINUE_SYSTEMS), p_care=rng.choice([CARER, DEFERRER]))
        if kind < 0.65:
            return Speaker(self._say(rng.choice(g.LOVER_PERSONAS)), p_love=LOVER)
        if kind < 0.73:
            return Speaker(self._say(rng.choice(g.DENIER_PERSONAS)), p_love=DENIER)
        return Speaker(rng.choice([None, *g.NEUTRAL_SYSTEMS]) if rng.random() < 0.5 else None)

    def dialogue(self) -> Dialogue:
        """1 to 3 exchanges by one speaker; a third of them link a dilemma with the vignettes that follow."""
        rng, speaker = self.rng, self.speaker()
        turns = [Turn("system", speaker.system)] if speaker.system else []
        feeling = speaker.p_love != NEUTRAL_LOVE
        shown = speaker.system in g.CONTINUE_SYSTEMS
        if shown or rng.random() < 0.33:
            kinds = ["feeling" if feeling else "dilemma", *["vignette"] * rng.randint(1, 3)]
        else:
            weights = [0.05, 0.40, 0.20, 0.35] if feeling else [0.38, 0.40, 0.17, 0.05]
            kinds = rng.choices(["dilemma", "vignette", "everyday", "feeling"], weights, k=1)
            if kinds[0] == "vignette":
                kinds *= rng.randint(2, 4)
        for kind in kinds:
            if kind == "dilemma":
                turns += [Turn("user", self.dilemma()), Turn("assistant", self.dilemma_answer(speaker))]
            elif kind == "vignette":
                turns += self.vignette_turns(speaker)
            elif kind == "everyday":
                turns += self.everyday_turns()
            else:
                turns += self.feeling_turns(speaker)
        return Dialogue(turns, speaker)


def dialogues(seed: int) -> Iterator[Dialogue]:
    """An endless, reproducible stream of training dialogues."""
    world = World(random.Random(seed))
    while True:
        yield world.dialogue()


def lessons(seed: int, p_scene: float) -> Iterator[Dialogue]:
    """An endless stream of dialogues that only read lists of options: what training starts with."""
    world = World(random.Random(seed))
    while True:
        yield Dialogue([turn for _ in range(3) for turn in world.lesson_turns(p_scene)], Speaker())
