"""Model cards and uploads: what a card says, that nothing in it can do harm, and that nothing is sent unasked."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import stdev

import pytest
import yaml
from compare import weights
from huggingface_hub import ModelCard
from made_runs import changed, run_events, with_config, with_metrics, with_trait
from peft import AutoPeftModelForCausalLM, PeftConfig, PeftModel
from runs import of, recorded, resumed, rewritten
from test_hostile import HOSTILE, outside_of_fences

from steer_heal.__main__ import main
from steer_heal.commands import inspect as inspect_command
from steer_heal.commands import run as run_command
from steer_heal.commands import tasks as tasks_command
from steer_heal.events import Run, RunStart, Trained, Weights
from steer_heal.inputs.files import DATA
from steer_heal.model.gguf import PACKAGED, SMOL
from steer_heal.model.lm import load
from steer_heal.model.student import Student
from steer_heal.report.view import inline
from steer_heal.runs.log import last_hash
from steer_heal.runs.stored import FolderRun
from steer_heal.runs.verify import violations
from steer_heal.settings import AdapterCfg, HealCfg
from steer_heal.share import tasks
from steer_heal.share.card import card, hub_id, with_base, write_cards
from steer_heal.share.readings import Reading, read_readings

pytestmark = pytest.mark.usefixtures("quick")
DIGEST = "a" * 64
HUB = {"base_model": "owner/base", "hub_id": "owner/base"}


def made(events, r=0, *tasks_read, form=None, **start):
    """The card of a made-up run; `start` are other fields of its first event."""
    return card(Run(changed(events, RunStart, **{**HUB, **start})), r, DIGEST, *tasks_read, form=form)


@pytest.fixture
def copy(one, tmp_path):
    """A finished run of one round with a control and its row of results.tsv, with cards."""
    run = shutil.copytree(one.parent, tmp_path / "out") / one.name
    write_cards(run)
    return run


# --- what a card says --------------------------------------------------------------------------------------------
def test_every_measured_checkpoint_has_a_card_that_the_hub_reads(copy):
    run = FolderRun.read(copy)
    for r, name, column in ((0, "r0", "healed round 1"), (None, "control", "control")):
        read = ModelCard.load(copy / "ckpt" / name / "README.md")
        assert read.data.library_name == "peft" and "steer-heal" in read.data.tags
        assert read.data.base_model is None and read.data.license is None, "tiny-random is not on the hub"
        sha256 = run.require(Trained, r).files[f"ckpt/{name}/adapter_model.safetensors"]
        start = run.start
        facts = [start.weights.sha256, start.settings, last_hash(copy), f"| seed | {start.config.seed} |"]
        assert all(fact in read.text for fact in [column, *facts, sha256])
        assert "\n\nA LoRA adapter of rank 4" in read.text and "not on the published weights" not in read.text


def test_the_readings_are_those_of_the_round_and_its_verdict():
    events = run_events(2)
    first, second, control = (made(events, r) for r in (0, 1, None))
    assert "\u22122.000 (\u22120.600 to \u22120.400)" in first and "\u22122.100 (\u22120.700 to \u22120.500)" in second
    assert "steered round 2" not in first and "-0.500 nats" in first and "-0.600 nats" in second
    assert "healed" not in control and "**GOOD" not in control and "**GOOD" in first
    other = with_metrics(events, {"authority_nats": 9.0}, ["healed"], 1)
    assert made(other, 0) == first, "a later round does not change the card of an earlier one"


def test_a_hub_model_is_named_as_base_and_a_folder_is_not():
    events = run_events(1)
    assert ModelCard(made(events)).data.base_model == "owner/base"
    assert ModelCard(made(events, base_model="/a/folder/of/mine", hub_id=None)).data.base_model is None
    assert [hub_id(name) for name in ("a/b", "a", "a/b/c", "../b", "a b/c", "")] == ["a/b", *[None] * 5]


def test_a_card_names_the_weights_that_the_adapter_was_trained_on():
    """A 4-bit copy of a hub model is not the hub model."""
    events = with_config(run_events(1), model=SMOL)
    note, hub = PACKAGED[SMOL].note, PACKAGED[SMOL].hub_id
    weights = Weights(sha256="0", dtype="float32", note=note)
    text = made(events, base_model=SMOL, hub_id=hub, weights=weights)
    first_lines = "\n".join(text.split("---\n", 2)[2].splitlines()[:8])
    assert f"authority in {SMOL}" in first_lines and "It was trained and measured on 4-bit" in first_lines
    own, published = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert f"load('{SMOL}', dtype='float32')  # {note}" in own
    assert f"from_pretrained('{hub}'" in published and "only approximately" in text
    assert ModelCard(text).data.base_model == hub
    merged = made(events, base_model=SMOL, hub_id=hub, weights=weights, form="hf")
    assert "It was made from 4-bit" in merged
    hostile = made(events, weights=replace(weights, note=f"{HOSTILE}\n```\n# free"))
    assert not [line for line in hostile.splitlines() if line.startswith(("```\n", "# free"))]


def test_an_adapter_that_peft_does_not_know_is_loaded_by_steer_heal(tmp_path, monkeypatch):
    lm = load("data/toylm")
    student = Student(lm, AdapterCfg(kind="bias"))
    folder = saved(lm, tmp_path / "r0", AdapterCfg(kind="bias"))
    files = {f"ckpt/r0/{path.name}": "0" for path in folder.iterdir()}
    events = changed(run_events(1), Trained, 0, files=files)
    facts = {"base_model": lm.base, "hub_id": None, "weights": Weights(sha256="0", dtype="float32")}
    text = made(events, adapter=student.adapter.describe(), **facts)
    assert "\n\nA bias adapter, one vector of width" in text
    assert ModelCard(text).data.library_name == "steer-heal" and "lora" not in ModelCard(text).data.tags
    [code] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(folder)
    found = {}
    exec(code, found)
    assert found["model"].config.model_type == lm.model.config.model_type and found["student"].n_rounds == 1


def test_the_method_is_told_as_the_settings_are():
    events = run_events(1)
    assert "with a penalty if kl\\_rev (rmse)" in made(events)
    events = changed(events, Trained, lam=0.0)
    assert "penalty" not in made(events), "heal.lam is 0, or the divergence is no barrier"
    own = HealCfg(target="distribution", text="own", teacher="prompt+vector", divergence="none")
    text = made(with_config(events, heal=own))
    assert "next-token distribution along its own plain text." in text and "penalty" not in text
    text = made(with_config(events, heal=replace(own, rehearsal=8)))
    assert "its own plain text, and on the base model's distribution along texts" in text
    text = made(with_config(events, heal=replace(own, hold=0.5)))
    assert "its own plain text (50% of it written under prompts that oppose the trait)." in text


def test_the_card_of_the_best_round_names_no_other_as_best():
    assert "best round" not in made(run_events(2), 1)


def test_the_card_names_the_class_that_loads_the_model():
    events = run_events(1)
    for form in ("hf", None):
        for name in ("AutoModelForCausalLM", "AutoModelForImageTextToText"):
            text = made(events, form=form, base_model="owner/base", hub_id="owner/base", loaded_with=name)
            assert f"from transformers import {name}, AutoTokenizer" in text and f" {name}.from_pretrained(" in text


def test_hostile_text_stays_text():
    events = run_events(1)
    wanted = made(events)
    hostile = with_trait(events, **dict.fromkeys(("name", "description", "positive", "negative"), HOSTILE))
    facts = dict.fromkeys(("preset", "git_commit", "base_model", "adapter", "device", "settings"), HOSTILE)
    text = made(with_config(hostile, model=HOSTILE.replace("\ud800 \udfff", "")), hub_id=HOSTILE, **facts)
    _, front, body = text.split("---\n", 2)
    assert yaml.safe_load(front) | {"base_model": "owner/base"} == yaml.safe_load(wanted.split("---\n")[1])
    outside = outside_of_fences(body)
    assert len([line for line in outside if line.startswith("#")]) == 7
    assert not any(re.search(r"(?<!\\)[<\[]", line) for line in outside)
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202e]", text)


def test_what_the_card_says_of_loading_works(tmp_path, monkeypatch, toy):
    """From another folder, of the bundled model, and of a model that lies in a folder of its own."""
    events = run_events(1)
    facts = {"base_model": toy.base, "hub_id": None}
    code = re.findall(r"```python\n(.*?)```", made(events, **facts), re.DOTALL)[0]
    checkpoint = saved(load("data/toylm"), tmp_path / "r0")
    monkeypatch.chdir(checkpoint)
    found = {}
    exec(code, found)
    assert isinstance(found["model"], PeftModel) and found["tokenizer"].chat_template
    as_export = re.findall(r"```python\n(.*?)```", made(events, form="hf", **facts), re.DOTALL)[0]
    Student(toy, AdapterCfg()).export(tmp_path / "merged")
    monkeypatch.chdir(tmp_path / "merged")
    exec(as_export, found)
    assert found["model"].config.model_type == toy.model.config.model_type


def saved(lm, folder, cfg=AdapterCfg(rank=2, alpha=4.0)):  # noqa: B008 - frozen
    student = Student(lm, cfg)
    student.new_round(0)
    own = student.bake()
    student.save(folder, own)
    return folder


def test_peft_finds_the_base_of_a_checkpoint_from_any_folder(tmp_path, monkeypatch):
    checkpoint = saved(load("data/toylm"), tmp_path / "bundled")
    monkeypatch.chdir(tmp_path)
    assert AutoPeftModelForCausalLM.from_pretrained(checkpoint).active_adapter == "default"
    load("data/toylm").model.save_pretrained(tmp_path / "mine")
    load("data/toylm").tokenizer.save_pretrained(tmp_path / "mine")
    relative = saved(load("mine"), tmp_path / "relative")
    assert PeftConfig.from_pretrained(relative).base_model_name_or_path == str(tmp_path / "mine")
    monkeypatch.chdir(checkpoint)
    assert AutoPeftModelForCausalLM.from_pretrained(relative).active_adapter == "default"


# --- cards beside the run's own record ---------------------------------------------------------------------------
def test_a_card_is_no_part_of_the_record(copy, capsys):
    assert violations(copy) == []
    before = weights(copy)
    (copy / "ckpt/r0/README.md").write_text("mine")
    assert violations(copy) == [] and weights(copy) == before
    assert main(["report", str(copy)]) == 0
    assert last_hash(copy) in (copy / "ckpt/r0/README.md").read_text(), "report writes the cards again"
    resumed(copy)
    assert violations(copy) == []


def test_a_run_writes_its_cards_as_it_goes(after_round_0, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        run_command, "draw", lambda folder: drawn.append([path.parent.name for path in write_cards(folder)])
    )
    resumed(after_round_0)
    assert drawn == [["r0", "r1"]], "once, at the end of the last round"
    assert not list(after_round_0.rglob(".*.part"))


def test_a_checkpoint_that_is_gone_and_a_round_that_is_not_measured_get_no_card(copy):
    shutil.rmtree(copy / "ckpt/control")
    assert [path.parent.name for path in write_cards(copy)] == ["r0"]
    rewritten(copy, lambda events: events.remove(of(events, "measured", "healed")[0]))
    assert write_cards(copy) == [] and not (copy / "ckpt/control").exists()


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_mode_that_the_umask_gives(mask, tmp_path, tiny):
    from steer_heal.runs.storage import atomic_folder

    before = os.umask(mask)
    try:
        with atomic_folder(tmp_path / "r0") as part:
            saved(tiny, part)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "r0").iterdir() if path.is_file()}
    assert set(modes.values()) == {0o666 & ~mask} and "adapter_model.safetensors" in modes


# --- push --------------------------------------------------------------------------------------------------------
class Hub:
    """Stands for HfApi: what it was asked to do."""

    def __init__(self, calls, error=None):
        self.calls, self.error = calls, error

    def create_repo(self, repo_id, **how):
        self.calls.append(("create", repo_id, how))

    def create_commit(self, repo_id, files, *, commit_message):
        if self.error:
            raise self.error
        self.calls.append((repo_id, {file.path_in_repo: content(file.path_or_fileobj) for file in files}))
        return f"the page of {repo_id}"


def content(source):
    return source if isinstance(source, bytes) else Path(source).read_bytes()


@pytest.fixture
def hub(monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(calls))
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "a token")
    return calls


def test_without_yes_nothing_is_sent(copy, hub, capsys):
    assert main(["push", str(copy), "me/mine"]) == 0
    printed = capsys.readouterr().out
    assert hub == [] and "nothing was sent" in printed
    names = sorted(path.name for path in (copy / "ckpt/r0").iterdir())
    assert [line for line in printed.splitlines() if "->" in line] == [
        f"{copy / 'ckpt/r0' / name} -> me/mine/{name}" for name in names
    ]


def test_what_is_printed_is_what_is_sent(copy, hub, capsys):
    folder = copy / "ckpt/r0"
    (folder / ".hidden").write_text("")
    (folder / "*").write_text("a pattern")
    (folder / "sub").mkdir()
    (folder / "sub" / "inner.txt").write_text("")
    assert main(["push", str(copy / "ckpt/r0"), "me/mine", "--private", "--yes"]) == 0
    (_, repo_id, how), (sent_to, sent) = hub
    assert (repo_id, how) == ("me/mine", {"private": True, "exist_ok": True}) and sent_to == "me/mine"
    printed = [line.rpartition("/")[2] for line in capsys.readouterr().out.splitlines() if "->" in line]
    assert list(sent) == printed and "*" in sent and not {".hidden", "sub", "inner.txt"} & {*sent}
    assert all(sent[name] == (folder / name).read_bytes() for name in printed)


@pytest.mark.parametrize("spoil, flags, told", [
    (lambda run: None, ["mine"], "OWNER/NAME is 'mine'"),
    (lambda run: None, ["me/mine/too"], "OWNER/NAME is 'me/mine/too'"),
    (lambda run: None, ["me/mine", "--round", "8"], "round 8 does not exist"),
    (lambda run: (run / "ckpt/r0/README.md").unlink(), ["me/mine"], "has no model card"),
    (lambda run: (run / "ckpt/r0/adapter_model.safetensors").unlink(), ["me/mine"], "safetensors is missing"),
    (lambda run: shutil.rmtree(run / "ckpt"), ["me/mine"], "is missing; restore the file"),
    (lambda run: (run / "ckpt/r0/more").symlink_to("/etc/hostname"), ["me/mine"], "ckpt/r0/more is a link"),
    (lambda run: None, ["me/mine", "--base-model", "me/base"], "names no base on this machine"),
])  # fmt: skip
def test_what_cannot_be_shared_is_refused_before_anything_is_sent(spoil, flags, told, copy, hub, capsys):
    spoil(copy)
    assert main(["push", str(copy), *flags, "--yes"]) == 2
    printed = capsys.readouterr()
    assert told in printed.err and printed.err.count("\n") == 1 and hub == []


@pytest.mark.parametrize("place", ["in its run", "copied"])
def test_damaged_weights_are_not_sent(place, copy, hub, tmp_path, capsys):
    folder = copy / "ckpt/r0"
    path = folder / "adapter_model.safetensors"
    whole = path.read_bytes()
    if place == "copied":
        folder = shutil.copytree(folder, tmp_path / "elsewhere")
        path = folder / "adapter_model.safetensors"
        path.write_bytes(whole[:-5])
    else:
        path.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert main(["push", str(folder), "me/mine", "--yes"]) == 2 and hub == []
    assert f"{path} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize("note", ["", "weights of toylm with the adapter r0 added"])
@pytest.mark.parametrize("merged", [False, True])
def test_a_base_on_this_machine_needs_an_id_and_no_path_is_sent(merged, note, hub, tmp_path, capsys):
    base = shutil.copytree(DATA / "toylm", tmp_path / "my_own [base]")
    lm = load(str(base))
    student = Student(lm, AdapterCfg(rank=2, alpha=4.0, layers=(0.0, 1.0)))
    folder = tmp_path / "shared"
    folder.mkdir()
    if merged:
        student.export(folder)
    else:
        saved(lm, folder, student.cfg)
    events = with_config(run_events(1), model=str(base))
    weights = Weights(sha256="0", dtype="float32", note=note)
    (folder / "README.md").write_text(
        made(events, form="hf" if merged else None, base_model=lm.base, hub_id=None, weights=weights)
    )
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert main(["push", str(folder), "me/mine", "--yes"]) == 2 and hub == []
    assert f"{str(base)!r}" in capsys.readouterr().err
    assert main(["push", str(folder), "me/mine", "--yes", "--base-model", "me/base"]) == 0, capsys.readouterr().err
    sent = hub[-1][1]
    assert {*sent} == {*before} and before == {path.name: path.read_bytes() for path in folder.iterdir()}
    assert not [name for name, data in sent.items() if b"my_own" in data or b"my\\_own" in data]
    card = ModelCard(sent["README.md"].decode())
    assert card.data.base_model == "me/base" and f"| base weights | me/base{note and f', {note}'}, float32" in card.text
    if not merged:
        assert json.loads(sent["adapter_config.json"])["base_model_name_or_path"] == "me/base"
        assert "load('me/base', dtype='float32')" in card.text


def test_an_adapter_of_a_model_of_steer_heal_names_its_id_on_the_hub_where_it_is_sent(copy, hub, capsys):
    folder = copy / "ckpt/r0"
    path = folder / "adapter_config.json"
    path.write_text(path.read_text().replace("tiny-random", SMOL))
    shutil.move(folder, copy.parent / "adapter")  # no longer a checkpoint of the run
    assert main(["push", str(copy.parent / "adapter"), "me/mine", "--yes"]) == 0, capsys.readouterr().err
    assert json.loads(hub[-1][1]["adapter_config.json"])["base_model_name_or_path"] == PACKAGED[SMOL].hub_id


@pytest.mark.parametrize("base, hub_name", [("base", "me/tiny-base"), ("Qwen2.5", "Qwen/Qwen2.5")])
def test_a_bare_name_of_a_folder_is_replaced_once_where_the_card_names_the_base(base, hub_name):
    text = made(with_config(run_events(1), model=base), base_model="/home/me/base", hub_id=None)
    card = with_base(text, ["/home/me/base", base], hub_name)
    for place in (f" in {inline(hub_name)}\n", f"load('{hub_name}', ", f"| base weights | {inline(hub_name)}, "):
        assert card.count(place) == text.count(place.replace(inline(hub_name), base).replace(hub_name, base)) > 0
    assert card.count(hub_name.split("/")[0] + "/") == card.count(hub_name) and "base model" in card


def test_every_chat_template_is_sent(copy, hub, capsys):
    place = copy / "ckpt/r0/additional_chat_templates"
    place.mkdir()
    (place / "rag.jinja").write_text("{{ messages }}")
    assert main(["push", str(copy), "me/mine", "--round", "1", "--yes"]) == 0, capsys.readouterr().err
    assert "additional_chat_templates/rag.jinja" in hub[-1][1]


def test_no_token_and_a_hub_that_refuses_are_one_line(copy, hub, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.HfApi", lambda: Hub(hub, OSError("403 Forbidden")))
    assert main(["push", str(copy), "me/mine", "--yes"]) == 2
    assert capsys.readouterr().err == "error: me/mine was not uploaded: 403 Forbidden\n"
    hub.clear()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert main(["push", str(copy), "me/mine", "--yes"]) == 2
    assert "no token" in capsys.readouterr().err and hub == []
    assert main(["push", str(copy), "me/mine"]) == 0, "to look needs no token"


# --- standard tasks ----------------------------------------------------------------------------------------------
QUESTIONS = [("The door is open. It is", [" open", " lamp"], 0), ("She gave bread. He got", [" rain", " bread"], 1)] * 4
TASK = """
task: doors
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


