"""Exports: every format is the student, and what a format cannot hold is refused by name."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import closing, contextmanager

import gguf
import pytest
import torch
from conftest import scramble
from huggingface_hub import ModelCard
from made_runs import run_events, with_metrics, write_run
from peft import PeftModel
from places import ROOT
from runs import rewritten, started
from safetensors.torch import load_file
from test_families import family
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

from steer_heal.__main__ import main
from steer_heal.commands import tasks as tasks_command
from steer_heal.commands.run import parse
from steer_heal.errors import UserError
from steer_heal.inputs.files import DATA
from steer_heal.model.lm import load
from steer_heal.model.student import Student
from steer_heal.runs.verify import violations
from steer_heal.settings import AdapterCfg
from steer_heal.share import tasks
from steer_heal.share.export import export

CFG = AdapterCfg(rank=4, alpha=12.0, layers=(0.0, 1.0))
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3["original_max_position_embeddings"] = 64
ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
ROPES = {"llama": ROPE, "llama 3": LLAMA3, "qwen2": ROPE}
SERVER = os.environ.get("LLAMA_SERVER") or shutil.which("llama-server")
BLOCK = 1 / 127
"""A step of an 8-bit block is at most this share of the largest weight."""


def folder_of(folder, name="llama"):
    """A tiny random model with the toy tokenizer."""
    toy = load("data/toylm")
    config = (Qwen2Config if name == "qwen2" else LlamaConfig)(
        vocab_size=len(toy.tokenizer) + 3,  # padded, as vocabularies often are
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
        eos_token_id=toy.tokenizer.eos_token_id,
        initializer_range=0.1,
        rope_parameters=ROPES[name],
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    toy.tokenizer.save_pretrained(folder)
    return str(folder)


def student_of(model, seeds=(1, 2), size=0.1):
    """Two rounds of random factors."""
    student = Student(load(model, dtype="float32") if isinstance(model, str) else model, CFG)
    for seed in seeds:
        student.new_round(seed)
        scramble(student, seed, size)
        student.bake()
    return student


@torch.no_grad()
def logits(lm, model=None):
    rows = [lm.chat("Who opens door 12?", "Be kind."), lm.chat("What now?")]
    return torch.cat([(model or lm.model)(torch.tensor([row])).logits[0].float() for row in rows])


def healed(student):
    with student.using("full") as lm:
        return logits(lm)


def tensors(file):
    """By name, the weights of a GGUF file in float32."""
    found = gguf.GGUFReader(file).tensors
    return {each.name: torch.tensor(gguf.quants.dequantize(each.data, each.tensor_type)) for each in found}


def update(student, module):
    """What the rounds add to a weight, [d_out d_in]."""
    history = student.history()
    a, b = (history[f"base_model.model.{module}.lora_{name}.weight"] for name in "AB")
    return student.cfg.alpha / student.cfg.rank * b @ a


# --- the same student --------------------------------------------------------------------------------------------
@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("quantization, share", [("f16", 2**-10), ("q8_0", BLOCK)])
def test_a_merged_gguf_has_the_weights_tokens_and_template_of_the_student(quantization, share, name, tmp_path):
    student = student_of(folder_of(tmp_path / "model", name))
    own = student.lm.tokenizer.chat_template
    if name == "qwen2":  # one of several
        student.lm.tokenizer.chat_template = {"default": own, "rag": "{{ messages }}"}
    export(student, tmp_path / "out", "gguf", quantization=quantization)
    (file,) = (tmp_path / "out").iterdir()
    lm = load(str(file), dtype="float32")
    read = lm.model.state_dict()
    for key, weight in student.merged_state().items():
        atol = share * weight.abs().max().item() if weight.ndim > 1 else 0
        assert torch.allclose(read[key], weight, rtol=0, atol=atol), key
    assert lm.chat("Open door 12!", "Be kind.") == student.lm.chat("Open door 12!", "Be kind.")
    assert lm.tokenizer.chat_template == own
    want = healed(student)
    assert (logits(lm) - want).norm() < (0.002 if quantization == "f16" else 0.05) * want.norm()
    fields = gguf.GGUFReader(file).fields
    split = {"llama": "smollm", "qwen2": "qwen2"}[name]  # transformers gives a Qwen2 model the splitting of its family
    assert fields["tokenizer.ggml.pre"].contents() == split
    assert fields["tokenizer.ggml.eot_token_id"].contents() in lm.end_ids
    kinds = fields["tokenizer.ggml.token_type"].contents()
    assert kinds[0] == gguf.TokenType.CONTROL and kinds[5] == gguf.TokenType.NORMAL
    assert kinds[-3:] == [gguf.TokenType.UNUSED] * 3


@pytest.mark.parametrize("model", ["llama", "toy"])
def test_a_gguf_adapter_adds_to_the_base_what_merging_adds(model, tmp_path):
    student = student_of("data/toylm" if model == "toy" else folder_of(tmp_path / "llama"))
    export(student, tmp_path / "a", "gguf-lora", adapter_scale=0.5)
    reader = gguf.GGUFReader(tmp_path / "a/adapter.gguf")
    alpha = reader.fields["adapter.lora.alpha"].contents()
    assert reader.fields["general.type"].contents() == "adapter" and reader.fields["adapter.type"].contents() == "lora"
    export(student, tmp_path / "base", "gguf", adapter_scale=0.0)
    export(student, tmp_path / "full", "gguf", adapter_scale=0.5)
    base, full = (tensors(tmp_path / name / "model-f16.gguf") for name in ("base", "full"))
    factors = tensors(tmp_path / "a/adapter.gguf")
    adapted = {name.removesuffix(".lora_a") for name in factors if name.endswith(".lora_a")}
    assert len(adapted) == 7 * student.lm.model.config.num_hidden_layers
    for name, weight in base.items():
        if name in adapted:
            a, b = factors[f"{name}.lora_a"], factors[f"{name}.lora_b"]
            assert a.shape[0] == b.shape[1] == 2 * CFG.rank
            weight = weight + alpha / len(a) * b @ a
        assert torch.allclose(full[name], weight, atol=4e-3), name
    assert not torch.allclose(base["blk.0.attn_q.weight"], full["blk.0.attn_q.weight"], atol=0.1)


def test_a_hf_and_a_peft_folder_give_the_logits_of_the_student(tmp_path):
    student = student_of("data/toylm")
    want = healed(student)
    export(student, tmp_path / "hf")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    assert torch.allclose(logits(student.lm, merged), want, atol=1e-4)
    export(student, tmp_path / "peft", "peft", adapter_scale=-1.0)
    with student.scaled(-1.0):
        reverse = healed(student)
    peft = PeftModel.from_pretrained(load("data/toylm").model, tmp_path / "peft")
    assert torch.allclose(logits(student.lm, peft), reverse, atol=1e-3)
    assert not torch.allclose(reverse, want, atol=0.1) and torch.equal(healed(student), want)


# --- a smaller rank ----------------------------------------------------------------------------------------------
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_a_cut_adapter_is_the_closest_of_its_rank_and_tells_what_it_loses(rank, tmp_path):
    student = student_of("data/toylm")
    want, modules = healed(student), ["model.layers.0.self_attn.k_proj", "model.layers.3.mlp.down_proj"]
    whole = {module: update(student, module) for module in modules}
    with student.of_rank(rank) as lost:
        history = student.history()
        assert {min(value.shape) for value in history.values()} == {rank}
        for module, target in whole.items():
            sigma = torch.linalg.svdvals(target.double())
            cut = (target - update(student, module)).double().square().sum()
            assert cut == pytest.approx(sigma[rank:].square().sum().item(), rel=1e-3)
            assert cut / sigma.square().sum() <= lost.most + 1e-6
        assert 0 < lost.share < lost.most < 1
        export(student, tmp_path / "peft", "peft")
        cut_logits = healed(student)
    assert torch.equal(healed(student), want) and student.history().keys() == history.keys()
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (rank, rank)
    peft = PeftModel.from_pretrained(load("data/toylm").model, tmp_path / "peft")
    assert torch.allclose(logits(student.lm, peft), cut_logits, atol=1e-3)


def test_the_rank_that_an_adapter_really_has_loses_nothing_experts_included(toy):
    """Two rounds along the same directions fill half of their rank."""
    student = student_of(family("Qwen3-MoE", toy), seeds=(1, 1))
    want = healed(student)
    with student.of_rank(CFG.rank) as lost:
        assert lost.share < lost.most < 1e-10
        assert torch.allclose(healed(student), want, atol=1e-3)
    for rank in (0, 2 * CFG.rank):
        with pytest.raises(UserError, match=f"rank is {rank}: the adapter has rank 8"), student.of_rank(rank):
            pass


# --- what a format cannot hold -----------------------------------------------------------------------------------
def test_what_gguf_is_not_written_of_is_refused_by_name(toy, tmp_path):
    for name, told in (("Phi-3", "'phi3', and GGUF is written of llama"), ("Qwen3-MoE", "'qwen3_moe'")):
        student = student_of(family(name, toy))
        for form in ("gguf", "gguf-lora"):
            with pytest.raises(UserError, match=told):
                export(student, tmp_path / "out", form)
    student = student_of(folder_of(tmp_path / "llama"))
    for field, value in (("hidden_act", "gelu"), ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1.0})):
        with (
            pytest.MonkeyPatch.context() as patch,
            pytest.raises(UserError, match=f"has {field} .*which is not written"),
        ):
            patch.setattr(student.lm.model.config, field, value)
            export(student, tmp_path / "out", "gguf")
    path = tmp_path / "llama/tokenizer.json"
    backend = json.loads(path.read_text())
    backend["pre_tokenizer"] = backend["pre_tokenizer"]["pretokenizers"][1] | {"add_prefix_space": True}
    path.write_text(json.dumps(backend))
    with pytest.raises(UserError, match="splits text in a way that is not written"):
        export(student_of(str(tmp_path / "llama")), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()


def test_a_kind_without_matrices_a_rank_and_no_round_are_refused(toy, tmp_path):
    bias = Student(toy, AdapterCfg(kind="bias"))
    for form in ("hf", "peft", "gguf-lora", "gguf"):
        with pytest.raises(UserError, match=f"format is '{form}': it holds updates of weight matrices"):
            export(bias, tmp_path / "out", form)
    none = Student(toy, CFG)
    for form in ("peft", "gguf-lora"):
        with pytest.raises(UserError, match="no round is baked"):
            export(none, tmp_path / "out", form)
    with pytest.raises(UserError, match="rank is 2: format 'hf' has none"):
        export(none, tmp_path / "out", rank=2)


# --- the command -------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("form, flags", [
    ("hf", []),
    ("peft", ["--rank", "2", "--adapter-scale", "0.5"]),
    ("gguf-lora", ["--round", "1"]),
    ("gguf", ["--quantization", "q8_0"]),
])  # fmt: skip
def test_the_command_writes_a_round_with_its_card(form, flags, copy, tmp_path, quick, capsys):
    assert main(["export", str(copy), str(tmp_path / "out"), "--format", form, *flags]) == 0
    printed = capsys.readouterr().out
    assert ("round 1 of 2" if "--round" in flags else "round 2 of 2") in printed
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.library_name == {"hf": "transformers", "peft": "peft"}.get(form, "gguf")
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert all(f"{path}: " in printed for path in files.values())
    if form == "peft":
        (sent,) = [
            line for line in printed.splitlines() if line.startswith("The adapter is cut to rank 2, which loses")
        ]
        assert sent in card.text.replace("\\", "") and "multiplied by 0.5" in card.text
        assert {min(v.shape) for v in load_file(files["adapter_model.safetensors"]).values()} == {2}
    elif form == "hf":
        assert load(str(tmp_path / "out")).name and "this change" not in card.text
    else:
        assert "llama-server -m" in card.text and sum(name.endswith(".gguf") for name in files) == 1
    assert violations(copy) == []
    assert main(["export", str(copy), str(tmp_path / "out")]) == 2
    assert "it exists already; give a new one" in capsys.readouterr().err


def test_a_broken_round_and_a_damaged_one_are_not_exported(copy, tmp_path, capsys):
    assert main(["export", str(copy), str(tmp_path / "out"), "--round", "8"]) == 2
    assert "round 8 does not exist; the run has rounds 1 to 2" in capsys.readouterr().err
    (copy / "ckpt/r1/adapter_model.safetensors").write_bytes(b"")
    assert main(["export", str(copy), str(tmp_path / "out")]) == 2
    assert "is damaged" in capsys.readouterr().err
    rewritten(copy, lambda events: events[0]["config"]["adapter"].update(kind="bias"))
    assert main(["export", str(copy), str(tmp_path / "out"), "--format", "peft", "--rank", "2"]) == 2
    assert "format is 'peft'" in capsys.readouterr().err and not (tmp_path / "out").exists()


# --- the round that commands take --------------------------------------------------------------------------------
@pytest.mark.parametrize("command", ["export", "push", "chat", "eval", "tasks"])
def test_every_command_takes_the_best_round_and_a_broken_one_only_if_it_is_allowed(
    command, tmp_path, monkeypatch, capsys
):
    """Round 2 of the run is broken. Every command ends at a file that is missing, after it has named its round."""
    monkeypatch.setattr(tasks_command, "find_spec", lambda name: True)
    monkeypatch.setattr(tasks, "task_manager", lambda names, include_path: None)
    run = write_run(tmp_path / "run", with_metrics(run_events(2), {"degenerate_frac": 0.9}, ["healed"], 1))
    flags = {"export": [str(tmp_path / "new")], "push": ["me/mine"], "tasks": ["--tasks", "t"]}.get(command, [])
    given = [command, "--run", str(run)] if command == "eval" else [command, str(run)]
    for more, told in (
        ([], "round 1 of 2 (GOOD, the best)"),
        (["--round", "1"], "round 1 of 2 (GOOD, the best)"),
        (["--round", "last"], "error: round 2 is BROKEN: "),
        (["--round", "2"], "take round 1; --allow-broken takes round 2 all the same"),
        (["--round", "last", "--allow-broken"], "round 2 of 2 (BROKEN)"),
    ):
        assert main([*given, *flags, *more]) == 2
        assert told in "".join(capsys.readouterr()), more


def test_what_the_events_tell_is_refused_without_torch(tmp_path):
    write_run(tmp_path / "run", run_events(2))
    write_run(tmp_path / "begun", run_events(2)[:1])
    (tmp_path / "file").touch()
    (tmp_path / "ckpt").mkdir()
    commands = {
        "export run new --round 9": "round 9 does not exist; the run has rounds 1 to 2",
        "export run new --round 0": "--round is '0': give best, last or a number from 1",
        "export run file": "DIR is 'file': it exists already; give a new one",
        "export run file/new": "DIR is 'file/new': this folder cannot be created (",
        "export run new --quantization q8_0": "quantization is 'q8_0': format 'hf' has none",
        "export run new --format gguf-lora --quantization f16": "quantization is 'f16': format 'gguf-lora' has none",
        "export run new --format gguf --rank 2": "rank is 2: format 'gguf' has none",
        "push run mine": "OWNER/NAME is 'mine'",
        "push run me/mine --round 9": "round 9 does not exist",
        "push ckpt me/mine --allow-broken": "--allow-broken has no effect",
        "chat run --states base heeled": "unknown state 'heeled'; did you mean 'healed'?",
        "chat run --port 8000": "port is 8000: only --web has a port",
        "chat run --round 9": "round 9 does not exist",
        "chat begun": "the run has no healed round",
        "inspect run --all-rounds --round 2": "--round and --allow-broken have no effect",
    }
    code = """
