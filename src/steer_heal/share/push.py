"""The upload of a checkpoint or an export to the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from steer_heal.errors import UserError, print_safe
from steer_heal.inputs.files import ADAPTER_CONFIG_FILES, ADAPTER_FILE
from steer_heal.runs.log import EVENTS
from steer_heal.share.card import CARD


def folder_to_share(folder: Path, r: int | None = None) -> Path:
    """The checkpoint of round r, by default of the last, if the folder is a run's. Any other folder is returned as it
    is."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder; give the folder of a run, a checkpoint or an export")
    if not (folder / EVENTS).is_file():
        if r is not None:
            raise UserError(f"{folder} has no {EVENTS}, so it has no round {r}; give the folder of the run")
        return folder
    from steer_heal.runs.opened import chosen_round  # torch: seconds
    from steer_heal.runs.stored import FolderRun

    run = FolderRun.read(folder)
    return run.checkpoint(chosen_round(run, r))


def shared_files(folder: Path) -> tuple[str, list[str]]:
    """(what the folder holds, such as `a LoRA adapter`; the names of its files). UserError unless it holds a model card
    and an adapter or a merged model."""
    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    if ADAPTER_FILE in names and not set(ADAPTER_CONFIG_FILES).isdisjoint(names):
        from steer_heal.model.student import saved_kind  # torch: seconds

        content = f"a {saved_kind(folder).title}"
    elif "config.json" in names and any(name.endswith(".safetensors") for name in names):
        content = "a merged model"
    else:
        raise UserError(f"{folder} holds no adapter and no model; give a checkpoint such as out/<run>/ckpt/r3")
    if CARD not in names:
        raise UserError(f"{folder} has no model card ({CARD}); `steer-heal report RUN` writes the cards of a run")
    return content, names


def upload(folder: Path, files: Sequence[str], repo_id: str, *, private: bool) -> None:
    """Uploads the files, to a new repository if there is none of that name. UserError if the hub refuses."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=list(files), commit_message="Upload by steer-heal"
        )
    except Exception as error:  # of the hub, of the network, of the disk
        raise UserError(f"{repo_id} was not uploaded: {error}") from None
    print_safe(f"uploaded: {done}")