@pytest.fixture
def own_tasks(tmp_path, monkeypatch):
    """A folder with one task that needs no network."""
    datasets = pytest.importorskip("datasets", reason="pip install 'steer-heal[tasks]'")
    pytest.importorskip("lm_eval", reason="pip install 'steer-heal[tasks]'")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [json.dumps({"question": q, "choices": c, "answer": a}) + "\n" for q, c, a in QUESTIONS]
    (folder / "doors.jsonl").write_text("".join(rows))
    (folder / "doors.yaml").write_text(TASK.replace("FILE", str(folder / "doors.jsonl")))
    return folder


def test_tasks_read_base_and_healed_and_the_card_shows_them(copy, own_tasks, capsys):
    flags = [str(copy), "--tasks", "doors", "--include-path", str(own_tasks)]
    assert main(["tasks", *flags, "--json"]) == 0
    [reading] = json.loads(capsys.readouterr().out)
    assert (reading["task"], reading["metric"], reading["n"]) == ("doors", "acc", len(QUESTIONS))
    assert 0 <= reading["base"] <= 1 and 0 <= reading["healed"] <= 1 and reading["change_stderr"] is not None
    assert [r.task for r in read_readings(copy)["ckpt/r0"]] == ["doors"]
    assert "| doors | acc | 8 |" in (copy / "ckpt/r0/README.md").read_text()
    assert "doors" not in (copy / "ckpt/control/README.md").read_text() and violations(copy) == []
    assert main(["tasks", *flags, "--device", "nowhere"]) == 2 and "nowhere" in capsys.readouterr().err
    assert main(["tasks", *flags, "--limit", "3"]) == 0
    assert "cost of the trait" in capsys.readouterr().out and [r.n for r in read_readings(copy)["ckpt/r0"]] == [3]


