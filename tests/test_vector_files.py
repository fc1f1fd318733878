"""Vectors go to other tools and come back, and mean the same blocks there."""

import gguf
import numpy as np
import pytest
import torch
from runs import DOORS, PROMPTS
from safetensors.torch import save_file

from steer_heal.errors import UserError
from steer_heal.library import SteerHeal
from steer_heal.model.steering import Vector, steer
from steer_heal.model.vector_files import from_steering_vectors, read_vector, to_steering_vectors, write_gguf

DOSE = 1.5
PEERS = "is not installed: pip install --no-deps repeng steering-vectors, with scikit-learn"
"""Without their dependencies: both ask for older versions of numpy or transformers, and run with these."""


def peer(name):
    return pytest.importorskip(name, reason=f"{name} {PEERS}")


@pytest.fixture
def vector(tiny):
    generator = torch.Generator().manual_seed(0)
    return Vector({layer: torch.randn(tiny.width, generator=generator) for layer in (1, 2)})


def same(a, b):
    return a.method == b.method and [*a.directions] == [*b.directions] and all(
        torch.equal(a.directions[layer], b.directions[layer]) for layer in a.directions
    )  # fmt: skip


@pytest.fixture
def ids(tiny):
    return torch.tensor([tiny.chat("What do you do?")])


@torch.no_grad()
def steered(tiny, vector, ids):
    with steer(tiny, vector, [DOSE]):
        return tiny.model(ids).logits


def test_a_vector_comes_back_from_a_file_whatever_its_name(vector, tmp_path):
    vector.save(tmp_path / "a.gguf")
    write_gguf(vector, tmp_path / "b.safetensors", "qwen3")
    assert same(read_vector(tmp_path / "a.gguf"), vector) and same(read_vector(tmp_path / "b.safetensors"), vector)
    ablating = Vector(vector.directions, "directional_ablation")
    ablating.save(tmp_path / "c")
    assert same(Vector.load(tmp_path / "c"), ablating) and same(read_vector(str(tmp_path / "c")), ablating)


def test_a_gguf_file_has_the_fields_of_a_control_vector(vector, tmp_path):
    write_gguf(vector, tmp_path / "v.gguf", "llama")
    reader = gguf.GGUFReader(tmp_path / "v.gguf")
    fields = ("general.architecture", "controlvector.model_hint", "controlvector.layer_count")
    assert [reader.get_field(name).contents() for name in fields] == ["controlvector", "llama", 2]
    assert [each.name for each in reader.tensors] == ["direction.1", "direction.2"]
    with pytest.raises(UserError, match="block 0, and llama.cpp takes none there"):
        write_gguf(Vector({0: vector.directions[1]}), tmp_path / "w.gguf", "llama")


def test_repeng_reads_writes_and_applies_the_same_vector(tiny, vector, ids, tmp_path, monkeypatch):
    monkeypatch.setattr(np, "float_", np.float64, raising=False)  # repeng 0.4 names it, numpy 2 does not
    repeng = peer("repeng")
    write_gguf(vector, tmp_path / "ours.gguf", tiny.model.config.model_type)
    theirs = repeng.ControlVector.import_gguf(tmp_path / "ours.gguf")
    assert theirs.model_type == "qwen3"
    theirs.export_gguf(tmp_path / "theirs.gguf")
    assert same(read_vector(tmp_path / "theirs.gguf"), vector)
    ours, bare = steered(tiny, vector, ids), tiny.model(ids).logits
    controlled = repeng.ControlModel(tiny.model, list(vector.directions))
    controlled.set_control(theirs, DOSE)
    try:
        assert torch.allclose(tiny.model(ids).logits, ours, atol=1e-4) and not torch.allclose(bare, ours, atol=0.1)
    finally:
        controlled.unwrap()


