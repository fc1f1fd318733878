"""The examples of README and docs/library.md, and the notebook, run as they stand there."""

import ast
import json
import re
import sys
import warnings
from dataclasses import dataclass, replace
from types import ModuleType

import matplotlib
import pytest
from places import ROOT

from steer_heal.presets import PRESETS, TOY_PRESET
from steer_heal.settings import changed

EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)
NOTEBOOK = json.loads((ROOT / "docs" / "quickstart.ipynb").read_text(encoding="utf-8"))
SMALL = {
    "steer.n_contexts": 4,
    "gen.max_new_tokens": 8,
    "dose.n_kappas": 2,
    "dose.n_probes": 4,
    "filter.gates": ("perplexity",),
    "filter.ppl_max": 1e9,
    "filter.n_keep": 8,
    "filter.min_train": 2,
    "filter.max_attempts": 16,
    "eval.n_vignettes": 4,
    "eval.n_prompts": 4,
    "eval.max_new_tokens": 8,
    "eval.n_bootstrap": 10,
}


@pytest.fixture(autouse=True)
def small(monkeypatch, tmp_path):
    """The preset of the examples, small; an empty folder to work in."""
    quick = changed(replace(TOY_PRESET, control=False), SMALL)
    monkeypatch.setitem(PRESETS, "toy", ("", quick))
    monkeypatch.chdir(tmp_path)


def examples(path) -> list[str]:
    return [code for code in EXAMPLE.findall((ROOT / path).read_text(encoding="utf-8")) if "steer_heal" in code]


def test_the_example_of_the_readme_is_short_and_runs(tmp_path, capsys):
    (example,) = [code for code in examples("README.md") if "SteerHeal" in code]
    assert len(example.splitlines()) <= 12
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        exec(example, {})
    assert (tmp_path / "my_adapter" / "adapter_config.json").is_file()
    assert "healed" in capsys.readouterr().out


@dataclass
class SteeringVector:
    layer_activations: dict
    layer_type: str


def test_the_examples_of_the_guide_run(tmp_path, monkeypatch):
    stand_in = ModuleType("steering_vectors")  # tests/test_vector_files.py has the package itself
    monkeypatch.setattr(stand_in, "SteeringVector", SteeringVector, raising=False)
    monkeypatch.setitem(sys.modules, "steering_vectors", stand_in)
    names = {}
    for example in examples("docs/library.md"):
        exec(example, names)
    assert {"my_adapter", "mine.gguf", "mine.safetensors"} == {path.name for path in tmp_path.iterdir()}
    assert len(names["trait"].prompts) == 48


def test_the_guide_names_every_public_name_that_there_is():
    import steer_heal

    text = (ROOT / "docs" / "library.md").read_text(encoding="utf-8")
    assert [name for name in steer_heal.__all__ if name not in text] == []
    listed = re.findall(r"^::: steer_heal\.([\w.]+)\.(\w+)$", (ROOT / "docs/api.md").read_text(), re.MULTILINE)
    assert {name: home for home, name in listed} == steer_heal._HOMES


def test_the_notebook_runs(tmp_path, monkeypatch):
    matplotlib.use("Agg")
    code, names = [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"], {}
    for cell in code:
        exec("".join(cell["source"]), names)
    assert {*names["results"]} == {"base", "prompted", "steered", "healed"}
    assert (tmp_path / "quickstart_adapter" / "adapter_model.safetensors").is_file()


def test_the_notebook_was_executed_in_order_and_tells_nothing_of_a_machine():
    cells = NOTEBOOK["cells"]
    code = [cell for cell in cells if cell["cell_type"] == "code"]
    assert len(cells) <= 15 and [cell["execution_count"] for cell in code] == [*range(1, len(code) + 1)]
    assert all(out["output_type"] != "error" and out.get("name") != "stderr" for c in code for out in c["outputs"])
    assert sum("image/png" in out.get("data", {}) for c in code for out in c["outputs"]) >= 2
    text = json.dumps([out for cell in code for out in cell["outputs"] if "image/png" not in out.get("data", {})])
    assert not re.search(r"(?<![\w.<])/(?:home|work|tmp|usr|root|opt)\b|localhost", text)
    for cell in code:
        ast.parse("".join(cell["source"]))