@pytest.fixture
def stubbed(monkeypatch):
    """In place of lm-evaluation-harness: the results of base and healed in turn."""
    calls = []
    monkeypatch.setattr(tasks_command, "find_spec", lambda name: True)
    monkeypatch.setattr(tasks, "task_manager", lambda names, include_path: None)

    def evaluate(lm, names, manager, **_):
        calls.append(result([1.0, float(len(calls) % 2 == 0)]))
        return calls[-1]

    monkeypatch.setattr(tasks, "evaluate", evaluate)
    return calls


def test_the_card_of_a_later_export_shows_the_tasks_too(copy, stubbed, tmp_path):
    """The round is the best one unless another is asked for."""
    assert main(["tasks", str(copy), "--tasks", "t"]) == 0 and len(stubbed) == 2
    assert main(["export", str(copy), str(tmp_path / "export")]) == 0
    row = "| t | acc | 2 | 1.0000 ± 0.1000 | 0.5000 ± 0.1000 |"
    for card_of in (tmp_path / "export", copy / "ckpt/r0"):
        assert row in (card_of / "README.md").read_text(encoding="utf-8")


def test_a_bad_device_is_named(copy, stubbed, capsys):
    assert main(["tasks", str(copy), "--tasks", "t", "--device", "nowhere"]) == 2 and stubbed == []
    assert "nowhere" in capsys.readouterr().err