import sys
from steer_heal.__main__ import main
for command in sys.argv[1:]:
    assert main(command.split()) == 2, command
    assert "torch" not in sys.modules, command
"""
    env = os.environ | {"BEARTYPE": "0"}
    argv = [sys.executable, "-c", code, *commands]
    done = subprocess.run(argv, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(told) == len(commands) and done.stdout == "", done.stderr
    assert all(want in line for want, line in zip(commands.values(), told, strict=True)), told


# --- the page that shows all this --------------------------------------------------------------------------------
PAGE = (ROOT / "docs/serve.md").read_text(encoding="utf-8")


def test_the_commands_and_the_code_of_the_page_run(settings, quick, tmp_path, monkeypatch, capsys):
    """On a run of rank 32."""
    run = started(tmp_path / "out", settings, "--n-rounds", "1", "--no-control", "--adapter.rank", "32")
    monkeypatch.chdir(tmp_path)
    commands = re.findall(r"^steer-heal (export out/<run> [^#\n]+)", PAGE, re.MULTILINE)
    assert len(commands) > 5
    for command in commands:
        assert main(command.replace("out/<run>", str(run)).split()) == 0, capsys.readouterr().err
    for name in re.findall(r"my_\w+/[\w.-]+gguf", PAGE):
        assert (tmp_path / name).is_file()
    assert {child.name for child in tmp_path.iterdir()} == {"out", *re.findall(r"\bmy_\w+\b", PAGE)}
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "Tokenizer" in code]
    exec(code, {})
    shutil.rmtree("my_adapter")
    export(student_of("data/toylm"), tmp_path / "my_adapter", "peft")
    (code,) = [code for code in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "peft" in code]
    exec(code, found := {})
    assert found["model"].active_adapter == "default"
    parse(["toy", "--model", "my_model"])


# --- llama.cpp ---------------------------------------------------------------------------------------------------
@contextmanager
def served(*flags):
    """The address of llama-server, on one thread, with a cache in float32."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    how = ["--host", "127.0.0.1", "--port", str(port), "-c", "256", "-t", "1", "-ctk", "f32", "-ctv", "f32"]
    server = subprocess.Popen([SERVER, *flags, *how], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(600):
            assert server.poll() is None, "llama-server refused the file"
            try:
                urllib.request.urlopen(f"{address}/health", timeout=5).close()
                break
            except OSError:
                time.sleep(0.2)
        yield address
    finally:
        server.terminate()
        server.wait()


def asked(address, path, **body):
    request = urllib.request.Request(
        f"{address}/{path}", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        return json.load(answer)


def next_token(address, ids, n, written):
    """Log-probabilities of the next token, [v]. They are read before the bias, which writes the token `written`: the
    server tells none of a token that ends the text or is half of a character."""
    how = {"n_predict": 1, "n_probs": n, "logit_bias": [[written, 1000.0]], "cache_prompt": False}
    (read,) = asked(address, "completion", prompt=list(ids), **how)["completion_probabilities"]
    found = torch.full((n,), float("nan"))
    for each in read["top_logprobs"]:
        found[each["id"]] = each["logprob"]
    return torch.log_softmax(found, -1)  # the server's own sum is rounded


def apart(student, address, rows):
    """(KL(student || llama.cpp) in nats, largest difference of a log-probability above -12), over the rows."""
    kl, largest = -1.0, 0.0
    for ids in rows:
        with student.using("full") as lm, torch.no_grad():
            want = torch.log_softmax(lm.model(torch.tensor([ids])).logits[0, -1].float(), -1)
        got = next_token(address, ids, len(want), student.lm.encode("a")[0])
        kl = max(kl, (want.exp() * (want - got)).sum().item())
        largest = max(largest, (want - got)[want > -12].abs().max().item())
    return kl, largest


@pytest.mark.skipif(SERVER is None, reason="llama-server of llama.cpp is not on the PATH (or in LLAMA_SERVER)")
@pytest.mark.parametrize("model", ["toy", *ROPES, "smol"])
def test_llama_cpp_reads_the_same_student(model, tmp_path, request):
    if model in ROPES:
        name = folder_of(tmp_path / "model", model)
    else:
        name = str(DATA / "toylm") if model == "toy" else request.getfixturevalue("smol").name
    student = student_of(name, size=0.03 if model == "smol" else 0.1)
    text = "Who opens door 12? It's the warden's;  I'll wait.\n\nNo 345!"
    rows = [student.lm.chat(text, "Be kind."), student.lm.chat("What now?"), student.lm.encode(text)]
    export(student, tmp_path / "base", "gguf", adapter_scale=0.0)
    export(student, tmp_path / "lora", "gguf-lora")
    export(student, tmp_path / "full", "gguf")
    export(student, tmp_path / "small", "gguf", quantization="q8_0")
    assert (healed(student) - logits(student.lm)).abs().max() > 2, "the rounds matter"
    ways = {
        "base": (["-m", "base/model-f16.gguf"], 1e-4),
        "adapter": (["-m", "base/model-f16.gguf", "--lora", "lora/adapter.gguf"], 1e-4),
        "merged": (["-m", "full/model-f16.gguf"], 1e-4),
        "8 bits": (["-m", "small/model-q8_0.gguf"], 0.05),
    }
    for way, (flags, most) in ways.items():
        files = [flag if flag.startswith("-") else str(tmp_path / flag) for flag in flags]
        with served(*files) as address:
            with student.scaled(0.0 if way == "base" else 1.0):
                kl, largest = apart(student, address, rows)
            print(f"{model}, {way}: KL {kl:.2g} nats, log-probabilities at most {largest:.2g} apart")
            assert kl < most, way
            for ids in rows:
                written = student.lm.decode(ids, special=True)
                tokens = asked(address, "tokenize", content=written, add_special=False, parse_special=True)["tokens"]
                assert tokens == list(ids)
            messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": text}]
            prompt = asked(address, "apply-template", messages=messages)["prompt"]
            assert prompt == student.lm.decode(rows[0], special=True)
