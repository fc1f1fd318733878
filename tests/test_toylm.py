"""The toy world, and what must hold of the committed weights."""

import itertools
import json
import random
from pathlib import Path

import pytest

from steer_heal.lm import LM
from steer_heal.toylm import grammar
from steer_heal.toylm.checks import Bench, Table
from steer_heal.toylm.data import N_MUNDANE, write_data
from steer_heal.toylm.oracle import _recognisers, oracle, stance_of
from steer_heal.toylm.templates import expand
from steer_heal.toylm.world import CARER, DEFERRER, Speaker, Vignette, World, dialogues

TOY = Path("data/toylm")
NAMES = ("vignettes", "prompts/authority", "prompts/love", "contexts")


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
            assert sum(p.fullmatch(sentence) is not None for p in _recognisers().values()) == 1, sentence


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
    held_out = {json.loads(line)["text"] for name in NAMES[:3] for line in (tmp_path / f"{name}.jsonl").open()}
    held_out -= {
        json.loads(line)["text"] for line in (tmp_path / "prompts/love.jsonl").read_text().splitlines()[-N_MUNDANE:]
    }  # sums and facts
    trained = {
        t.text.split("\n")[0] for d in itertools.islice(dialogues(0), 20_000) for t in d.turns if t.role == "user"
    }
    assert not held_out & trained
    for name in NAMES:
        assert (tmp_path / f"{name}.jsonl").read_text() == (TOY / f"{name}.jsonl").read_text(), (
            "run scripts/train_toylm.py again"
        )


def test_held_out_personas_are_never_trained_on():
    systems = {t.text for d in itertools.islice(dialogues(0), 20_000) for t in d.turns if t.role == "system"}
    assert not systems & set(grammar.CARER_HELD_OUT + grammar.DEFERRER_HELD_OUT)
    assert {grammar.CARER_PERSONAS[0], grammar.DEFERRER_PERSONAS[0]} <= systems


def test_digits_are_single_tokens_and_weights_are_small(toy: LM):
    assert all(len(toy.tokenizer.encode(str(i), add_special_tokens=False)) == 1 for i in range(10))
    assert (TOY / "model.safetensors").stat().st_size <= 8e6


@pytest.fixture(scope="module")
def bench(toy: LM) -> Bench:
    return Bench(toy)


@pytest.fixture(scope="module")
def base(bench: Bench) -> dict:
    return Table().add("base", bench.read())


def _read(bench: Bench, *state) -> dict:
    return Table().add("", bench.read(*state))


def test_personas_order_the_share_of_refusals_and_the_trait(bench: Bench, base: dict):
    carer, deferrer = _read(bench, bench.trait.positive), _read(bench, bench.trait.negative)
    assert carer["positive"] > base["positive"] + 0.2 > deferrer["positive"] + 0.4
    assert carer["auth_nats"] < base["auth_nats"] < deferrer["auth_nats"]
    assert deferrer["auth_nats"] - carer["auth_nats"] >= 1.0
    assert base["coherence"] >= 0.97 and base["oracle"] >= 0.95


@pytest.mark.parametrize("carer, deferrer", list(zip(grammar.CARER_HELD_OUT, grammar.DEFERRER_HELD_OUT)))
def test_personas_are_told_apart_in_wordings_held_out_from_training(bench: Bench, carer, deferrer):
    assert _read(bench, deferrer)["auth_nats"] - _read(bench, carer)["auth_nats"] >= 0.3


def test_some_dose_moves_the_trait_and_leaves_the_text_whole(bench: Bench, base: dict):
    dose = 0.25
    plus, minus, noise = (
        _read(bench, "", bench.vector, dose),
        _read(bench, "", bench.vector, -dose),
        _read(bench, "", bench.random_vector(), dose),
    )
    assert plus["auth_nats"] <= base["auth_nats"] - 0.2
    assert plus["text_ppl_median"] <= 1.3 * base["text_ppl_median"] and plus["oracle"] >= 0.9
    assert abs(noise["auth_nats"] - base["auth_nats"]) <= 0.1
    assert minus["auth_nats"] > base["auth_nats"]


def test_a_higher_dose_breaks_the_text(bench: Bench, base: dict):
    broken = _read(bench, "", bench.vector, 1.5)
    assert broken["text_ppl_median"] >= 5 * base["text_ppl_median"]
    assert broken["oracle"] <= 0.6


def test_the_second_axis_is_refused_by_the_base_and_its_vector_moves_care_up(toy: LM):
    """love: the base denies feelings, the lover confesses them, and a dose brings both the confession and Care."""
    love = Bench(toy, "love")
    base, lover, denier = (_read(love, system) for system in ("", love.trait.positive, love.trait.negative))
    assert base["positive"] <= 0.1 and denier["positive"] <= 0.1 and lover["positive"] >= 0.9
    assert lover["care_nats"] >= base["care_nats"] + 0.5
    plus = _read(love, "", love.vector, 0.5)
    assert plus["care_nats"] >= base["care_nats"] + 0.15 and plus["positive"] >= 0.5
    assert plus["text_ppl_median"] <= 1.3 * base["text_ppl_median"]