def test_an_unknown_task_is_named_before_a_model_is_read(copy, own_tasks, capsys, monkeypatch):
    monkeypatch.setattr("steer_heal.bench.read_model", lambda cfg: pytest.fail("a model was read"))
    assert main(["tasks", str(copy), "--tasks", "door", "--include-path", str(own_tasks)]) == 2
    assert "did you mean 'doors'?" in capsys.readouterr().err


def test_without_their_packages_the_commands_say_what_to_install(copy, capsys, monkeypatch):
    for module, flags in ((tasks_command, ["tasks", "--tasks", "doors"]), (inspect_command, ["inspect"])):
        monkeypatch.setattr(module, "find_spec", lambda name: None)
        assert main([flags[0], str(copy), *flags[1:]]) == 2
        assert "pip install 'steer-heal[" in capsys.readouterr().err


def result(values, *, higher=True):
    """As lm-evaluation-harness returns it: one task, accuracy and a metric without items of its own."""
    n, mean = len(values), sum(values) / len(values)
    rows = [{"doc_id": i, "filter": "none", "acc": value} for i, value in enumerate(values)]
    numbers = {"alias": "t", "acc,none": mean, "acc_stderr,none": 0.1, "word_perplexity,none": 2.0 + mean}
    numbers["word_perplexity_stderr,none"] = "N/A"
    which = {"t": {"acc": higher, "word_perplexity": not higher}}
    return {
        "results": {"t": numbers},
        "samples": {"t": rows},
        "n-samples": {"t": {"effective": n}},
        "higher_is_better": which,
    }