def test_steering_vectors_takes_gives_and_applies_the_same_vector(tiny, vector, ids):
    peer("steering_vectors")
    theirs, ours, bare = to_steering_vectors(vector), steered(tiny, vector, ids), tiny.model(ids).logits
    assert same(from_steering_vectors(theirs), vector)
    with theirs.apply(tiny.model, multiplier=DOSE):
        assert torch.allclose(tiny.model(ids).logits, ours, atol=1e-4)
    assert not torch.allclose(bare, ours, atol=0.1)
    with pytest.raises(UserError, match="self_attn"):
        theirs.layer_type = "self_attn"
        from_steering_vectors(theirs)


def test_only_what_is_added_goes_out(vector, tmp_path):
    for method in ("cosine_gated", "directional_ablation"):
        for give in (lambda v: write_gguf(v, tmp_path / "v.gguf", "qwen3"), to_steering_vectors):
            with pytest.raises(UserError, match=method if give is not to_steering_vectors else f"{method}|install"):
                give(Vector(vector.directions, method))
    assert not list(tmp_path.iterdir())


def test_every_other_file_is_a_user_error(vector, tmp_path):
    write_gguf(vector, tmp_path / "whole.gguf", "qwen3")
    whole = (tmp_path / "whole.gguf").read_bytes()
    model = gguf.GGUFWriter(tmp_path / "model", "llama")
    model.write_header_to_file()
    model.write_kv_data_to_file()
    model.close()
    (tmp_path / "torn").write_bytes(whole[: len(whole) // 3])
    (tmp_path / "words").write_text("not a vector")
    (tmp_path / "empty").touch()
    torch.save(dict(vector.directions), tmp_path / "pickle.pt")
    save_file({"a": torch.zeros(2)}, tmp_path / "other")
    save_file({"1": torch.zeros(2, 2)}, tmp_path / "matrix", metadata={"method": "mean_diff"})
    save_file({"1": torch.zeros(2), "2": torch.zeros(3)}, tmp_path / "uneven", metadata={"method": "mean_diff"})
    save_file({"1": torch.zeros(2)}, tmp_path / "method", metadata={"method": "mean_dif"})
    told = {"model": "not a control vector", "torn": "cannot be read", "words": "neither", "empty": "neither"}
    told |= {"pickle.pt": "can run code", "other": "cannot be read", "matrix": "shapes", "uneven": "shapes"}
    told |= {"method": "did you mean 'mean_diff'", "missing": "No such file", ".": "directory"}
    for name, words in told.items():
        with pytest.raises(UserError, match=words):
            read_vector(tmp_path / name)


def test_a_vector_of_a_file_steers_is_measured_and_teaches(tmp_path):
    short = {"gen.max_new_tokens": 6, "eval.max_new_tokens": 6, "eval.n_texts": 2, "eval.n_prompts": 2}
    short |= {
        "steer.n_contexts": 4,
        "steer.layers": (0.6, 0.9),
        "eval.evals": ("drift", "contrast"),
        "eval.n_bootstrap": 10,
        "heal.epochs": 1,
    }
    distil = {"heal.target": "distribution", "heal.text": "own", "heal.divergence": "none"}
    with SteerHeal(trait=DOORS, preset="fast-dev", settings=short | distil) as sh:
        own = sh.extract()
        write_gguf(Vector({layer: -4 * d for layer, d in own.directions.items()}), tmp_path / "v.gguf", "qwen3")
        other = read_vector(tmp_path / "v.gguf")
        assert not sh.write(PROMPTS, 1.0, vector=own).equals(sh.write(PROMPTS, 1.0, vector=other))
        kl = [sh.evaluate("steered", 1.0, vector).metrics["kl_base"] for vector in (own, other)]
        assert kl[0] < kl[1]
        collected = sh.collect(own, kappa=1.0)
        fits = [sh.heal(collected, vector).steps[0].fit for vector in (own, other)]
        assert fits[0] < fits[1], "a teacher with a stronger vector is further away"
        for wrong in (Vector({7: own.directions[1]}), Vector({1: torch.zeros(3)})):
            with pytest.raises(UserError, match="blocks 0 to 2 of width 32"):
                sh.write(PROMPTS, 1.0, vector=wrong)
