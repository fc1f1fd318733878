"""steer-heal push FOLDER OWNER/NAME [--yes]: uploads a checkpoint or an export to the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro

from steer_heal.errors import Problems, UserError, print_safe
from steer_heal.flags import parsed
from steer_heal.inputs.files import ADAPTER_CONFIG_FILES, ADAPTER_FILE
from steer_heal.runs.log import EVENTS
from steer_heal.settings import settings


@settings("")
class Push:
    """Upload a checkpoint or an export with its model card. Without --yes, print what would be uploaded and send
    nothing."""

    folder: tyro.conf.Positional[Path]
    """Folder of a run, of a checkpoint (out/<run>/ckpt/r3), or of an export."""
    repo_id: tyro.conf.Positional[str]
    """OWNER/NAME of the repository on the hub. It is created if it does not exist."""
    round: int | None = None
    """Round of the run whose checkpoint is uploaded. Default: the last one that was kept."""
    private: bool = False
    """If the repository is created, make it private."""
    yes: bool = False
    """Upload the files."""


def main(argv: Sequence[str]) -> int:
    given, _ = parsed(Push, argv, "push")
    from huggingface_hub import get_token

    from steer_heal.share.card import hub_id

    problems = Problems()
    folder = given.folder
    content = ""
    files = []
    if hub_id(given.repo_id) is None:
        problems.found.append(
            f"repo_id is {given.repo_id!r}: it must be OWNER/NAME in letters, digits, '-', '_' and '.'"
        )
    with problems.noted():
        folder = folder_to_share(given.folder, given.round)
        content, files = shared_files(folder)
    with problems.noted():
        if given.yes and get_token() is None:
            raise UserError("no token of the hub was found: run `hf auth login`, or set HF_TOKEN")
    problems.raise_if_any()
    for name in files:
        print_safe(f"{folder / name} -> {given.repo_id}/{name}")
    size = sum((folder / name).stat().st_size for name in files)
    access = "private" if given.private else "public"
    print_safe(f"{content}: {len(files)} files, {size / 1e6:.1f} MB; the repository is {access} if it is new")
    if given.yes:
        upload(folder, files, given.repo_id, private=given.private)
    else:
        print_safe("nothing was sent; --yes uploads the files")
    return 0


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
    from steer_heal.share.card import CARD

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
