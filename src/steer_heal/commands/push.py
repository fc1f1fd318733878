"""steer-heal push FOLDER OWNER/NAME [--yes]: uploads a checkpoint or an export to the hub."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import tyro

from steer_heal.errors import Problems, UserError, print_safe
from steer_heal.flags import parsed
from steer_heal.settings import settings


@settings("")
class Push:
    """Upload a checkpoint or an export with its model card. Without --yes, print what would be uploaded and send
    nothing."""

    folder: tyro.conf.Positional[Path]
    """Folder of a run, of a checkpoint (out/<run>/ckpt/r3), or of an export."""
    repo_id: tyro.conf.Positional[str]
    """OWNER/NAME of the repository on the hub. A missing one is created."""
    round: int | None = None
    """Round of the run whose checkpoint is uploaded. Default: the last."""
    private: bool = False
    """Make the repository private, if it is created."""
    yes: bool = False
    """Upload the files."""


def main(argv: Sequence[str]) -> int:
    given, _ = parsed(Push, argv, "push")
    from huggingface_hub import get_token

    from steer_heal.share.card import hub_id
    from steer_heal.share.push import folder_to_share, shared_files, upload

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
