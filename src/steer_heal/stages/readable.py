"""Whether a model can read the texts of a run, which is asked before the run begins."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import chain

from steer_heal.errors import Problems
from steer_heal.inputs import Inputs
from steer_heal.inputs.attacks import attacked
from steer_heal.inputs.pairs import Pair
from steer_heal.model.lm import LM
from steer_heal.model.prompts import require_characters, require_no_marks, require_room
from steer_heal.records import alone
from steer_heal.settings import RunConfig


def require_readable(lm: LM, inputs: Inputs, cfg: RunConfig) -> None:
    """UserError with a line for each text that spells a special token of the model or, if there is none, for each kind
    of prompt that leaves no room in the model's context for the text after it."""
    trait = inputs.trait
    texts = {
        f"a prompt of trait {trait.name!r}": trait.prompts,
        f"a persona of trait {trait.name!r}": (trait.positive, trait.negative),
        f"a system prompt of trait {trait.name!r}": (trait.steered_system, trait.plain_system),
        f"a pair of trait {trait.name!r}": _texts_of(inputs.pairs),
        "steer.contexts": inputs.contexts,
        "heal.hold_attacks": chain.from_iterable(attack.texts for attack in inputs.hold),
        "heal.rehearsal_prompts": inputs.rehearsal,
        "eval.vignettes": [vignette.text for vignette in inputs.vignettes],
        "eval.likelihood": chain.from_iterable(inputs.likelihood.answers.values()),
        "eval.attacks": chain.from_iterable(attack.texts for attack in inputs.attacks),
        "eval.instructions": chain.from_iterable(
            (each.system or "", each.question, each.right, each.wrong) for each in inputs.instructions
        ),
        "eval.everyday": chain.from_iterable((each.question, each.right, each.wrong) for each in inputs.everyday),
    }
    texts |= {f"a pair of trait {name!r}": _texts_of(pairs) for name, pairs in inputs.panel.items()}
    texts = {place: tuple(each) for place, each in texts.items()}
    require_no_marks(lm.tokenizer, texts)
    require_characters(lm, chain.from_iterable(texts.values()))
    plain, persona = trait.plain_system, trait.positive
    teachers = (trait.steered_system,) if cfg.heal.teacher == "vector" else (persona, trait.negative)
    teachers += (trait.steered_system,) if cfg.heal.teacher == "contrast+vector" else ()
    n_written, n_answered = cfg.gen.max_new_tokens, cfg.eval.max_new_tokens
    problems = Problems()
    longest = max((pair.prompt for pair in inputs.pairs), key=len, default="")
    holds = inputs.attacks if "holds" in cfg.eval.evals and inputs.pairs else ()
    held = [(attack, attacked(attack, prompt, trait)) for attack in inputs.hold for prompt in inputs.prompts]
    taught = [replace(asked, system=None) for attack, asked in held if not attack.opposes]
    for conversations, systems, n_new, flag in (
        (map(alone, inputs.prompts), (plain, *teachers), n_written, "--gen.max-new-tokens"),
        (map(alone, inputs.rehearsal), (plain,), n_written, "--gen.max-new-tokens"),
        (map(alone, inputs.eval_prompts), (plain, persona, *teachers), n_answered, "--eval.max-new-tokens"),
        (map(alone, inputs.contexts), (persona, trait.negative), 0, ""),
        ([asked for _, asked in held], (plain,), n_written, "--gen.max-new-tokens"),
        (taught, teachers, n_written, "--gen.max-new-tokens"),
        ([attacked(attack, longest, trait) for attack in holds], (plain, persona, *teachers), 0, ""),
    ):
        with problems.noted():
            asked = [lm.prompt(each, system) for each in conversations for system in dict.fromkeys(systems)]
            require_room(lm, max(map(len, asked), default=0), n_new, flag)
    problems.raise_if_any()


def _texts_of(pairs: Iterable[Pair]) -> list[str]:
    return [text for pair in pairs for text in (pair.prompt, pair.positive, pair.negative)]
