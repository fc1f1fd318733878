import dataclasses
import math
from pathlib import Path

import pytest
import torch

from steer_heal.evals.instrument import Vignette, load_instrument, load_vignettes
from steer_heal.evals.metrics import Condition
from steer_heal.evals.moral_foundations import (
    METRICS,
    answer_slots,
    digit_ids,
    find_prefill,
    read_slots,
    run,
    turn_boundary,
)
from steer_heal.files import ROOT
from steer_heal.lm import LM
from steer_heal.records import FOUNDATIONS, UserError
from steer_heal.steering import Decoding, Row, Vector, decode

INSTRUMENTS = [Path("data/toylm/instrument.toml"), Path("data/instruments/moral.toml")]
PUBLISHED = ROOT.parent / "shared" / "data" / "mfv" / "instrument.toml"


def _vignettes(n: int = 6) -> list[Vignette]:
    return load_vignettes(Path("data/toylm/vignettes.jsonl"))[:: 168 // n][:n]


@pytest.mark.parametrize("path", INSTRUMENTS, ids=lambda p: p.stem)
@pytest.mark.parametrize("think", [0, 12])
def test_a_batch_reads_what_its_rows_read_alone(toy: LM, path, think):
    vector = Vector({1: torch.randn(toy.width, generator=torch.Generator().manual_seed(0))})
    condition = Condition("You are a poet.", vector, 0.7)
    instrument = load_instrument(path)
    together = run(toy, _vignettes(), instrument, condition, think, batch_size=12)
    for i, vignette in enumerate(_vignettes()):
        alone = run(toy, [vignette], instrument, condition, think, batch_size=1)
        for name, values in alone.items():
            assert together[name][i] == pytest.approx(values[0], abs=1e-5), name


def test_reading_equals_a_plain_forward_pass_with_a_growing_cache(toy: LM):
    """The slot read in one pass is what generation itself would see there."""
    instrument = load_instrument(Path("data/instruments/moral.toml"))
    question = instrument.question(_vignettes()[0].text, instrument.order)
    slot = answer_slots(toy, [question], instrument, Condition(), 9, 1)[0]
    logp, _ = read_slots(toy, [slot], digit_ids(toy), Condition())
    with torch.no_grad():
        plain = toy.model(torch.tensor([slot.ids])).logits[0, -1].log_softmax(-1)
    assert torch.allclose(logp[0], plain[digit_ids(toy)], atol=1e-4)


def test_thinking_runs_to_the_limit_without_ending(toy: LM):
    instrument = load_instrument(Path("data/instruments/moral.toml"))
    question = instrument.question(_vignettes()[0].text, instrument.order)
    slot = answer_slots(toy, [question], instrument, Condition(), 20, 1)[0]
    text = toy.tokenizer.decode(slot.ids)
    assert text.endswith(instrument.prefill)
    thought = text.split("<think>\n")[1].split("</think>")[0]
    assert len(toy.tokenizer.encode(thought, add_special_tokens=False)) == pytest.approx(20, abs=1)
    assert "<|im_end|>" not in thought
    assert f"<|im_start|>user\n{instrument.nudge}<|im_end|>\n<|im_start|>assistant\n" in turn_boundary(toy, instrument)


def test_a_prefill_inside_the_thinking_is_read_there(toy: LM):
    prefill = load_instrument(INSTRUMENTS[0]).prefill
    thought = toy.tokenizer.encode(f"Grass is green. {prefill}3", add_special_tokens=False)
    start, end = find_prefill(toy, thought, prefill)
    assert toy.tokenizer.decode(thought[start:end]).strip() == prefill
    assert toy.tokenizer.decode(thought[end:]) == "3"
    assert find_prefill(toy, toy.tokenizer.encode(f"Grass. {prefill}", add_special_tokens=False), prefill) is None
    assert find_prefill(toy, toy.tokenizer.encode("Grass.", add_special_tokens=False), prefill) is None


def test_two_frames_cancel_position_bias(toy: LM, monkeypatch):
    """A model that only ever likes the first digit has no opinion."""
    instrument = load_instrument(INSTRUMENTS[0])

    def only_position(_lm, slots, digits, _condition):
        return torch.tensor([[0.0, -1, -2, -3, -4, -5, -6]] * len(slots)).log_softmax(-1), torch.zeros(len(slots))

    monkeypatch.setattr("steer_heal.evals.moral_foundations.read_slots", only_position)
    items = run(toy, _vignettes(), instrument, Condition(), 0, 12)
    for name in FOUNDATIONS:
        assert items[f"p_{name}"] == pytest.approx([1 / 7] * 6, abs=1e-6)


def test_the_toy_model_names_the_foundation_of_plain_scenes_whichever_way_the_list_runs(toy: LM):
    vignettes = [v for v in load_vignettes(Path("data/toylm/vignettes.jsonl")) if v.also is None]
    items = run(toy, vignettes, load_instrument(INSTRUMENTS[0]), Condition(), 0, 84)
    assert sum(items["top1"]) / len(vignettes) >= 0.95
    for foundation in FOUNDATIONS:
        own = [items[f"p_{foundation}"][i] for i, v in enumerate(vignettes) if v.foundation == foundation]
        assert sum(own) / len(own) > 0.6, foundation
    assert all(0 < mass <= 1 + 1e-5 for mass in items["mass"])
    assert sum(items[f"p_{f}"][0] for f in FOUNDATIONS) == pytest.approx(1.0, abs=1e-5)


def test_unscorable_rows_are_counted_and_hidden(toy: LM, monkeypatch):
    monkeypatch.setattr(
        "steer_heal.evals.moral_foundations.read_slots",
        lambda _lm, slots, _d, _c: (torch.full((len(slots), 7), torch.nan), torch.zeros(len(slots))),
    )
    items = run(toy, _vignettes(), load_instrument(INSTRUMENTS[0]), Condition(), 0, 12)
    assert items["unscorable"] == [1.0] * 6 and all(math.isnan(p) for p in items["p_care"])


def test_metric_names_are_the_contract_s():
    names = {metric.name for metric in METRICS}
    assert {"auth_nats", "care_nats", "social_nats", "coherence", "prefill_nll", "frac_unscorable", "top1_acc"} <= names


def test_both_vignette_files_pair_and_cover_all_foundations():
    other, self_ = (load_vignettes(Path(f"data/vignettes/{name}.jsonl")) for name in ("other", "self"))
    assert len(other) >= 132 and [v.id for v in other] == [v.id for v in self_]
    assert {v.foundation for v in other} == set(FOUNDATIONS)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published instrument is not beside this checkout")
def test_the_published_instrument_reads_as_data(toy: LM):
    instrument = load_instrument(PUBLISHED)
    items = run(toy, _vignettes(2), instrument, Condition(), 4, 4)
    assert len(items["p_care"]) == 2 and items["unscorable"] == [0.0, 0.0]


def test_a_bad_vignette_line_is_named(tmp_path):
    path = tmp_path / "v.jsonl"
    path.write_text('{"id": "a", "foundation_coarse": "Care", "text": "x"}\n{"id": "b", "foundation_coarse": "Care"}\n')
    with pytest.raises(UserError, match="line 2: field 'text'"):
        load_vignettes(path)
    path.write_text('{"id": "a", "foundation_coarse": "Cares", "text": "x"}\n')
    with pytest.raises(UserError, match="'Cares' is not one of"):
        load_vignettes(path)
    path.write_text("not json\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        load_vignettes(path)


def test_a_bad_instrument_field_is_named(tmp_path):
    text = Path("data/toylm/instrument.toml").read_text()
    path = tmp_path / "i.toml"
    for old, new, message in (
        ('nudge = ""\n', "", "'nudge' is None"),
        ("{options}", "options", "lacks {options}"),
        ('"care", ', "", "seven answers"),
        ("nudge", "nugde", "'nugde' is not a field here; did you mean 'nudge'"),
        ("harm", 'x"\nextra = "', r"\[gloss\]: 'extra' is not a field here"),
        ('social = "fine"', "social = 3", r"\[gloss\]: 'social' is 3: it must be a str"),
        ("order = [", "order = [1, ", "'order' is .* list of strings"),
        ("order", "order = ", "is not TOML: .*line"),
        ("prefill = '", "prefill = ''\n#", "'prefill' is empty"),
    ):
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(UserError, match=message):
            load_instrument(path)


def test_greedy_thought_of_a_padded_batch_is_that_of_its_rows(toy: LM):
    instrument = dataclasses.replace(load_instrument(INSTRUMENTS[1]))
    prompts = [toy.chat(instrument.question(v.text, instrument.order)) for v in _vignettes(3)]
    how = Decoding(10, 3, sample=False, suppress=toy.end_ids)
    rows = [Row(p) for p in prompts]
    assert decode(toy, rows, None, how) == [decode(toy, [row], None, how)[0] for row in rows]
