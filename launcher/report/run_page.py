"""report.html: a run on one page that needs nothing else, neither network nor server."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import logging
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.checkpoint.lease import current
from launcher.driver.resume import latest_verdict
from launcher.driver.start import DATA
from launcher.errors import DataError, Interrupted, RunFolderError, SlipwayError, Superseded
from launcher.plan.plan import Plan
from launcher.report import run_details as details
from launcher.report import run_sections as sections
from launcher.report.data_rows import Row, rows
from launcher.report.ending import Ending, ending
from launcher.report.fetch import fetch_measured
from launcher.report.history import History
from launcher.report.markup import STYLE, frame
from launcher.report.plots import plots
from launcher.store.durable import replace_synced
from launcher.store.location import is_url, open_store
from launcher.train.metrics import MetricsLog, latest_start

if TYPE_CHECKING:
    from launcher.data.prepare.report import Report

log = logging.getLogger(__name__)

FILE = "report.html"
SHOWN_ROWS = 2
_TITLES = {
    "results": "Before and after",
    "plots": "Plots",
    "time": "Time",
    "events": "What happened",
    "answers": "Answers",
    "slices": "By group",
    "data": "Data",
    "settings": "Settings",
    "environment": "Environment",
    "recipe": "Recipe",
}


def page(plan: Plan, history: History, ended: Ending) -> str:
    """The page of a run whose files lie in its folder on this machine."""
    run_dir = Path(plan.run_dir)
    drawn = plots(plan, history)
    report, rows_shown = _data(plan)
    parts = {
        "results": sections.results(history),
        "plots": sections.plot_section(drawn),
        "time": sections.time_section(history),
        "events": sections.event_section(history),
        "answers": details.answer_section(plan, history),
        "slices": details.slice_section(history),
        "data": details.data_section(plan, report, _findings(report), rows_shown),
        "settings": details.settings_section(plan),
        "environment": details.environment_section(run_dir, history),
        "recipe": details.recipe_section(run_dir),
    }
    there = {name: part for name, part in parts.items() if part}
    body = [
        sections.header(plan, history, ended, {name: _TITLES[name] for name in there}),
        sections.tiles(plan, history),
        *there.values(),
        sections.footer(plan),
        sections.numbers(drawn, history),
        f"<script>{_script()}</script>",
    ]
    digest = base64.b64encode(hashlib.sha256(_script().encode()).digest()).decode()
    # Nothing is loaded, and no script runs but the one whose hash this is.
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'; "
        "form-action 'none'"
    )
    return frame(f"{plan.name}: {ended.state}", policy, STYLE + _style(), "\n".join(body))


def write_at_end(plan: Plan, error: SlipwayError | None = None) -> None:
    """By the launcher that holds the run, when it ends: say why it failed, if it did, in metrics.jsonl, and write the
    page, to the run's object store too if it has one. Raises nothing but Interrupted, where a signal comes: a run
    has ended well without its page."""
    if isinstance(error, Superseded):
        return  # it is another launcher's by now
    try:
        if not isinstance(error, Interrupted):  # who stops a run does not wait for its store
            with contextlib.suppress(RunFolderError):
                fetch_measured(plan)
            if error is not None and latest_verdict(plan.location) is None:
                _write_down(plan, error)
        history = History(Path(plan.run_dir))
        keep(plan, page(plan, history, ending(plan, history, error, over=True)))
    except Interrupted:  # a signal meanwhile
        raise
    except Exception as problem:  # of whatever kind
        log.warning("no %s could be written: %s", FILE, problem)


def keep(plan: Plan, content: str) -> None:
    """Have the page beside metrics.jsonl, where everybody looks for it. Raises OSError, RunFolderError."""
    encoded = content.encode("utf-8", errors="backslashreplace")
    replace_synced(Path(plan.run_dir) / FILE, encoded)
    if is_url(plan.location):
        open_store(plan.location).write(FILE, encoded)


def _write_down(plan: Plan, error: SlipwayError) -> None:
    """The root cause, for whoever looks at the run later; the line counts until the run goes on."""
    run_dir = Path(plan.run_dir)
    attempt = str((latest_start(run_dir) or {}).get("attempt", "0.0"))
    with contextlib.suppress(OSError, SlipwayError):  # this launch may have failed before its start
        attempt = str(current(open_store(plan.location)) or attempt)
    metrics = MetricsLog(run_dir, attempt, writes=True)
    metrics.write("run_failed", message=error.message, hint=error.hint)
    metrics.close()


def _data(plan: Plan) -> tuple[Report | None, list[Row]]:
    """The report on the prepared data, and some of its rows; nothing of what is not on this machine any more."""
    from launcher.data.prepare.report import Report

    folder = Path(plan.data.folder)
    report = None
    with contextlib.suppress(DataError, OSError, ValueError):
        report = Report.load(folder / "report.json")
        if report is None and is_url(plan.location):
            report = Report.model_validate_json(open_store(plan.location).read(f"{DATA}/report.json"))
    shown: list[Row] = []
    with contextlib.suppress(Exception):  # of another version, or half deleted
        shown = list(rows(folder, "train", plan.trajectory.seed, SHOWN_ROWS))
    return report, shown


def _findings(report: Report | None) -> list[str]:
    if report is None:
        return []
    from launcher.data.prepare.findings import findings

    return list(findings(report))


@cache
def _script() -> str:
    return Path(__file__).with_name("report.js").read_text(encoding="utf-8")


@cache
def _style() -> str:
    return Path(__file__).with_name("report.css").read_text(encoding="utf-8")
