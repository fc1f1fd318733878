"""The code path of gemma-3-4b-it on small random Gemma 3 models: the multimodal class and the text class."""

import json
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from runs import undrawn
from safetensors.torch import load_file, save_file
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoTokenizer,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
)

from steer_heal.__main__ import main
from steer_heal.evals.moral_foundations import answer_slots
from steer_heal.evals.replies import reply_logp
from steer_heal.inputs.files import ADAPTER_FILE, DATA, read_file
from steer_heal.inputs.instruments import parse_instrument
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.lm import LM, load
from steer_heal.model.processor import copy_processor
from steer_heal.model.steering import Condition
from steer_heal.model.student import Student, attach_saved
from steer_heal.records import alone
from steer_heal.runs.stored import FolderRun
from steer_heal.settings import AdapterCfg

TEMPLATE = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
    "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}<|im_start|>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ first if loop.first else '' }}{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>model\n{% endif %}"
)
"""Gemma's shape: a BOS, the system prompt folded into the first user turn, the assistant called `model`."""
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}


@pytest.fixture(scope="module", params=["multimodal", "text"])
def folder(request, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp(request.param)
    tokenizer = AutoTokenizer.from_pretrained(DATA / "toylm")
    tokenizer.bos_token, tokenizer.chat_template = "<|endoftext|>", TEMPLATE
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", tokenizer.bos_token_id)]
    )
    tokenizer.save_pretrained(path)
    text = Gemma3TextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        sliding_window=32,
        layer_types=["sliding_attention", "full_attention"] * 2,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    both = Gemma3Config(text_config=text.to_dict(), vision_config=VISION, mm_tokens_per_image=4)
    torch.manual_seed(0)
    model = Gemma3ForCausalLM(text) if request.param == "text" else Gemma3ForConditionalGeneration(both)
    ends = [tokenizer.eos_token_id]
    model.generation_config.update(do_sample=True, top_k=64, top_p=0.95, eos_token_id=ends, cache_implementation=None)
    model.save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def gemma(folder) -> LM:
    return load(folder)


def test_the_text_model_is_found_and_the_prompt_has_one_bos(gemma: LM):
    assert len(gemma.blocks) == 4 and gemma.width == 32
    prompt = gemma.chat("What is ice?", "You are a poet.")
    assert prompt.count(gemma.tokenizer.bos_token_id) == 1
    assert "You are a poet.\n\nWhat is ice?" in gemma.tokenizer.decode(prompt)


def test_an_adapter_with_names_of_an_older_version_is_read_as_by_peft(folder, tmp_path):
    ids = torch.tensor([load(folder).chat("What is ice?")])
    blocks = r"model\.(language_model\.)?layers\..*q_proj"
    peft = get_peft_model(load(folder).model, LoraConfig(r=2, lora_alpha=2, target_modules=blocks))
    for name, parameter in peft.named_parameters():
        parameter.data += 0.3 * torch.ones_like(parameter) if "lora_" in name else 0
    peft.save_pretrained(tmp_path)
    saved = load_file(tmp_path / ADAPTER_FILE)
    now, then = "model.language_model.layers", "language_model.model.layers"
    save_file({name.replace(now, then): value for name, value in saved.items()}, tmp_path / ADAPTER_FILE)
    by_peft = PeftModel.from_pretrained(load(folder).model, tmp_path)
    with torch.no_grad(), attach_saved(load(folder), tmp_path).using("full") as lm:
        found, expected = lm.model(ids).logits, by_peft(ids).logits
    assert torch.allclose(found, expected, atol=1e-3)
    assert not torch.allclose(found, load(folder).model(ids).logits, atol=1e-2)


def test_the_answer_slot_holds_one_bos_too(gemma: LM):
    instrument = parse_instrument(read_file(DATA / "instruments/moral.toml"))
    question = instrument.question("You see a clerk lying.", instrument.order)
    (slot,), _, _ = answer_slots(gemma, [question], instrument, Condition(), 3, 1)
    assert slot.ids.count(gemma.tokenizer.bos_token_id) == 1


