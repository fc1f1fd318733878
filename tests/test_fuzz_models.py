"""Any model folder, chat template or adapter either works or ends in one clear error, without its code being run.

A short and always equal run by default; `just fuzz 20000` tries that many random examples over all properties.
"""

import json
import shutil
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from conftest import scramble
from damage import ODD, changed, damaged
from hypothesis import given
from hypothesis import strategies as st
from test_fuzz import examples, folder

from steer_heal.errors import UserError
from steer_heal.model.decode import Decoding, Row, decode
from steer_heal.model.lm import LM, load
from steer_heal.model.student import Student, attach_saved
from steer_heal.settings import TINY_RANDOM, AdapterCfg

JSON_FILES = ("config.json", "generation_config.json", "tokenizer_config.json", "tokenizer.json")
SECONDS_AT_MOST = 20.0
PIECES = (
    *("{% for m in messages %}", "{% endfor %}", "{{ m.role }}", "{{ m.content }}", "{{ m['content'] }}", "<|im_end|>"),
    *("<|im_start|>", "\n", "{% if add_generation_prompt %}", "{% endif %}", "assistant", "<think>\n", "</think>"),
    *("{{ messages[0].content }}", "{{ bos_token }}", "{{ 1 / 0 }}", "{{ m.content[0].text }}", "{{ nothing.at.all }}"),
    *("{{ raise_exception('no') }}", "{{ strftime_now('%d') }}", "{{ strftime_now(x) }}", "{% generation %}"),
    *("{{ 'a' * 100000 }}", "{{ range(10**9)|list }}", "{{ m.content|upper }}", "{{ m.content|trim }}", " ", "</s>"),
)
GOOD = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def whole() -> LM:
    return load(TINY_RANDOM)


@pytest.fixture(scope="module")
def original(whole: LM, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    whole.model.save_pretrained(path)
    whole.tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter(whole: LM, tmp_path_factory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("adapter")
    student = Student(whole, AdapterCfg(rank=2, alpha=4.0))
    student.new_round(1)
    scramble(student, 1)
    student.save(path, student.bake())
    student.detach()
    yield path


def works_or_is_refused(path: Path) -> None:
    """Loads, reads and writes two tokens; or one UserError that names the folder or what is wrong in it."""
    began = time.monotonic()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            lm = load(str(path))
            ids = lm.chat("What is ice?", "Be kind.")
            assert lm.logits(lm.hidden([ids])[0]).isfinite().all()
            (written,) = decode(lm, [Row(ids, seed=1)], None, Decoding(2, 1))
            assert 1 <= len(written) <= 2 and "What is ice?" in lm.decode(ids)
        except UserError as error:
            assert str(error).strip() and not isinstance(error.__cause__, AssertionError)
    assert time.monotonic() - began < SECONDS_AT_MOST


@examples(12, 0.05, shrink=False)
@given(st.data(), st.sampled_from(JSON_FILES))
def test_a_model_folder_with_odd_settings_works_or_is_refused(original, data, name):
    with folder() as here:
        shutil.copytree(original, here, dirs_exist_ok=True)
        table = json.loads((here / name).read_text())
        (here / name).write_text(json.dumps(data.draw(changed(table, 3))))
        works_or_is_refused(here)


@examples(6, 0.02, shrink=False)
@given(st.data(), st.sampled_from((*JSON_FILES, "model.safetensors")))
def test_a_model_folder_with_damaged_files_works_or_is_refused(original, data, name):
    with folder() as here:
        shutil.copytree(original, here, dirs_exist_ok=True)
        (here / name).write_bytes(data.draw(damaged((here / name).read_bytes())))
        works_or_is_refused(here)


@examples(12, 0.04, shrink=False)
@given(st.one_of(damaged(GOOD.encode()), st.lists(st.sampled_from(PIECES), max_size=12).map("".join).map(str.encode)))
def test_a_chat_template_works_or_is_refused(original, source):
    with folder() as here:
        shutil.copytree(original, here, dirs_exist_ok=True)
        (here / "chat_template.jinja").write_bytes(source)
        works_or_is_refused(here)


@examples(12, 0.03, shrink=False)
@given(st.data(), st.sampled_from(["settings", "weights"]), ODD)
def test_an_adapter_acts_as_saved_or_is_refused(whole, adapter, data, part, odd):
    before = {name: value.clone() for name, value in whole.model.state_dict().items()}
    with folder() as here, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        shutil.copytree(adapter, here, dirs_exist_ok=True)
        if part == "settings":
            table = json.loads((here / "adapter_config.json").read_text())
            fields = ("bias", "use_dora", "modules_to_save", "init_lora_weights", "lora_bias", "r", "target_modules")
            table |= {data.draw(st.sampled_from(fields)): odd} if data.draw(st.booleans()) else {}
            (here / "adapter_config.json").write_text(json.dumps(data.draw(changed(table, 2))))
        else:
            file = here / "adapter_model.safetensors"
            file.write_bytes(data.draw(damaged(file.read_bytes())))
        student = None
        try:
            student = attach_saved(whole, here)
            with student.using("full") as lm:
                assert lm.hidden([lm.chat("What is ice?")]).isfinite().all()
        except UserError as error:
            assert str(error).strip()
        finally:
            if student is not None:
                student.detach()
    after = whole.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
