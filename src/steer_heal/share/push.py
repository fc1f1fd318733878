"""Uploads a checkpoint or an export to the hub: steer-heal push out/<run> OWNER/NAME [--yes]"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from steer_heal.errors import Problems, UserError, print_error, print_safe
from steer_heal.inputs.files import ADAPTER_CONFIG_FILES, ADAPTER_FILE


@dataclass(frozen=True, kw_only=True)
class Push:
    """Upload a checkpoint or an export with its model card. Without --yes nothing is sent: it prints what would be."""

    folder: tyro.conf.Positional[Path]
    """Folder of a run, of a checkpoint (out/<run>/ckpt/r3), or of an export."""
    repo_id: tyro.conf.Positional[str]
    """OWNER/NAME on the hub; it is made where there is none."""
    round: int | None = None
    """Round of the run; none: the last."""
    private: bool = False
    """A new repository is private."""
    yes: bool = False
    """Upload."""


def push(command: Push) -> None:
    """Prints which files go where and, if asked to, uploads them. UserError where they cannot be shared."""
    from huggingface_hub import HfApi, get_token

    from steer_heal.share.card import hub_id
    from steer_heal.share.checkpoints import chosen

    problems, folder, files = Problems(), command.folder, []
    with problems.noted():
        if hub_id(command.repo_id) is None:
            raise UserError(
                f"repo_id is {command.repo_id!r}: it must be OWNER/NAME in letters, digits, '-', '_' and '.'"
            )
    with problems.noted():
        folder = chosen(command.folder, command.round)
        files = shared_files(folder)
    with problems.noted():
        if command.yes and get_token() is None:
            raise UserError("there is no token of the hub: run `hf auth login`, or set HF_TOKEN")
    problems.raise_if_any()
    size = sum((folder / name).stat().st_size for name in files)
    kind = "private" if command.private else "public"
    for name in files:
        print_safe(f"{folder / name} -> {command.repo_id}/{name}")
    print_safe(f"{len(files)} files, {size / 1e6:.1f} MB; the repository is {kind} if it is new")
    if not command.yes:
        print_safe("nothing was sent; --yes uploads them")
        return
    api = HfApi()
    try:
        api.create_repo(command.repo_id, private=command.private, exist_ok=True)
        message = "Upload by steer-heal"
        done = api.upload_folder(
            repo_id=command.repo_id, folder_path=folder, allow_patterns=files, commit_message=message
        )
    except Exception as error:  # of the hub, of the network, of the disk
        raise UserError(f"{command.repo_id} was not uploaded: {error}") from None
    print_safe(f"uploaded: {done}")


def shared_files(folder: Path) -> list[str]:
    """Names of the files of a checkpoint or an export. UserError unless it holds weights and a model card."""
    from steer_heal.share.card import CARD

    names = sorted(path.name for path in folder.iterdir() if path.is_file() and not path.name.startswith("."))
    adapter = ADAPTER_FILE in names and not set(ADAPTER_CONFIG_FILES).isdisjoint(names)
    merged = "config.json" in names and any(name.endswith(".safetensors") for name in names)
    if not adapter and not merged:
        raise UserError(f"{folder} holds no adapter and no model; give a checkpoint such as out/<run>/ckpt/r3")
    if CARD not in names:
        raise UserError(f"{folder} has no model card ({CARD}); `steer-heal report RUN` writes those of a run")
    return names


def main(argv: Sequence[str] | None = None) -> int:
    """Exit status: 0 done, 1 stopped by a user error."""
    try:
        push(tyro.cli(Push, args=argv, prog="steer-heal push"))
    except (UserError, OSError) as error:
        print_error(error)
        return 1
    return 0
