"""steer-heal push FOLDER OWNER/NAME [--yes]: uploads a checkpoint or an export to the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tyro

from steer_heal.errors import Problems, UserError, plural, print_safe
from steer_heal.flags import parsed
from steer_heal.settings import AllowBroken, RoundName, RunFolder, settings


@settings("")
class Push:
    """Upload a checkpoint or an export with its model card. Without --yes, print what would be uploaded and send
    nothing. Damaged weights and symbolic links are refused."""

    folder: RunFolder
    """Folder of a run, of a checkpoint (out/<run>/ckpt/r0, of round 1), or of an export."""
    repo_id: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="OWNER/NAME")]
    """OWNER/NAME of the repository on the hub. It is created if it does not exist."""
    round: RoundName | None = None
    """Round of the run whose checkpoint is uploaded: its number (from 1), last (the last round that was kept), or
    best (the one that the verdict names). Default: best."""
    allow_broken: AllowBroken = False
    base_model: str | None = None
    """OWNER/NAME of the base model on the hub, if the run used a local path. It replaces that path in the uploaded card
    and configuration. The folder itself does not change."""
    private: bool = False
    """If the repository is created, make it private."""
    yes: bool = False
    """Upload the files."""


def main(argv: Sequence[str]) -> int:
    given, _ = parsed(Push, argv, "push")
    from huggingface_hub import get_token

    from steer_heal.share.card import hub_id
    from steer_heal.share.push import Shared, folder_to_share, shared_files, upload

    problems = Problems()
    shared = Shared(given.folder, "", [])
    for name, value in (("repo_id", given.repo_id), ("base_model", given.base_model)):
        if value is not None and hub_id(value) is None:
            problems.found.append(f"{name} is {value!r}: it must be OWNER/NAME in letters, digits, '-', '_' and '.'")
    with problems.noted():
        shared = shared_files(folder_to_share(given.folder, given.round, given.allow_broken), given.base_model)
    with problems.noted():
        if given.yes and get_token() is None:
            raise UserError("no token of the hub was found: run `hf auth login`, or set HF_TOKEN")
    problems.raise_if_any()
    for name in shared.names:
        note = f" (its base model is {given.base_model})" if name in shared.changed else ""
        print_safe(f"{shared.folder / name} -> {given.repo_id}/{name}{note}")
    size = sum(map(shared.size, shared.names))
    access = "private" if given.private else "public"
    print_safe(
        f"{shared.content}: {plural(len(shared.names), 'file')}, {size / 1e6:.1f} MB; the repository is {access} if it is new"
    )
    if given.yes:
        upload(shared, given.repo_id, private=given.private)
    else:
        print_safe("nothing was sent; --yes uploads the files")
    return 0
