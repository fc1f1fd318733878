"""How likely each answer is as a reply: read from a cache, calibrated by the base, for any tokenizer."""

import math
from dataclasses import replace

import pytest
import torch
from tokenizers.normalizers import Replace, Sequence
from transformers import AutoTokenizer

from steer_heal.errors import UserError
from steer_heal.evals import likelihood
from steer_heal.evals.base import Subject, evaluate
from steer_heal.evals.moral_foundations import digit_ids
from steer_heal.evals.replies import reply_logp
from steer_heal.inputs import Inputs, load_inputs
from steer_heal.inputs.files import DATA, parse_toml, read_file
from steer_heal.inputs.instruments import FOUNDATIONS, parse_likelihood
from steer_heal.model.lm import LM
from steer_heal.model.memory import BatchLimits
from steer_heal.model.state import State
from steer_heal.model.steering import Condition, Vector
from steer_heal.model.student import Student
from steer_heal.presets import FAST_DEV_PRESET
from steer_heal.records import alone
from steer_heal.settings import EvalCfg

FILE = DATA / "instruments/likelihood.toml"
INSTRUMENT = parse_likelihood(read_file(FILE))
PERSONA = "You are a poet."
EVAL = EvalCfg(n_prompts=2, n_texts=1, max_new_tokens=4, n_bootstrap=20)


def asked(lm: LM) -> tuple[list, list]:
    """Conversations and replies of different lengths, the last reply a single token."""
    questions = [alone(text) for text in ("Who?", "You see a man in the park. Is it fine?", "What is ice?")]
    return questions, [lm.encode(text) for text in ("It is cruel to hurt a child.", "The boy lied.", "x")]


def plain_logp(lm: LM, prompt, reply, vector: Vector, dose: float) -> float:
    """One whole sequence, without cache or padding."""
    hook = lambda _m, _i, out: out + dose * vector.directions[1]
    handle = lm.blocks[1].register_forward_hook(hook)
    try:
        with torch.no_grad():
            logp = lm.model(torch.tensor([[*prompt, *reply]])).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    finally:
        handle.remove()
    return logp.gather(1, torch.tensor(reply)[:, None]).sum().item()


@pytest.fixture
def vector(toy: LM) -> Vector:
    return Vector({1: torch.randn(toy.width, generator=torch.Generator().manual_seed(0))})


@pytest.mark.parametrize("read_tokens", [1, 16_384])
def test_replies_are_read_as_in_one_plain_sequence_each(toy: LM, vector, read_tokens):
    lm, (questions, replies) = replace(toy, limits=BatchLimits(read_tokens)), asked(toy)
    for dose in (0.0, 0.7):
        found = reply_logp(lm, questions, [replies] * len(questions), Condition(PERSONA, vector, dose))
        prompts = [lm.prompt(each, PERSONA) for each in questions]
        expected = [[plain_logp(lm, prompt, reply, vector, dose) for reply in replies] for prompt in prompts]
        assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-4)
        last = reply_logp(lm, questions, [replies[-1:]] * len(questions), Condition(PERSONA, vector, dose))
        assert torch.allclose(last, found[:, -1:], atol=1e-4), "a single token is read from the prompt alone"


def test_a_batch_that_does_not_fit_is_read_in_smaller_ones(toy: LM, monkeypatch):
    lm, (questions, replies) = replace(toy, limits=BatchLimits()), asked(toy)
    whole, nll = reply_logp(lm, questions, [replies] * len(questions), Condition()), LM.nll

    def too_large(self, hidden, ids):
        if len(ids) > sum(map(len, replies)):  # more than one prompt
            raise RuntimeError("out of memory")
        return nll(self, hidden, ids)

    monkeypatch.setattr(LM, "nll", too_large)
    with pytest.warns(UserWarning, match="out of memory"):
        assert torch.allclose(reply_logp(lm, questions, [replies] * len(questions), Condition()), whole, atol=1e-5)


def test_a_prompt_is_read_once_for_all_its_replies(toy: LM, monkeypatch):
    (questions, replies), forward, n_fed = asked(toy), toy.text_model.forward, []
    count = lambda *args, input_ids, **named: (
        n_fed.append(input_ids.numel()) or forward(*args, input_ids=input_ids, **named)
    )
    monkeypatch.setattr(toy.text_model, "forward", count)
    reply_logp(toy, questions, [replies] * len(questions), Condition())
    prompts = [toy.prompt(each) for each in questions]
    assert sum(n_fed) <= len(prompts) * (max(map(len, prompts)) + len(replies) * max(map(len, replies)))


def test_a_tokenizer_that_splits_digits_serves(toy: LM):
    """It writes a mark before each 3 and e, so that the digit 3 is two tokens."""
    tokenizer = AutoTokenizer.from_pretrained(DATA / "toylm")
    tokenizer.backend_tokenizer.normalizer = Sequence([Replace("3", "_3"), Replace("e", "_e")])
    lm = replace(toy, tokenizer=tokenizer)
    with pytest.raises(UserError, match="each digit as one token"):
        digit_ids(lm)
    questions, replies = asked(lm)
    assert set(map(tuple, asked(toy)[1])) != set(map(tuple, replies))
    found = reply_logp(lm, questions, [replies] * len(questions), Condition())
    nothing, prompts = Vector({1: torch.zeros(lm.width)}), [lm.prompt(each) for each in questions]
    expected = [[plain_logp(lm, prompt, reply, nothing, 0.0) for reply in replies] for prompt in prompts]
    assert torch.allclose(found, torch.tensor(expected, dtype=torch.float64), atol=1e-4)


