"""`ssmcompress report`: show a report again."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from ..groups import Force, MaybeModel, ReportPrinting
from ..options import OUTPUT, option
from ..tables import show_report
from ..terminal import say

EXAMPLE = "ssmcompress report compressed/model-r0.30 --html report.html"


def report(
    printing: ReportPrinting,
    model: MaybeModel = None,
    html: Annotated[str | None, option(OUTPUT, help="Also write a web page to this file.")] = None,
    force: Force = False,
) -> None:
    """Show the report of a compressed model, also as a web page."""
    from ...jobs.report import read_report, write_page

    folder, content = read_report(model)
    if html is not None:
        write_page(content, folder, Path(html), force)
        say(f"wrote {html}", printing.quiet)
    if model is None:
        say(f"{folder}:", printing.quiet)
    show_report(content, printing.as_json, printing.verbose)
