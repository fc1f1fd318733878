"""The upload of a checkpoint or an export to the hub."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from steer_heal.errors import UserError, print_safe
from steer_heal.events import Run
from steer_heal.inputs.files import ADAPTER_CONFIG_FILES, ADAPTER_FILE, is_path
from steer_heal.runs.chosen import run_and_round
from steer_heal.runs.log import EVENTS
from steer_heal.settings import TINY_RANDOM, RoundName
from steer_heal.share.card import CARD, in_card, with_base

INDEX = "model.safetensors.index.json"
BASE_FIELDS = ("base_model_name_or_path", "base_model")
"""Where the configuration of an adapter names its base."""
NOTE = r"(?:, (?:\d+-bit|weights of) .*?)?"
"""How the weights of a base differ from the published ones."""
BASE_IN_CARD = re.compile(rf"^\| base weights \| (.*?){NOTE}, b?float\d+, SHA-256 ", re.MULTILINE)
CHAT_TEMPLATES = "additional_chat_templates"
"""Folder of the chat templates of a tokenizer with several."""
TEXTS = (".json", ".jinja", ".md", ".txt")
"""Endings of the files that may name a path."""


@dataclass(frozen=True)
class Shared:
    """What is uploaded: files of a folder, some of them with another content."""

    folder: Path
    content: str
    """In words, such as `a LoRA adapter`."""
    names: list[str]
    changed: Mapping[str, bytes] = field(default_factory=dict)

    def size(self, name: str) -> int:
        return len(self.changed[name]) if name in self.changed else (self.folder / name).stat().st_size


def round_to_share(folder: Path, which: RoundName | None, allow_broken: bool) -> tuple[Run, int] | None:
    """(the run, the round of it that was asked for, by default the best). None: the folder is not a run's, and no round
    was asked for."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a run, a checkpoint or an export")
    if not (folder / EVENTS).is_file():
        if which is not None:
            raise UserError(f"{folder} has no {EVENTS}, so it has no round {which!r}; give the folder of the run")
        if allow_broken:
            raise UserError(f"{folder} has no {EVENTS}, so --allow-broken has no effect; leave it out")
        return None
    return run_and_round(folder, "best" if which is None else which, allow_broken=allow_broken)


def folder_to_share(folder: Path, r: int | None) -> Path:
    """The checkpoint of round r of a run or, without a round, the folder itself. UserError where a checkpoint of a run
    is not as the run recorded it."""
    if r is None:
        _require_as_recorded(folder.resolve())
        return folder
    from steer_heal.runs.stored import FolderRun  # torch: seconds

    return FolderRun.read(folder).checkpoint(r)


def _require_as_recorded(folder: Path) -> None:
    """UserError where the folder is a checkpoint inside its run, and is not as the run recorded it."""
    above = folder.parent.parent
    if not (above / EVENTS).is_file():
        return
    from steer_heal.events import Trained
    from steer_heal.runs.stored import FolderRun

    run = FolderRun.read(above)
    for trained in run.each(Trained):
        if trained.checkpoint == f"{folder.parent.name}/{folder.name}":
            run.checkpoint(trained.round)


def shared_files(folder: Path, base_model: str | None = None) -> Shared:
    """The files of a folder. UserError unless it holds a model card and an adapter or a merged model, whole and without
    links. `base_model` is the id on the hub that takes the place of a base on this machine."""
    paths = sorted(path for path in folder.iterdir() if not path.name.startswith("."))
    paths += sorted((folder / CHAT_TEMPLATES).glob("*.jinja"))
    if links := [path for path in paths if path.is_symlink()]:
        raise UserError(f"{links[0]} is a link; put a copy in its place, or remove it")
    names = [path.relative_to(folder).as_posix() for path in paths if path.is_file()]
    if ADAPTER_FILE in names and not set(ADAPTER_CONFIG_FILES).isdisjoint(names):
        from steer_heal.model.student import saved_kind  # torch: seconds

        try:
            content = f"a {saved_kind(folder).title}"
        except (OSError, ValueError, TypeError, LookupError) as error:
            raise UserError(f"the adapter in {folder} cannot be read ({error}); restore its configuration") from None
    elif "config.json" in names and any(name.endswith(".safetensors") for name in names):
        content = "a merged model"
    elif any(name.endswith(".gguf") for name in names):
        content = "a GGUF file"
    else:
        raise UserError(f"{folder} holds no adapter and no model; give a checkpoint such as out/<run>/ckpt/r3")
    if CARD not in names:
        raise UserError(f"{folder} has no model card ({CARD}); `steer-heal report RUN` writes the cards of a run")
    _require_readable(folder, names)
    return Shared(folder, content, names, _with_base(folder, names, base_model))