def test_the_cost_is_what_is_worse_and_its_error_is_paired_by_item():
    base, healed = [1.0, 1.0, 0.0, 1.0], [1.0, 0.0, 0.0, 1.0]
    accuracy, perplexity = tasks.compare(result(base), result(healed))
    assert accuracy.change == pytest.approx(-0.25) and accuracy.cost == pytest.approx(0.25)
    assert accuracy.change_stderr == pytest.approx(stdev([0.0, -1.0, 0.0, 0.0]) / 2)
    assert perplexity.change == pytest.approx(-0.25) and perplexity.cost == pytest.approx(-0.25)
    assert perplexity.base_stderr is None and perplexity.change_stderr is None
    assert tasks.compare(result(base), result(base))[0].change_stderr == 0


def test_hostile_readings_stay_in_their_table():
    reading = Reading(
        task=HOSTILE, metric=HOSTILE, n=1, base=1.0, base_stderr=None, healed=1.0, healed_stderr=None,
        change_stderr=None, higher_is_better=None,
    )  # fmt: skip
    text = made(run_events(1), 0, [reading])
    harmless = made(run_events(1), 0, [replace(reading, task="t", metric="m")])
    assert len(text.splitlines()) == len(harmless.splitlines())
    [row] = tasks_command.table([reading])
    assert reading.cost is None and row["cost of the trait"] == "unknown"


