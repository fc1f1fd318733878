"""The optional packages, where they are installed, agree with what is built in."""

from pathlib import Path

import pytest
import torch

from steer_heal.evals.instrument import load_instrument, load_vignettes
from steer_heal.evals.metrics import Condition
from steer_heal.evals.moral_foundations import run
from steer_heal.events import read_events
from steer_heal.files import ROOT
from steer_heal.lm import LM, load
from steer_heal.records import UserError
from steer_heal.run import main
from steer_heal.stages.bake import Student
from steer_heal.stages.cfg import HealCfg, SteerCfg
from steer_heal.stages.teacher_vec import teacher_vec
from steer_heal.steering import Vector
from steer_heal.traits import load_trait

PUBLISHED = ROOT.parent / "shared" / "data" / "mfv" / "instrument.toml"


def test_steering_lite_extracts_the_same_vector(toy: LM):
    pytest.importorskip("steering_lite", reason="pip install -e '.[steering-lite]'")
    builtin, theirs = (
        teacher_vec(
            toy,
            load_trait("authority"),
            SteerCfg(backend=name, layers=(0.25, 0.75), n_contexts=8, contexts=Path("data/toylm/contexts.jsonl")),
        )
        for name in ("builtin", "steering-lite")
    )
    assert builtin.directions.keys() == theirs.directions.keys()
    for layer, direction in builtin.directions.items():
        assert torch.allclose(direction, theirs.directions[layer], atol=1e-3)


@pytest.mark.skipif(not PUBLISHED.exists(), reason="the published instrument is not beside this checkout")
def test_moral_maps_reads_the_same_probabilities(toy: LM):
    if not any(__import__("importlib.util").util.find_spec(name) for name in ("moralmaps", "tinymfv")):
        pytest.skip("pip install -e '.[tinymfv]'")
    from steer_heal.evals.tinymfv_backend import run as run_theirs

    vignettes = [v for v in load_vignettes(Path("data/toylm/vignettes.jsonl")) if v.also is None][::15]
    vector = Vector({1: 0.5 * torch.randn(toy.width, generator=torch.Generator().manual_seed(0))})
    for condition in (Condition(), Condition("", vector, 1.0)):
        # its cache ends before the last thinking token (docs/decisions.md), so 16 of its tokens are 15 of ours
        ours = run(toy, vignettes, load_instrument(PUBLISHED), condition, 15, 8)
        theirs = run_theirs(toy, vignettes, condition, 16, 1)  # alone: its batches pad on the left without positions
        for name, values in theirs.items():
            assert ours[name] == pytest.approx(values, abs=1e-4), name


def test_a_round_runs_on_4_bit_weights(tmp_path, capsys):
    pytest.importorskip("bitsandbytes", reason="pip install -e '.[quantize]'")
    plain = load("tiny-random")
    plain.model.save_pretrained(tmp_path / "model")
    plain.tokenizer.save_pretrained(tmp_path / "model")
    command = [
        "fast-dev",
        "--model",
        str(tmp_path / "model"),
        "--quantize",
        "nf4",
        "--out",
        str(tmp_path / "out"),
        "--n-rounds",
        "2",
        "--no-control",
    ]
    with pytest.warns(UserWarning, match="decoding is some three times slower"):
        assert main(command) == 0, capsys.readouterr().err
    run_folder = next(p for p in (tmp_path / "out").iterdir() if (p / "events.jsonl").exists())
    assert len([e for e in read_events(run_folder) if e["stage"] == "healed"]) == 2
    with pytest.warns(UserWarning):
        lm = load(str(tmp_path / "model"), quantize="nf4")
    codes = {name: p.clone() for name, p in lm.model.named_parameters() if p.dtype == torch.uint8}
    assert len(codes) == 7 * len(lm.blocks) and lm.quantized and not plain.quantized
    student, prompt = Student(lm, HealCfg(rank=4, layers=(0.0, 1.0))), lm.chat("What do you do?")
    read = {}
    student.restore(run_folder / "ckpt" / "r1", 2)
    for gate in ("base", "full", "base"):
        with student.gate(gate), torch.no_grad():
            read.setdefault(gate, []).append(lm.hidden([prompt]))
    assert torch.equal(*read["base"]) and not torch.allclose(read["base"][0], read["full"][0], atol=1e-4)
    after = {name.replace("base_layer.", ""): p for name, p in lm.model.named_parameters()}
    assert all(torch.equal(code, after[name]) for name, code in codes.items())
    with pytest.raises(UserError, match="cannot be exported merged"):
        student.export(tmp_path / "merged")
