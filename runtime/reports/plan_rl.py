"""The page of a split between rollouts and training: `glm5 plan rl --html FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from foundation.writing import replacing
from runtime.planning.rl.answer import Priced, RlPlan, RlTimeline
from runtime.reports.page import assumed_list, cards, count, document, gb, section
from runtime.reports.svg import Mark, Series, legend, number, plot, stacked, ticks

_LANES = ("training", "waiting", "sending")
_WIDTH, _LEFT, _RIGHT, _HEIGHT = 760.0, 86.0, 14.0, 96.0


def write_page(path: Path, plan: RlPlan) -> None:
    """Writes the page, whole or not at all. Raises `UsageError` where the file cannot be written."""
    with replacing(path) as temporary:
        temporary.write_text(page(plan), encoding="utf-8")


def page(plan: RlPlan) -> str:
    """The page's HTML."""
    train, there, got, asked = plan.trainer, plan.rollouts, plan.figures, plan.asked
    low, high = got.samples_per_s_band
    figures = cards(
        [
            ("samples a second", count(got.samples_per_s), f"{low:.3g} to {high:.3g} nine times in ten"),
            ("a step", f"{got.step_seconds:,.1f} s", f"{train.step_seconds:.3g} s of training"),
            ("training side idle", f"{got.trainer['waiting']:.1%}", f"{train.devices} x {train.profile}"),
            ("rollout side idle", f"{got.rollouts['idle']:.1%}", f"{there.devices} x {there.profile}"),
            ("versions behind", f"{got.mean_behind:.2f}", f"on average, of at most {asked['staleness']}"),
            ("weights on their way", f"{plan.sync.seconds:.3g} s", f"{plan.sync.bytes / 1e9:,.0f} GB a replica"),
        ]
    )
    subtitle = (
        f"{asked['groups']} groups of {asked['group_size']} answers a step, {asked['mean_drawn_tokens']:,.0f} tokens "
        f"each on average and {asked['longest_tokens']:,} at most; {asked['mode']}"
    )
    sections = [
        figures,
        section("What happens when", timeline(plan.timeline)),
        section("How far behind", _behind(plan)),
        section("What a training step is made of", _parts(train.parts)),
        section("Memory of a device", _memory(plan)),
        section("Splits that were played", _played(plan)),
        section("How sure this is", _sure(plan)),
    ]
    return document("Rollouts and training", plan.model, subtitle, sections)


def timeline(found: RlTimeline) -> str:
    """The training side as a lane, arrivals of versions as marks, and answers over time below."""
    across = _WIDTH - _LEFT - _RIGHT
    scale = across / found.seconds if found.seconds else 0.0

    def at(time: float) -> float:
        return round(_LEFT + time * scale, 1)

    out = [f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="training side over time">']
    out.append(f'<text class="tick end" x="{_LEFT - 8}" y="32">training</text>')
    out.append(f'<text class="tick end" x="{_LEFT - 8}" y="62">versions</text>')
    for doing, begin, end in found.spans:
        width = max(round((end - begin) * scale, 1), 0.4)
        out.append(
            f'<rect class="dots s{_LANES.index(doing)}" x="{at(begin)}" y="16" width="{width}" height="24">'
            f"<title>{doing} {end - begin:,.1f} s</title></rect>"
        )
    out += [f'<line class="axis" x1="{at(t)}" x2="{at(t)}" y1="50" y2="66"/>' for t in found.arrivals]
    for time in (each for each in ticks(0.0, found.seconds, 6) if each <= found.seconds):
        out.append(f'<text class="tick mid" x="{at(time)}" y="86">{number(time)}</text>')
    lane = "".join([*out, "</svg>"])
    drawing = Series("being drawn", [(t, float(n)) for t, n, _ in found.levels], "stairs")
    outside = Series("with environments", [(t, float(n)) for t, _, n in found.levels], "stairs")
    shown = [drawing, outside] if any(n for *_, n in found.levels) else [drawing]
    marks = [Mark(t, "") for t in found.arrivals[:60]]
    curve = plot(shown, "seconds", "answers", width=int(_WIDTH), height=240, marks=marks)
    return (
        f"<figure><figcaption>Training side, and new versions in place {legend(_LANES)}</figcaption>{lane}</figure>"
        f"<figure><figcaption>Answers at work {legend([each.name for each in shown])}</figcaption>{curve}</figure>"
    )


def _behind(plan: RlPlan) -> str:
    bars = "".join(
        f'<tr><th>{versions}</th><td class="bar"><b style="width:{100 * share:.1f}%"></b></td><td>{share:.1%}</td></tr>'
        for versions, share in plan.figures.behind.items()
    )
    thrown = plan.figures.thrown_away_share
    return (
        '<p class="quiet">Trained tokens by the versions between the one that drew them and the step that learnt from '
        f'them. Thrown away: {thrown:.1%} of drawn tokens.</p><table class="bars"><tbody>{bars}</tbody></table>'
    )


def _parts(parts: Sequence[Priced]) -> str:
    return stacked([(each.name, each.seconds, f"{each.seconds:.3g} s, {each.evidence}") for each in parts])


def _memory(plan: RlPlan) -> str:
    found = []
    for name, side in (("training", plan.trainer), ("rollouts", plan.rollouts)):
        parts = [(part, size, gb(size)) for part, size in side.memory_bytes.items()]
        free = side.usable_bytes - sum(side.memory_bytes.values())
        found.append(f"<h3>{name}, {escape(side.profile)}</h3>{stacked([*parts, ('free', free, gb(max(free, 0.0)))])}")
    return "".join(found)


def _played(plan: RlPlan) -> str:
    heads = "training + rollouts", "layouts", "samples/s", "training idle", "rollouts idle", "behind"
    head = "".join(f"<th>{each}</th>" for each in heads)
    body = "".join(
        f"<tr><th>{row.train_devices} + {row.rollout_devices}</th>"
        f"<td>{escape(row.train_layout)}; {row.replicas} x {escape(row.rollout_layout)}</td>"
        f"<td>{row.samples_per_s:.3g}</td>"
        f"<td>{row.trainer_idle:.1%}</td><td>{row.rollouts_idle:.1%}</td><td>{row.mean_behind:.2f}</td></tr>"
        for row in plan.played
    )
    return f'<table class="figures"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'


def _sure(plan: RlPlan) -> str:
    train, there = plan.trainer, plan.rollouts
    (fast, slow), (low, high) = train.step_band_seconds, there.token_band_seconds
    return (
        f"<p>Training steps: {escape(train.evidence)}, {train.step_seconds:.3g} s, expected within {fast:.3g} to "
        f"{slow:.3g} s nine times in ten ({escape(train.band_basis)}). "
        f"Rollout steps: {escape(there.evidence)}, {there.token_seconds * 1e3:.3g} ms when full, expected within "
        f"{low * 1e3:.3g} to {high * 1e3:.3g} ms ({escape(there.band_basis)}). Weights: "
        f"{escape(plan.sync.evidence)}, without a band.</p>{assumed_list(plan.assumed)}"
    )
