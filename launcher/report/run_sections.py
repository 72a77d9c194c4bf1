"""The upper half of a run's page: how it ended, its figures, its plots, its time and what happened."""

from __future__ import annotations

import json
from datetime import datetime

import launcher
from launcher.plan.plan import Plan
from launcher.report.ending import Ending
from launcher.report.events import Event
from launcher.report.history import History
from launcher.report.markup import section
from launcher.report.outcome import (
    duration_s,
    energy_wh,
    figures,
    tokens_per_s,
    training_loss,
    useful_share,
)
from launcher.report.plots import Plot
from launcher.report.text import cut, escaped
from launcher.report.timeline import MEANINGS
from launcher.units import format_count, format_seconds

MOST_EVENTS = 200
"""Listed and drawn: the latest. A thousand spikes are no news."""
MOST_DETAIL = 20_000
"""Characters below a root cause: the last lines that its rank printed, each of which may be long."""


def header(plan: Plan, history: History, ended: Ending, sections: dict[str, str]) -> str:
    """Name, verdict, root cause, what was run, and links to the `sections` {id: title}."""
    trajectory, layout = plan.trajectory, plan.layout
    model = "a scratch model" if trajectory.model.source == "scratch" else trajectory.model.path
    began = f"{datetime.fromtimestamp(history.begin).astimezone():%Y-%m-%d %H:%M %Z}" if history.begin else "not begun"
    size = (history.last_start or {}).get("world_size", layout.workers)
    kind = "GPU" if layout.device == "cuda" else "CPU worker"
    facts = [
        f"{trajectory.method.kind} fine-tune of {model}",
        f"{trajectory.dtype}, ZeRO {layout.zero}, {size} {kind}{'s' * (size > 1)}",
        began,
    ]
    told = cut(ended.detail, MOST_DETAIL) if ended.state == "failed" else ""
    detail = f"<pre>{escaped(told)}</pre>\n" if told else ""
    hint = f'<p class="faint">{escaped(ended.hint)}</p>\n' if ended.hint else ""
    links = "".join(f'<a href="#{identity}">{escaped(title)}</a>' for identity, title in sections.items())
    chip = f'<span class="state {ended.state}">{ended.state}</span>'
    return (
        f'<header class="{ended.state}">\n<h1>{escaped(plan.name)}{chip}</h1>\n'
        f'<p class="verdict">{escaped(cut(ended.words))}</p>\n{detail}{hint}'
        f'<p class="faint">{escaped(" · ".join(facts))}</p>\n<nav aria-label="Sections">{links}</nav>\n</header>'
    )


def tiles(plan: Plan, history: History) -> str:
    """The numbers that everybody asks for first."""
    found: list[tuple[str, str, str]] = []
    launches = history.timeline.launches
    total = plan.lifecycle.total_steps
    found.append(("Duration", format_seconds(duration_s(history)), f"in {launches} launches" if launches > 1 else ""))
    epochs = f"{history.epoch:.3g} epochs" if history.epoch else ""
    found.append(("Steps", f"{history.step:,}", f"of {total:,}" + (f", {epochs}" if epochs else "")))
    if (loss := training_loss(history)) is not None:
        found.append(("Training loss", f"{loss:.4g}", f"{history.steps['loss'].first:.4g} at first"))
    measured = {figure.name: figure for figure in figures(history)}
    if (held_out := measured.get("held-out loss")) is not None:
        best = f"best {held_out.best:.4g} at step {held_out.best_step:,}"
        found.append(("Held-out loss", f"{held_out.last:.4g}", best))
    if (rate := tokens_per_s(history)) is not None:
        found.append(("Tokens/s", format_count(rate), f"{format_count(history.tokens)} tokens"))
    if (share := useful_share(history)) is not None:
        found.append(("Time that trained", f"{share:.0%}", "goodput"))
    if (energy := energy_wh(history)) is not None:
        found.append(
            ("Energy", f"{energy / 1000:.3g} kWh" if energy >= 1000 else f"{energy:.3g} Wh", "as drivers tell")
        )
    inner = "\n".join(
        f'<div class="tile"><dt>{name}</dt><dd class="value">{escaped(value)}</dd>'
        f'<dd class="note">{escaped(note)}</dd></div>'
        for name, value, note in found
    )
    return f'<dl class="tiles">\n{inner}\n</dl>'


def results(history: History) -> str:
    """Each measurement before, at its best and after."""
    lines = []
    for figure in figures(history):
        kind = "good-words" if figure.gain > 0 else "bad-words" if figure.gain < 0 else "faint"
        change = figure.last - figure.first
        cells = [
            _at(figure.first, figure.first_step, figure.share),
            _at(figure.best, figure.best_step, figure.share),
            _at(figure.last, figure.last_step, figure.share),
            f'<span class="{kind}">{_value(change, figure.share, "+")}</span>',
        ]
        row = "".join(f'<td class="r">{cell}</td>' for cell in cells)
        way = "smaller is better" if figure.smaller_is_better else "greater is better"
        lines.append(f'<tr><th scope="row" title="{way}">{escaped(figure.name)}</th>{row}</tr>')
    if not lines:
        return ""
    head = "".join(f'<th scope="col" class="r">{name}</th>' for name in ("first", "best", "last", "change"))
    content = "\n".join(lines)
    table = f"<thead><tr><th></th>{head}</tr></thead>\n<tbody>\n{content}\n</tbody>"
    return section("results", "Before and after", f'<div class="scroll"><table class="figures">\n{table}</table></div>')