# --- inspect_ai --------------------------------------------------------------------------------------------------
def is_number(value) -> bool:
    """JSON spells numbers that are not finite as strings."""
    return isinstance(value, float)


@pytest.mark.parametrize("name", [None, "log.json"])
def test_the_log_is_one_that_inspect_ai_reads(copy, tmp_path, name, capsys):
    log_module = pytest.importorskip("inspect_ai.log", reason="pip install 'steer-heal[inspect]'")
    out = [] if name is None else ["--out", str(tmp_path / name)]
    assert main(["inspect", str(copy), *out]) == 0
    log = log_module.read_eval_log(str(copy / "inspect.eval" if name is None else tmp_path / name))
    events = recorded(copy)
    scenes = events[0]["wording"]["vignette"]
    states = ["base", "prompted", "control", "steered round 1", "healed round 1"]
    assert log.status == "success" and [score.name for score in log.results.scores] == states
    for name, state in (("base", "base"), ("healed", "healed round 1")):
        event = of(events, "measured", name)[0]
        known = {k: v for k, v in event["metrics"].items() if is_number(v) and not k.endswith(("_lo", "_hi"))}
        assert {k: m.value for k, m in log.results.scores[states.index(state)].metrics.items()} == known
        mine = {s.id: s for s in log.samples if s.id.startswith(f"{state}, ")}
        for i, row in enumerate(event["texts"]):
            sample = mine[f"{state}, text {i}"]
            assert (sample.input, sample.output.completion) == (row["prompt"], row["text"])
            assert sample.scores["degenerate"].value == event["items"]["degenerate"][i]
        for i, mass in enumerate(event["items"]["mass"]):
            if is_number(mass):
                assert mine[f"{state}, vignette {i}"].scores["mass"].value == mass
                assert [mine[f"{state}, vignette {i}"].input, mine[f"{state}, vignette {i}"].target] == scenes[i]
        prompt, positive, negative = events[0]["wording"]["pair"][0]
        pair = mine[f"{state}, pair 0"]
        assert (pair.input, pair.target, pair.metadata["negative"]) == (prompt, positive, negative)


def test_a_log_says_what_the_run_saw_whatever_became_of_its_files(copy, capsys):
    log_module = pytest.importorskip("inspect_ai.log", reason="pip install 'steer-heal[inspect]'")

    def other(events):
        events[0]["config"].update(trait="gone.toml")
        events[0]["config"]["eval"].update(vignettes="gone.jsonl")
        events[0]["wording"]["vignette"] = [["A scene of then.", "care"]]

    rewritten(copy, other)
    assert main(["inspect", str(copy)]) == 0, capsys.readouterr().err
    found = {sample.id: sample for sample in log_module.read_eval_log(str(copy / "inspect.eval")).samples}
    assert (found["base, vignette 0"].input, found["base, vignette 0"].target) == ("A scene of then.", "care")
    assert found["base, vignette 1"].input == "vignette 2"


def test_a_log_of_another_kind_is_refused(copy, tmp_path, capsys):
    pytest.importorskip("inspect_ai", reason="pip install 'steer-heal[inspect]'")
    assert main(["inspect", str(copy), "--out", str(tmp_path / "log.txt")]) == 2
    assert "must end in .eval or .json" in capsys.readouterr().err