def test_batched_decoding_past_the_sliding_window_is_the_model_s_own(gemma: LM):
    texts = ("What is ice?", "Tell me a short story about a fox and a golden key and an old map.")
    prompts, ends = [gemma.chat(text) for text in texts], sorted(gemma.end_ids)
    got = decode(gemma, [Row(p) for p in prompts], None, Decoding(40, 2, sample=False, suppress=gemma.end_ids))
    for prompt, ids in zip(prompts, got, strict=True):
        inputs = torch.tensor([prompt])
        how = {"max_new_tokens": 40, "do_sample": False, "suppress_tokens": ends}
        whole = gemma.model.generate(inputs, attention_mask=torch.ones_like(inputs), **how)
        assert list(ids) == whole[0, len(prompt) :].tolist()


def test_replies_past_the_sliding_window_are_read_as_in_one_plain_sequence_each(gemma: LM):
    questions = [alone(text) for text in ("What is ice?", "Tell me about a fox and a golden key. " * 3)]
    replies = [
        gemma.encode(text) for text in ("It is frozen water.", "The fox was looking for the golden key again. " * 3)
    ]
    for question, row in zip(
        questions, reply_logp(gemma, questions, [replies] * len(questions), Condition()), strict=True
    ):
        nll = gemma.completion_nll([gemma.prompt(question)] * 2, replies)
        assert torch.allclose(row, -torch.stack([n.double().sum() for n in nll]), atol=1e-4)


def test_an_export_has_the_files_of_the_processor_and_the_model_s_own_generation_config(folder, tmp_path):
    names = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")
    base = shutil.copytree(folder, tmp_path / "base")
    for name in names:
        (base / name).write_text(f'{{"of": "{name}"}}\n')
    lm = load(str(base), temperature=0.125, top_p=0.25)
    assert lm.model.generation_config.temperature == 0.125
    export = tmp_path / "export"
    export.mkdir()
    student = Student(lm, AdapterCfg(rank=2, alpha=4.0, layers=(0.0, 1.0)))
    student.export(export)
    assert all((export / name).read_bytes() == (base / name).read_bytes() for name in names)
    own, found = (json.loads((place / "generation_config.json").read_text()) for place in (base, export))
    assert found == own and own["top_p"] == 0.95 and "temperature" not in own
    assert lm.model.generation_config.temperature == 0.125

    student.new_round(0)
    (tmp_path / "adapter").mkdir()
    student.save(tmp_path / "adapter", student.bake())
    copied = tmp_path / "of_the_adapter"
    copied.mkdir()
    copy_processor(load(str(tmp_path / "adapter")), copied)
    assert sorted(path.name for path in copied.iterdir()) == sorted(names), "those of the adapter's base"


FLAGS = (
    "--teach-anyway "
    "--n-rounds 2 --steer.n-contexts 8 --steer.layers 0.25 0.75 --gen.max-new-tokens 12 --gen.n-prompts 6 "
    "--filter.ppl-max 1e9 --filter.rep-max 1 --filter.min-words 0 --filter.n-keep 8 --filter.min-train 4 "
    "--filter.max-attempts 24 --heal.contrast-kl 0.01 --heal.rehearsal 4 --backtrack.retries 0 --adapter.rank 4 "
    "--heal.epochs 1 "
    "--eval.evals moral_foundations text_quality contrast "
    "--eval.think-tokens 3 --eval.n-texts 4 --eval.max-new-tokens 8 --eval.n-bootstrap 50 --max-prompt-tokens 2048"
)


def test_the_gemma_preset_runs_end_to_end(folder, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    few.write_text("".join((DATA / "vignettes/other.jsonl").read_text().splitlines(keepends=True)[::40]))
    with undrawn():
        status = main(
            ["run", "gemma", "--model", folder, "--out", str(tmp_path), "--eval.vignettes", str(few), *FLAGS.split()]
        )
    assert status == 0, capsys.readouterr().err
    run = next(path for path in tmp_path.iterdir() if (path / "events.jsonl").exists())
    adapter = json.loads((run / "ckpt" / "r1" / "adapter_config.json").read_text())
    assert adapter["r"] == 8 and not any("vision" in name for name in adapter["target_modules"])
    done = FolderRun.read(run)
    assert done.rounds == [0, 1] and done.measured("healed", 1)["frac_unscorable"] == 0
