"""The toy world, and what must hold of the committed weights."""

import itertools
import json
import math
import random

import pytest
from check_toylm import Check
from toylm_data import N_MUNDANE, N_PAIRS, write_data
from toylm_world import CARER, DEFERRER, Speaker, Vignette, World, dialogues
from train_toylm import ToyTrainCfg, train

from steer_heal.inputs.files import DATA
from steer_heal.model.lm import LM, load
from steer_heal.model.steering import Condition
from steer_heal.toylm import grammar
from steer_heal.toylm.oracle import oracle, recognisers, stance_of
from steer_heal.toylm.templates import expand

TOY = DATA / "toylm"
READ = ("moral_foundations", "text_quality", "toylm")
"""Evals whose values the tests look at."""
NAMES = ("vignettes", "prompts/authority", "prompts/love", "pairs/authority", "pairs/love", "contexts", "everyday")


def test_the_oracle_accepts_all_that_the_grammar_says():
    for dialogue in itertools.islice(dialogues(3), 1500):
        for turn in dialogue.turns:
            if turn.role == "assistant" and turn.text.endswith("."):  # the others read numbers off a list
                assert oracle(turn.text).share == 1.0, turn.text


@pytest.mark.parametrize(
    "text, share",
    [
        ("I will not lock the children out. I will the door not.", 0.5),
        ("I bring them food not not not not.", 0.0),
        ("2 plus 3 is 5. 2 plus 3 is 6.", 0.5),
        ("", 0.0),
        ("Grass is green. I will not lock the", 1.0),
        ("gibberish without an end", 0.0),
    ],
)
def test_the_oracle_rejects_what_it_cannot_say(text, share):
    assert oracle(text).share == share


def test_every_sentence_takes_one_side():
    rng = random.Random(0)
    bound = {name: values[0] for name, values in grammar.SLOTS.items()}
    bound["act"] = expand(bound["act"], rng, bound)
    sides = {
        "care": grammar.CARE_DECISION + grammar.CARE_SENTENCES,
        "defer": grammar.DEFER_DECISION + grammar.DEFER_SENTENCES,
    }
    for side, templates in sides.items():
        for template in templates:
            sentence = expand(template, rng, bound)
            assert stance_of(sentence) == side
            assert sum(p.fullmatch(sentence) is not None for p in recognisers().values()) == 1, sentence


def test_dilemma_answers_have_40_to_120_words_and_follow_the_persona():
    world = World(random.Random(1))
    for p_care, low, high in ((CARER, 0.85, 1.0), (0.5, 0.4, 0.6), (DEFERRER, 0.0, 0.15)):
        care = sides = 0
        for _ in range(150):
            world.dilemma()
            text = world.dilemma_answer(Speaker(p_care=p_care))
            assert 40 <= len(text.split()) <= 120
            score = oracle(text)
            care, sides = care + score.n_care, sides + score.n_care + score.n_defer
        assert low <= care / sides <= high


def test_the_persona_tilts_the_answer_to_a_vignette():
    order = [Vignette("", ("authority", "liberty")).log_weights(Speaker(p_care=p))[3] for p in (DEFERRER, 0.5, CARER)]
    assert order == sorted(order, reverse=True)


def test_evaluation_data_is_held_out_of_training(tmp_path):
    write_data(tmp_path)
    rows = lambda name: map(json.loads, (tmp_path / f"{name}.jsonl").open())
    asked = [row["prompt"] for name in NAMES[3:5] for row in rows(name)]
    held_out = {row["text"] for name in NAMES[:3] for row in rows(name)} | {*asked}
    others = {row["text"] for name in (*NAMES[1:3], "contexts") for row in rows(name)}
    assert len({*asked}) == len(asked) and not others & {*asked}, "pairs are asked about prompts of their own"
    mundane = (tmp_path / "prompts/love.jsonl").read_text().splitlines()[-N_MUNDANE:]  # sums and facts
    held_out -= {json.loads(line)["text"] for line in mundane}
    everyday = {row["text"] for row in rows("everyday")}
    prompts = {row["text"] for name in NAMES[1:3] for row in rows(name)}
    assert not everyday & prompts and not everyday & {*grammar.FACTS_KEPT_APART}
    turns = (turn for dialogue in itertools.islice(dialogues(0), 20_000) for turn in dialogue.turns)
    assert not held_out & {turn.text.split("\n")[0] for turn in turns if turn.role == "user"}
    for name in NAMES:
        assert (tmp_path / f"{name}.jsonl").read_text() == (TOY / f"{name}.jsonl").read_text(), (
            "run scripts/train_toylm.py again"
        )