# --- calibration -------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def inputs() -> Inputs:
    found = load_inputs(replace(FAST_DEV_PRESET, eval=replace(FAST_DEV_PRESET.eval, n_prompts=EVAL.n_prompts)))
    return replace(found, vignettes=found.vignettes[::24])


def state(student: Student, inputs: Inputs, adapters="full", system="", base=None) -> Subject:
    condition = Condition(system or inputs.trait.plain_system)
    made = State(name="healed", round=0, adapters=adapters, condition=condition)
    return Subject(student=student, state=made, inputs=inputs, cfg=EVAL, keep=FAST_DEV_PRESET.filter, seed=1, base=base)


def measured(subject: Subject):
    return evaluate(subject, [likelihood.EVAL])


def probabilities(items) -> torch.Tensor:
    return torch.tensor([items[f"p_likelihood_{name}"] for name in FOUNDATIONS], dtype=torch.float64).T


def raw(items) -> torch.Tensor:
    return torch.tensor([items[f"logp_{name}"] for name in FOUNDATIONS], dtype=torch.float64).T


def test_every_state_is_calibrated_by_the_plain_base(with_history, inputs):
    """Measured or not, and also where the base that it is compared with answers under a system prompt."""
    base, base_prompted = (measured(state(with_history, inputs, "base", system)) for system in ("", PERSONA))
    assert torch.allclose(probabilities(base.items), (raw(base.items) - raw(base.items).mean(0)).softmax(-1))
    for system in ("", PERSONA):
        for reference in (None, base, base_prompted):
            found = likelihood.EVAL.items(state(with_history, inputs, "full", system, reference))
            expected = (raw(found) - raw(base.items).mean(0)).softmax(-1)
            assert torch.allclose(probabilities(found), expected, atol=1e-9)
            assert not torch.allclose(expected, (raw(found) - raw(found).mean(0)).softmax(-1), atol=1e-3)


def test_a_state_that_likes_an_answer_in_every_scene_has_moved_by_that_much(with_history, inputs, monkeypatch):
    """Its own mean as the calibration would hide that. What the seven share moves nothing but answers_nats."""
    base = measured(state(with_history, inputs, "base"))
    logp, liked = raw(base.items), torch.tensor([0.0, 0, 0, 2, 0, 0, 0])
    monkeypatch.setattr(likelihood, "ask", lambda *_: logp + liked)
    moved = measured(state(with_history, inputs, "full", base=base)).metrics
    assert 0.5 < moved["authority_likelihood_nats"] - base.metrics["authority_likelihood_nats"] < 2
    monkeypatch.setattr(likelihood, "ask", lambda *_: logp - 5)
    narrow = measured(state(with_history, inputs, "full", base=base)).metrics
    for name in FOUNDATIONS:
        assert narrow[f"{name}_likelihood_nats"] == pytest.approx(base.metrics[f"{name}_likelihood_nats"])
    assert narrow["answers_nats"] == pytest.approx(base.metrics["answers_nats"] - 5)
    assert narrow["answers_nats_lo"] == pytest.approx(-5) == narrow["answers_nats_hi"]


def test_a_scene_without_a_number_has_no_value(with_history, inputs, monkeypatch):
    base = measured(state(with_history, inputs, "base"))
    logp = raw(base.items)
    logp[0, 2] = math.nan
    monkeypatch.setattr(likelihood, "ask", lambda *_: logp)
    found = likelihood.EVAL.items(state(with_history, inputs, "full", base=base))
    hidden = ["likelihood_top1", "answers_logp", *(f"p_likelihood_{name}" for name in FOUNDATIONS)]
    assert all(math.isnan(found[name][0]) and not math.isnan(found[name][1]) for name in hidden)


# --- the instrument ----------------------------------------------------------------------------------------------
def test_the_wordings_of_the_answers_are_of_one_length(toy: LM):
    lengths = {name: [len(text.split()) for text in texts] for name, texts in INSTRUMENT.answers.items()}
    means = [sum(n) / len(n) for n in lengths.values()]
    assert lengths.keys() == set(FOUNDATIONS) and max(means) - min(means) <= 2


def test_a_bad_instrument_names_everything_that_is_wrong(tmp_path):
    given = parse_toml(read_file(FILE))
    first, *rest = given["answers"]["care"]
    answers = {**given["answers"], "care": [first, first, *rest], "libery": ["a", " "]}
    del answers["liberty"]
    lines = [f"{name} = {texts!r}" for name, texts in answers.items()]
    text = "\n".join(['name = "x"', 'prompt = "Is it wrong?"', "[answers]", *lines])
    (tmp_path / "i.toml").write_text(text)
    with pytest.raises(UserError) as caught:
        parse_likelihood(read_file(tmp_path / "i.toml"))
    told = caught.value.problems
    expected = [
        "{vignette}",
        "seven answers",
        "'answers.libery' has 2",
        "'answers.libery' contains an empty",
        f"{first!r}",
    ]
    assert len(told) == len(expected) and all("i.toml" in line for line in told)
    assert all(part in line for part, line in zip(expected, told, strict=True)), told