def _at(value: float, step: int, share: bool) -> str:
    return f'{_value(value, share)} <span class="faint at">at {step:,}</span>'


def _value(value: float, share: bool, sign: str = "") -> str:
    return f"{100 * value:{sign}.1f}%" if share else f"{value:{sign}.4g}"


def plot_section(found: list[Plot]) -> str:
    """Where the page's script draws."""
    if not found:
        return section("plots", "Plots", "<p>No step has been done yet.</p>")
    inner = "\n".join(map(_figure, found))
    note = '<noscript><p class="faint">A script in this page draws the plots; it does not run here.</p></noscript>'
    return section("plots", "Plots", f'{note}\n<div class="plots">\n{inner}\n</div>')


def _figure(plot: Plot) -> str:
    button = '<button type="button" aria-pressed="false">log</button>' if plot.log and _all_positive(plot) else ""
    return (
        f'<figure class="plot{" wide" if plot.wide else ""}" id="plot-{plot.id}">\n'
        f'<figcaption>{escaped(plot.title)}<span class="legend"></span>{button}</figcaption>\n'
        f'<div class="canvas"><svg role="img" tabindex="0" aria-label="{escaped(plot.summary)}"></svg></div>\n</figure>'
    )


def _all_positive(plot: Plot) -> bool:
    return all(value is None or value > 0 for line in plot.lines for value in line.y)


def numbers(found: list[Plot], history: History) -> str:
    """What the page's script draws, as inert JSON: `<` is written so that no text in it can end the element."""
    events = [
        {
            "step": event.step if event.step is not None else history.step_at(event.time),
            "seconds": round(event.time - history.begin, 1),
            "words": event.words,
            "tone": event.tone,
        }
        for event in history.events[-MOST_EVENTS:]
    ]
    value = {"plots": [plot.as_dict() for plot in found], "events": events}
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return f'<script type="application/json" id="numbers">{text.replace("<", chr(92) + "u003c")}</script>'


def time_section(history: History) -> str:
    """Goodput, as a bar and in seconds."""
    spent = {kind: seconds for kind, seconds in history.timeline.seconds().items() if seconds >= 0.05}
    total = sum(spent.values())
    if not total:
        return ""
    colours = dict(zip(MEANINGS, ("c2", "c0", "c3", "c5", "c1"), strict=True))
    shares = {kind: seconds / total for kind, seconds in spent.items()}
    bar = "".join(
        f'<span class="{colours[kind]}" style="width:{100 * share:.2f}%" title="{kind}: {share:.1%}"></span>'
        for kind, share in shares.items()
    )
    said = ", ".join(f"{kind} {share:.0%}" for kind, share in shares.items())
    rows = "\n".join(
        f'<tr><th scope="row"><span class="swatch {colours[kind]}"></span>{kind}</th>'
        f'<td class="r">{format_seconds(seconds)}</td><td class="r">{shares[kind]:.1%}</td>'
        f'<td class="faint meaning">{MEANINGS[kind]}</td></tr>'
        for kind, seconds in spent.items()
    )
    return section(
        "time",
        "Where the time went",
        f'<div class="time" role="img" aria-label="{said}">{bar}</div>\n'
        f'<div class="scroll"><table class="figures">\n<tbody>\n{rows}\n</tbody></table></div>',
    )


def event_section(history: History) -> str:
    """What happened, the latest last."""
    if not history.events:
        return section("events", "What happened", '<p class="faint">Nothing out of the ordinary.</p>')
    left_out = len(history.events) - MOST_EVENTS
    more = f'<p class="faint">{left_out:,} earlier ones are not shown.</p>\n' if left_out > 0 else ""
    items = "\n".join(_event(event, history) for event in history.events[-MOST_EVENTS:])
    return section("events", "What happened", f'{more}<ol class="events">\n{items}\n</ol>')


def _event(event: Event, history: History) -> str:
    step = event.step if event.step is not None else history.step_at(event.time)
    return (
        f'<li class="{event.tone}"><span class="when">{format_seconds(max(event.time - history.begin, 0))}</span>'
        f'<span class="when">step {step:,}</span><span class="said">{escaped(event.words)}</span></li>'
    )


def footer(plan: Plan) -> str:
    """Where the run is, and what made the page."""
    said = f"{plan.location} · trained by Slipway {plan.version}, this page made by Slipway {launcher.__version__}"
    return f'<footer><p class="faint">{escaped(said)}</p></footer>'
