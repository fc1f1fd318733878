"""Do the tests notice when a number of spec.md is changed? Each change of mutations.toml is made alone in a copy of the
tree, and the tests that should notice it run there. A change that they pass is a survivor.

Two changes are tried at a time, each in a process forked from one that has torch loaded. First the tests run on the
unchanged copy, where they must pass.
"""

import compileall
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from queue import SimpleQueue

ROOT = Path(__file__).resolve().parent.parent
TABLE = Path(__file__).with_name("mutations.toml")
N_AT_ONCE = 2
TIMEOUT_S = 900
PASSED, FAILED, ELSEWHERE = 0, 1, 99
"""Exit statuses: the first two are pytest's; ELSEWHERE means that the tests did not import the copy."""
PRELOADED = [
    *("torch", "transformers.models.qwen3.modeling_qwen3", "peft", "scipy.stats", "polars", "pytest", "hypothesis"),
    *("beartype", "einops", "jaxtyping", "matplotlib.pyplot", "pydantic", "rich.console", "tyro"),
]


@dataclass(frozen=True)
class Mutation:
    """One change of the source, and the tests that should fail because of it."""

    what: str
    """What is changed, in the words of spec.md."""
    file: str
    """Path from the root of the project."""
    old: str
    """Source text that stands exactly once in the file."""
    new: str
    tests: tuple[str, ...]
    """Test files, or single tests: tests/test_x.py::test_y."""

    def problem(self, root: Path) -> str:
        """Why the change cannot be made in the tree `root`; empty if it can."""
        if absent := [path for path in (self.file, *map(file_of, self.tests)) if not (root / path).is_file()]:
            return f"no file {', '.join(absent)}"
        n = (root / self.file).read_text(encoding="utf-8").count(self.old)
        return "" if n == 1 else f"{self.file} holds {self.old!r} {n} times: it must be there once"


def file_of(test: str) -> str:
    """The file of a test."""
    return test.split("::")[0]


def read_table(path: Path = TABLE) -> list[Mutation]:
    """The changes in the order of the file."""
    rows = tomllib.loads(path.read_text(encoding="utf-8"))["mutation"]
    return [Mutation(**{**row, "tests": tuple(row["tests"])}) for row in rows]


def copied(parent: Path, name: str) -> Path:
    """A compiled copy of the working tree without what git ignores."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    tree = parent / name
    for path in filter(None, listed.stdout.split("\0")):
        if (ROOT / path).is_file():
            (tree / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / path, tree / path)
    compileall.compile_dir(tree / "src", quiet=1)
    return tree


def run_tests(tree: Path, tests: Sequence[str], log: Path) -> None:
    """Ends this process with pytest's exit status."""
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.chdir(tree)
    sys.path.insert(0, str(tree / "src"))
    sys.dont_write_bytecode = True  # a changed file is never taken from the compiled one of another change
    import pytest

    status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests]))
    package = sys.modules.get("steer_heal")
    imported = package is not None and Path(str(package.__file__)).is_relative_to(tree)
    sys.exit(status if imported or status not in (PASSED, FAILED) else ELSEWHERE)


@dataclass(frozen=True)
class Outcome:
    """How a run of tests ended."""

    status: int | None
    """Pytest's exit status; None: they did not end within TIMEOUT_S."""
    seconds: float
    output: str
    """The end of what they printed."""

    @property
    def word(self) -> str:
        """SURVIVED, killed or, where the tests did not run to an end in the copy, ERROR."""
        if self.status == PASSED:
            return "SURVIVED"
        return "killed" if self.status == FAILED else "ERROR"


class Trial:
    """Copies of the tree in which tests run, one process at a time in each."""

    def __init__(self, folder: Path) -> None:
        self.free: SimpleQueue[Path] = SimpleQueue()
        for i in range(N_AT_ONCE):
            self.free.put(copied(folder, f"tree{i}"))
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(PRELOADED)

    def changed(self, mutation: Mutation) -> Outcome:
        """The tests of a mutation, where it was made."""
        tree = self.free.get()
        source = tree / mutation.file
        original, times = source.read_bytes(), source.stat()
        try:
            source.write_bytes(original.replace(mutation.old.encode(), mutation.new.encode()))
            return self._run(tree, mutation.tests)
        finally:
            source.write_bytes(original)
            os.utime(source, ns=(times.st_atime_ns, times.st_mtime_ns))  # the compiled file holds again
            self.free.put(tree)

    def unchanged(self, tests: Sequence[str]) -> Outcome:
        """Tests, where nothing was changed."""
        tree = self.free.get()
        try:
            return self._run(tree, tests)
        finally:
            self.free.put(tree)

    def _run(self, tree: Path, tests: Sequence[str]) -> Outcome:
        log, began = tree.with_suffix(".log"), time.monotonic()
        process = self.context.Process(target=run_tests, args=(tree, tests, log))
        process.start()
        process.join(TIMEOUT_S)
        if process.is_alive():
            process.kill()
            process.join()
            return Outcome(None, time.monotonic() - began, f"no end after {TIMEOUT_S} s")
        return Outcome(process.exitcode, time.monotonic() - began, log.read_text(errors="replace")[-2000:])


def main(words: Sequence[str]) -> int:
    """Tries each change whose file or `what` holds one of the words; without words, all. Returns 1 if a change survives
    or cannot be tried."""
    table = [m for m in read_table() if not words or any(word in f"{m.file} {m.what}" for word in words)]
    if problems := [f"{m.what}: {problem}" for m in table if (problem := m.problem(ROOT))]:
        print("\n".join(problems), file=sys.stderr)
        return 1
    tests = sorted({test for mutation in table for test in mutation.tests})
    by_file = [list(group) for _, group in groupby(tests, file_of)]  # a file comes before its tests
    first = [group[:1] if group[0] == file_of(group[0]) else group for group in by_file]
    began, n_survived = time.monotonic(), 0
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(N_AT_ONCE) as pool:
        trial = Trial(Path(folder))
        for tests, outcome in zip(first, pool.map(trial.unchanged, first), strict=True):
            print(f"{outcome.seconds:5.1f} s  unchanged  {file_of(tests[0])}", flush=True)
            if outcome.status != PASSED:
                print(f"it fails without any change (status {outcome.status}):\n{outcome.output}", file=sys.stderr)
                return 1
        for mutation, outcome in zip(table, pool.map(trial.changed, table), strict=True):
            print(f"{outcome.seconds:5.1f} s  {outcome.word:9}  {mutation.what}  ({mutation.file})", flush=True)
            n_survived += outcome.word != "killed"
            if outcome.word == "ERROR":
                print(outcome.output, file=sys.stderr)
    print(f"{len(table)} changes, {n_survived} not killed, {time.monotonic() - began:.0f} s")
    return int(n_survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
