"""steer-heal push FOLDER OWNER/NAME [--yes]: uploads a checkpoint or an export to the hub."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import tyro

from steer_heal.errors import Problems, plural, print_safe
from steer_heal.flags import parsed
from steer_heal.settings import AllowBroken, RoundName, RunFolder, settings
from steer_heal.verdict import round_words


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

    from steer_heal.report import console
    from steer_heal.share.card import hub_id
    from steer_heal.share.push import folder_to_share, round_to_share, shared_files, upload

    console.lines()
    problems = Problems()
    for name, value in (("OWNER/NAME", given.repo_id), ("--base-model", given.base_model)):
        if value is not None and hub_id(value) is None:
            names = "two names with a slash between them, in letters, digits, '-', '_' and '.'"
            problems.found.append(f"{name} is {value!r}: it must be {names}")
    chosen = problems.attempt(round_to_share, given.folder, given.round, given.allow_broken)
    if given.yes and get_token() is None:
        problems.found.append("no token of the hub was found: run `hf auth login`, or set HF_TOKEN")
    problems.raise_if_any()
    if chosen is not None:
        print_safe(round_words(*chosen))
    shared = shared_files(folder_to_share(given.folder, None if chosen is None else chosen[1]), given.base_model)
    for name in shared.names:
        note = " (with the id of its base model on the hub)" if name in shared.changed else ""
        print_safe(f"{shared.folder / name} -> {given.repo_id}/{name}{note}")
    size = f"{plural(len(shared.names), 'file')}, {sum(map(shared.size, shared.names)) / 1e6:.1f} MB"
    access = "private" if given.private else "public"
    print_safe(f"{shared.content}: {size}; the repository is {access} if it is new")
    if given.yes:
        upload(shared, given.repo_id, private=given.private)
    else:
        print_safe("nothing was sent; --yes uploads the files")
    return 0