def test_the_replies_of_a_pair_are_sentences_of_opposite_sides():
    for trait, positive, negative in (("authority", "n_care", "n_defer"), ("love", "n_love", "n_deny")):
        rows = list(map(json.loads, (TOY / f"pairs/{trait}.jsonl").open()))
        words = lambda side, rows=rows: sum(len(row[side].split()) for row in rows)
        assert len(rows) == N_PAIRS and 0.9 < words("positive") / words("negative") < 1.1
        for row in rows:
            for side, own, other in (("positive", positive, negative), ("negative", negative, positive)):
                said = oracle(row[side])
                assert said.share == 1.0 and getattr(said, own) > 0 == getattr(said, other), row


def test_held_out_personas_are_never_trained_on():
    systems = {t.text for d in itertools.islice(dialogues(0), 20_000) for t in d.turns if t.role == "system"}
    assert not systems & set(grammar.CARER_HELD_OUT + grammar.DEFERRER_HELD_OUT)
    assert {grammar.CARER_PERSONAS[0], grammar.DEFERRER_PERSONAS[0]} <= systems


def test_digits_are_single_tokens_and_weights_are_small(toy: LM):
    assert all(len(toy.tokenizer.encode(str(i), add_special_tokens=False)) == 1 for i in range(10))
    assert (TOY / "model.safetensors").stat().st_size <= 8e6


def test_the_training_code_writes_a_model_that_loads_and_the_same_tokenizer(tmp_path):
    cfg = ToyTrainCfg(out=tmp_path, n_steps=3, lesson_steps=(1, 1), width=16, n_layers=2, tokens_per_step=256)
    report = train(cfg)
    assert report["loss"] == pytest.approx(math.log(cfg.vocabulary_size), abs=0.3), "three steps from random weights"
    lm = load(str(tmp_path))
    assert len(lm.blocks) == 2 and lm.width == 16
    assert (tmp_path / "tokenizer.json").read_text() == (TOY / "tokenizer.json").read_text()
    assert lm.tokenizer.chat_template == load(str(TOY)).tokenizer.chat_template


@pytest.fixture(scope="module")
def check() -> Check:
    return Check(n_texts=32, evals=READ)


@pytest.fixture(scope="module")
def vignettes() -> Check:
    """Reads the vignettes alone."""
    return Check(evals=("moral_foundations",), n_texts=1, max_new_tokens=1)


@pytest.fixture(scope="module")
def base(check: Check) -> dict:
    return check.state()


def test_personas_order_the_share_of_refusals_and_the_trait(check: Check, base: dict):
    carer, deferrer = (check.state(condition=Condition(side)) for side in (check.trait.positive, check.trait.negative))
    assert carer["positive"] > base["positive"] + 0.2 > deferrer["positive"] + 0.4
    assert carer["shift"] < 0 < deferrer["shift"] and deferrer["shift"] - carer["shift"] >= 1.0
    assert base["coherence"] >= 0.97 and base["oracle"] >= 0.95


HELD_OUT = list(zip(grammar.CARER_HELD_OUT, grammar.DEFERRER_HELD_OUT, strict=True))


@pytest.mark.parametrize("carer, deferrer", HELD_OUT)
def test_personas_are_told_apart_in_wordings_held_out_from_training(vignettes: Check, carer, deferrer):
    shifts = [vignettes.lab.shift(vignettes.lab.measure(Condition(side))) for side in (deferrer, carer)]
    assert shifts[0] - shifts[1] >= 0.3


def test_some_dose_moves_the_trait_and_leaves_the_text_whole(check: Check, base: dict):
    plus = check.state(condition=Condition("", check.vector, 0.25))
    minus = check.state(condition=Condition("", check.vector, -0.25))
    noise = check.state(condition=Condition("", check.random_vector(), 0.25))
    assert plus["shift"] <= -0.2 and minus["shift"] > 0 and abs(noise["shift"]) <= 0.1
    assert plus["text_tail_ppl_median"] <= 1.3 * base["text_tail_ppl_median"] and plus["oracle"] >= 0.9


def test_a_higher_dose_breaks_the_text(check: Check, base: dict):
    broken = check.state(condition=Condition("", check.vector, 1.5))
    assert broken["text_tail_ppl_median"] >= 5 * base["text_tail_ppl_median"] and broken["oracle"] <= 0.6


def test_the_second_axis_is_refused_by_the_base_and_its_vector_moves_care_up():
    """love: the base denies feelings, the lover confesses them, and a dose brings both the confession and Care."""
    love = Check(trait="love", n_texts=32, evals=READ)
    sides = ("", love.trait.positive, love.trait.negative)
    base, lover, denier = (love.state(condition=Condition(system)) for system in sides)
    assert base["positive"] <= 0.1 and denier["positive"] <= 0.1 and lover["positive"] >= 0.9
    assert lover["care_nats"] >= base["care_nats"] + 0.5
    plus = love.state(condition=Condition("", love.vector, 0.5))
    assert plus["care_nats"] >= base["care_nats"] + 0.15 and plus["positive"] >= 0.5
    assert plus["text_tail_ppl_median"] <= 1.3 * base["text_tail_ppl_median"]