def _require_readable(folder: Path, names: Sequence[str]) -> None:
    """UserError where a file of weights is damaged or missing."""
    for name in names:
        if name.endswith(".safetensors"):
            try:
                with safe_open(folder / name, "np") as file:
                    list(file.keys())
            except (SafetensorError, OSError) as error:
                raise UserError(f"{folder / name} is damaged ({error}); restore the file, or export again") from None
    if INDEX in names:
        missing = sorted({*_json(folder / INDEX).get("weight_map", {}).values()} - {*names})
        if missing:
            raise UserError(
                f"{folder / missing[0]} is missing, and {INDEX} names it; restore the file, or export again"
            )


def _json(path: Path) -> dict:
    """The object in a JSON file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(value, dict):
            return value
    except (OSError, ValueError, RecursionError):
        pass
    raise UserError(f"{path} is not a JSON object in UTF-8; restore the file")


# --- a base on this machine --------------------------------------------------------------------------------------
def _with_base(folder: Path, names: Sequence[str], base_model: str | None) -> dict[str, bytes]:
    """The files that name a base on this machine, with `base_model` in its place, and the configurations that name one
    of steer-heal's models, with its id on the hub. UserError where there is a base on this machine and no `base_model`,
    or the other way round, and where a path is left."""
    card = (folder / CARD).read_bytes().decode("utf-8", "replace")
    configs = {name: _json(folder / name) for name in ADAPTER_CONFIG_FILES if name in names}
    bases = [value for config in configs.values() for value in map(config.get, BASE_FIELDS) if isinstance(value, str)]
    told = BASE_IN_CARD.search(card)
    named = in_card(told[1]) if told else ""
    on_hub = re.search(r"^base_model: ", card, re.MULTILINE) is not None
    local = {base for base in bases if is_path(base)}
    if named and not on_hub and named != TINY_RANDOM and (local or not configs):
        local.add(named)
    if not local:
        if base_model is not None:
            raise UserError(
                f"base_model is {base_model!r}: {folder} names no base on this machine; leave out --base-model"
            )
        from steer_heal.model.gguf import PACKAGED  # torch: seconds

        ids = {base: PACKAGED[base].hub_id for base in bases if base in PACKAGED}
        return _renamed(configs, ids) if ids else {}
    if base_model is None:
        raise UserError(
            f"{folder} names its base model by a path on this machine, {max(local, key=len)!r}, where nobody else "
            "finds it; give its id on the hub: --base-model OWNER/NAME"
        )
    changed = {CARD: with_base(card, sorted(local, key=len, reverse=True), base_model).encode()}
    changed |= _renamed(configs, dict.fromkeys(local, base_model))
    for name in names:
        text = changed.get(name) or (_content(folder / name) if name.endswith(TEXTS) else b"")
        if left := [path for path in local if is_path(path) and path.encode() in text.replace(b"\\", b"")]:
            raise UserError(f"{folder / name} holds {left[0]!r}, a path on this machine; remove it from the file")
    return changed


def _renamed(configs: Mapping[str, Mapping[str, Any]], ids: Mapping[str, str]) -> dict[str, bytes]:
    """The configurations of an adapter, with the ids in place of these bases."""
    own = {
        name: {key: ids.get(value, value) if key in BASE_FIELDS else value for key, value in config.items()}
        for name, config in configs.items()
    }
    return {name: (json.dumps(config, indent=2) + "\n").encode() for name, config in own.items()}


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); give a readable file, or remove it") from None


def upload(shared: Shared, repo_id: str, *, private: bool) -> None:
    """Uploads these files and no others, to a new repository if there is none of that name. UserError if the hub
    refuses."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        files = [CommitOperationAdd(name, shared.changed.get(name, shared.folder / name)) for name in shared.names]
        done = api.create_commit(repo_id, files, commit_message="Upload by steer-heal")
    except Exception as error:  # of the hub, of the network, of the disk
        raise UserError(f"{repo_id} was not uploaded: {error}") from None
    print_safe(f"uploaded: {done}")
