"""`ssmcompress push`: upload a compressed model to the Hugging Face Hub."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from ..groups import Printing
from ..options import OUTPUT, option
from ..tables import print_json, write
from ..terminal import say

EXAMPLE = "ssmcompress push compressed/model-r0.30 owner/name --license mit --dry-run"


def push(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="Compressed model, a folder that prune wrote.")],
    repository: Annotated[
        str,
        typer.Argument(metavar="OWNER/NAME", help="Repository of the Hub; it is created if needed."),
    ],
    printing: Printing,
    private: Annotated[
        bool, option(OUTPUT, "--private", help="Create a private repository; refuse a public one.")
    ] = False,
    license: Annotated[
        str | None,
        option(OUTPUT, help="Licence of the model, such as mit. Default: the dense model's, if that is on the Hub."),
    ] = None,
    revision: Annotated[str | None, option(OUTPUT, help="Branch to upload to. Default: main.")] = None,
    message: Annotated[str | None, option(OUTPUT, help="Commit message.")] = None,
    force: Annotated[
        bool, option(OUTPUT, "--force", help="Upload even if the repository has files that ssmcompress did not write.")
    ] = False,
    dry_run: Annotated[bool, option(OUTPUT, "--dry-run", help="Show files and card; upload nothing.")] = False,
) -> None:
    """Upload a compressed model with its card to the Hugging Face Hub."""
    from ...jobs.push import PushRequest, push_folder

    bars = sys.stderr.isatty() and not printing.quiet
    request = PushRequest(repository, private, revision, message, license, bars, force)
    result = push_folder(folder, request, dry_run)
    if printing.as_json:
        print_json(result)
    elif dry_run:
        for file in result["files"]:
            write(f"{file['bytes']:>13,} bytes  {file['name']}")
        write(f"\n{result['card'].rstrip()}")
    else:
        write(f"{result['url']}, commit {result['commit']}")
        if result["deleted"]:
            say(f"deleted files of an earlier upload: {', '.join(result['deleted'])}", printing.quiet)
    if dry_run:
        say("nothing was uploaded", printing.quiet)
        if license is None:
            say("the licence is read from the dense model's card at upload", printing.quiet)
