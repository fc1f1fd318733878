"""What leaves the repository: links of the documentation, the site, and a wheel that runs without the checkout."""

import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import zipfile

import pytest
from places import ROOT
from runs import SETTINGS

PAGES = [*ROOT.glob("*.md"), *(page for folder in ("data", "docs", "out") for page in (ROOT / folder).rglob("*.md"))]
LINK = re.compile(r"\]\(([^)\s]+)\)")
LARGEST_WHEEL = 6e6
"""Bytes. The weights of the toy model are half of it."""


# --- documentation -----------------------------------------------------------------------------------------------
def anchors(page) -> set[str]:
    """Of a page's headings, as repository pages make them."""
    prose = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ +(.+?) *$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def dead_links(page) -> list[str]:
    """Relative links whose file, or whose heading in it, is not there."""
    dead = []
    for link in LINK.findall(page.read_text(encoding="utf-8")):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if re.match("[a-z]+:", link):
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    return dead


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_has_a_file_and_a_heading(page):
    assert dead_links(page) == []


def test_a_dead_link_is_seen(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A (first) heading\n[a](#a-first-heading) [b](#no) [c](no.md) [d](page.md#no) [e](https://x)\n")
    assert dead_links(page) == ["#no", "no.md", "page.md#no"]


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("material", reason="pip install 'steer-heal[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )
    assert done.returncode == 0 and "WARNING" not in done.stderr, done.stderr
    front = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert 'href="spec/#verdict"' in front and (tmp_path / "trajectory_smol.png").is_file()
    assert "https://fonts" not in front


# --- installed packages ------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A copy of the repository, so that a build leaves nothing in the checkout."""
    junk = shutil.ignore_patterns(".*", "out", "build", "dist", "*.egg-info", "__pycache__")
    copy = shutil.copytree(ROOT, tmp_path_factory.mktemp("checkout") / "copy", ignore=junk)
    (copy / "out").mkdir()
    shutil.copy(ROOT / "out/README.md", copy / "out")
    return copy


@pytest.fixture(scope="module")
def source(checkout, tmp_path_factory):
    """The unpacked source distribution."""
    work = tmp_path_factory.mktemp("source")
    built = build("sdist", checkout, work)
    with tarfile.open(built) as archive:
        archive.extractall(work / "unpacked", filter="data")
    return next((work / "unpacked").iterdir())


@pytest.fixture(scope="module")
def wheel(source, tmp_path_factory):
    return build("wheel", source, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    site = tmp_path_factory.mktemp("site")
    install(wheel, site)
    return site


@pytest.fixture(scope="module")
def editable(checkout, tmp_path_factory):
    """An editable install of the copy."""
    site = tmp_path_factory.mktemp("editable")
    install(build("editable", checkout, tmp_path_factory.mktemp("built")), site)
    return site


def build(kind, folder, out):
    """The file that setuptools builds of a source folder, without an isolated environment."""
    code = f"from setuptools import build_meta; build_meta.build_{kind}({str(out)!r})"
    output_of([sys.executable, "-c", code], folder)
    return next(path for path in out.iterdir() if path.is_file())


def install(wheel, site):
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--quiet", "--disable-pip-version-check"]
    output_of([*pip, str(wheel), "--target", str(site)], site)


def output_of(command, folder, env=None, said=""):
    """What a command prints. Its failure fails the test."""
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, input=said)
    assert done.returncode == 0, done.stderr
    return done.stdout


READ_DATA = """
import steer_heal
from steer_heal.inputs import load_inputs, traits
from steer_heal.inputs.files import DATA, resolve
from steer_heal.presets import TOY_PRESET

load_inputs(TOY_PRESET)
resolve("data/toylm/model.safetensors", "model")
print(steer_heal.__file__, DATA, *traits.available(), sep="\\n")
"""


@pytest.mark.parametrize("kind", ["checkout", "editable", "source", "wheel"])
def test_shipped_data_is_read_from_any_folder(kind, checkout, editable, source, installed, tmp_path):
    site, package, data = {
        "checkout": (checkout / "src", checkout / "src/steer_heal", checkout / "data"),
        "editable": (editable, checkout / "src/steer_heal", checkout / "data"),
        "source": (source / "src", source / "src/steer_heal", source / "data"),
        "wheel": (installed, installed / "steer_heal", installed / "steer_heal/data"),
    }[kind]
    # first, so that its path files find their own modules
    code = f"import site, sys; sys.path.insert(0, {str(site)!r}); site.addsitedir({str(site)!r})\n{READ_DATA}"
    # Without -S, the interpreter would also read the path files of an editable install of this checkout.
    others = os.environ | {"PYTHONPATH": sysconfig.get_path("purelib")}
    found = output_of([sys.executable, "-S", "-c", code], tmp_path, others).split("\n")
    assert found[:2] == [str(package / "__init__.py"), str(data)]
    assert {"authority", "care", "honesty", "love"} <= set(found[2:])
    assert digests(data) == digests(ROOT / "data")


def digests(folder):
    """SHA-256 of every file in a folder, by its path there."""
    files = [path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_description_on_the_package_index_has_paths_for_links_and_no_pictures(source, wheel):
    with zipfile.ZipFile(wheel) as archive:
        metadata = next(archive.read(name).decode() for name in archive.namelist() if name.endswith("/METADATA"))
    fields, _, told = metadata.partition("\n\n")
    assert "Description-Content-Type: text/markdown" in fields
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    links = {link.partition("#")[0] for link in LINK.findall(readme) if not re.match("[a-z]+:", link)}
    pages = {link for link in links if not link.endswith(".png")}
    assert len(pages) > 10 and "![" in readme and "![" not in told
    for path in pages:
        assert f"`{path}`" in told and (source / path).is_file()
    assert not links & {link.partition("#")[0] for link in LINK.findall(told)}
    headings = lambda text: re.findall("^#+ .*|^[|] [^|]*", text, re.MULTILINE)
    assert headings(told) == headings(readme), "and the rows of the tables"


def test_the_wheel_holds_every_file_of_the_package_and_is_small(wheel):
    files = digests(ROOT / "src/steer_heal") | {f"data/{name}": sha for name, sha in digests(ROOT / "data").items()}
    with zipfile.ZipFile(wheel) as archive:
        held = {name: hashlib.sha256(archive.read(name)).hexdigest() for name in archive.namelist()}
        metadata = next(archive.read(name).decode() for name in held if name.endswith("/METADATA"))
    for name, sha in files.items():
        assert held.get(f"steer_heal/{name}") == sha, name
    assert wheel.stat().st_size < LARGEST_WHEEL
    assert " @ " not in metadata, "the package index takes no requirement with an address"


def test_the_wheel_runs_from_an_empty_folder(installed, tmp_path):
    site, empty = installed, tmp_path
    own = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    where = own | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    flags = [*SETTINGS.split(), "--eval.n-vignettes", "3", "--n-rounds", "1", "--no-control"]

    def run(*command, said=""):
        return output_of(command, empty, where, said)

    assert run(sys.executable, str(site / "bin" / "steer-heal"), "--help").startswith("usage: steer-heal COMMAND")
    commands = [
        ["run", "fast-dev", "--folder", "out/a", *flags],
        *(["verify", "out/a"], ["eval", "--run", "out/a"], ["report", "out/a"]),
        ["chat", "out/a", "--max-new-tokens", "4"],
    ]
    code = f"""
import steer_heal
print(steer_heal.__file__)
from steer_heal.__main__ import main
for words in {commands!r}:
    assert main(words) == 0, words
"""
    printed = run(sys.executable, "-c", code, said="Hello.\n")
    assert printed.startswith(str(site)), "not the checkout"
    assert all((empty / "out/a" / name).is_file() for name in ("report.html", "diary.md", "ckpt/r0/README.md"))
    assert "as recorded" in printed and "are the recorded ones to the last digit" in printed
    assert "report.html" in printed and "--- healed" in printed
