from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.lm import LM
from steer_heal.model.steering import Condition, Vector
from steer_heal.stages.generate import Ask, generate

HOW = Decoding(12, batch_size=2)
PERSONA = "You are a poet."
PLAIN = "You are helpful."
PROMPTS = ("What is ice?", "Tell me a short story about a fox.", "What barks?")
ASKS = [Ask(i % 3, PROMPTS[i % 3], seed=100 + i, alpha=0.5, kappa=0.4 * i) for i in range(6)]


def write(lm: LM, how: Decoding = HOW, **more):
    condition = Condition(PERSONA, Vector({1: lm.head.weight[7]}))
    return generate(lm, ASKS, condition, plain_system=PLAIN, how=how, **more)


def test_a_completion_is_written_under_the_persona_and_recorded_under_the_plain_prompt(tiny: LM):
    rows = [Row(tiny.chat(ask.prompt, PERSONA), ask.kappa * ask.alpha, ask.seed) for ask in ASKS]
    written = decode(tiny, rows, Vector({1: tiny.head.weight[7]}), HOW)
    for ask, ids, row in zip(ASKS, written, write(tiny), strict=True):
        assert (row.prompt_index, row.prompt, row.alpha, row.seed) == (ask.prompt_index, ask.prompt, 0.5, ask.seed)
        assert row.dose == ask.kappa * ask.alpha and row.prompt_ids == tiny.chat(ask.prompt, PLAIN)
        assert row.completion_ids == ids and row.text == tiny.tokenizer.decode(ids, skip_special_tokens=True)


def test_what_is_known_is_not_written_again_and_the_result_is_the_same(tiny: LM):
    batches = []
    whole = write(tiny, on_batch=batches.append)
    assert [len(batch) for batch in batches] == [2, 2, 2]
    assert sorted(sum(batches, []), key=lambda row: row.seed) == whole
    known = {(row.seed, row.dose): row.completion_ids for row in batches[0] + batches[1]}
    rest = []
    assert write(tiny, Decoding(12, batch_size=1), known=known, on_batch=rest.append) == whole
    assert {row.seed for row in sum(rest, [])} == {row.seed for row in batches[2]}
    all_known = {(row.seed, row.dose): row.completion_ids for row in whole}
    new = []
    assert write(tiny, known=all_known, on_batch=new.append) == whole and not new
