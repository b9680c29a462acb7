"""The page of a comparison of number formats: `glm5 compare --html FILE`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

import numpy as np

from runtime.reports import svg
from runtime.reports.page import SCREEN, document
from runtime.reports.page import section as _section
from runtime.reports.svg import Series

BASELINE = "bf16"
"""The row of 16 bits alone, which every comparison has."""
_COLUMNS = (
    ("Same token", "top1_agreement", "positions of the text where the likeliest next token is float32's"),
    ("KL", "kl", "mean divergence of the next-token distribution, in nats; 0 is identical"),
    ("Logit error", "logit_error", "size of the change of the logits, relative to their own size"),
    ("Perplexity", "perplexity", "how well the text is predicted; float32's is the goal, not the least"),
    ("Experts", "routing", "routed experts of a token that float32 chose too, mean over layers"),
    ("Selection", "selection", "context positions picked by the indexer that float32 picked too"),
    ("First other token", "first", "where greedy text first leaves float32's, the earliest of the prompts"),
)

FOREIGN = 512  # perplexity of a text from which on a model is said not to know it


_JSON = SCREEN.format("glm5 compare --json prints it")


def page(result: Mapping[str, Any]) -> str:
    """The page's HTML. result: the JSON object of `glm5 compare`."""
    title = f"{result['model']}: number formats against float32"
    subtitle = (
        f"{result['text_tokens']:,} tokens of {result['text']} in windows of {result['window_tokens']:,}, and "
        f"{result['prompts']} prompts continued by {result['continued_tokens']} tokens · "
        f"weights stored as {result['stored_as']}"
    )
    sections = [
        f'<p class="banner">{escape(warning)}</p>' if (warning := foreign_text(result)) else "",
        _section("In short", _short(result)),
        _section("All figures", _table(result) + _legend_of_table()),
        _section("Where it comes from", _layers(result)),
        _section("How it is spread over the text", _spread(result)),
        _section("Experts and selection", _choices(result)),
        _section("Where the text would change", _firsts(result)),
        _section("Right answers", _tasks(result)),
        _section("What runs in which format", _formats(result)),
        _section("What this does not show", _limits()),
        _section("JSON", f"{_JSON}Everything measured</summary><pre>{_json(result)}</pre></details>"),
    ]
    return document("Number formats", title, subtitle, [f"<style>{_STYLE}</style>", *sections])


def _json(result: Mapping[str, Any]) -> str:
    return escape(json.dumps(result, indent=2, default=str, ensure_ascii=False))


# --- names and numbers -----------------------------------------------------------------------------------


def _name(row: Mapping[str, Any]) -> str:
    """A row's name as people read it: chip and formats, without repeating what the label has."""
    if row["profile"] is None:
        return "16 bits alone"
    cache = "" if row["cache"] in ("bf16", "f32") else f", {row['cache']} cache"
    return f"{row['profile']}, {row['formats']}{cache}"


def _percent(share: float | None, digits: int = 1) -> str:
    return "–" if share is None else f"{share:.{digits}%}"


def _small(value: float) -> str:
    return f"{value:.2g}" if value < 0.01 else f"{value:.3f}"


def _perplexity(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3f}"


def _mean(row: Mapping[str, Any], key: str) -> float | None:
    values = [layer[key] for layer in row["layers"] if layer[key] is not None]
    return sum(values) / len(values) if values else None


def _earliest(row: Mapping[str, Any]) -> int | None:
    return min((first["at"] for first in row["first_difference"] if first["at"] is not None), default=None)


def _drift(row: Mapping[str, Any], reference: float) -> str:
    change = row["perplexity"] / reference - 1
    return "unchanged" if abs(change) < 5e-5 else f"{change:+.2%}"


# --- sections --------------------------------------------------------------------------------------------


def foreign_text(result: Mapping[str, Any]) -> str:
    """What to know of figures from a text that the model does not predict; empty where it does."""
    if result["reference"]["perplexity"] < FOREIGN:
        return ""
    return (
        f"This model does not predict this text (perplexity {_perplexity(result['reference']['perplexity'])}): it was "
        "not trained on it, or not at all. Errors and choices below are as they are; agreement of tokens and changes "
        "of perplexity mean little where every token is a guess. --text names another."
    )


def _short(result: Mapping[str, Any]) -> str:
    reference = result["reference"]["perplexity"]
    rows = result["profiles"]
    wide = rows[0]
    cards = ""
    for row in rows[1:]:
        first = _earliest(row)
        index, _ = worst_layer(row)
        lines = [
            f"perplexity {_perplexity(reference)} → {_perplexity(row['perplexity'])} ({_drift(row, reference)})",
            f"KL {_small(row['kl_nats']['mean'])} nats, {_times(row, wide)} of 16 bits alone",
            "no prompt's text changes" if first is None else f"a prompt's text changes at token {first + 1}",
            f"layer {index} adds most of the error",
        ]
        body = "".join(f"<li>{escape(line)}</li>" for line in lines)
        cards += (
            f'<div class="card"><p>{escape(_name(row))}</p><strong>{_percent(row["top1_agreement"])}</strong>'
            f'<p>of positions have float32\'s token</p><ul class="facts">{body}</ul></div>'
        )
    text = (
        f"<p>16 bits alone, before any narrow format, keep {_percent(wide['top1_agreement'])} of the tokens "
        f"(KL {_small(wide['kl_nats']['mean'])} nats): what the cards show beyond that is the formats' doing.</p>"
    )
    return f'<div class="cards">{cards}</div>{text}'


def _times(row: Mapping[str, Any], wide: Mapping[str, Any]) -> str:
    base = wide["kl_nats"]["mean"]
    return f"{row['kl_nats']['mean'] / base:.1f} times that" if base > 0 else "more than the 0"


def _table(result: Mapping[str, Any]) -> str:
    reference = result["reference"]["perplexity"]
    shown = [c for c in _COLUMNS if c[1] != "selection" or any(_mean(r, "selection") for r in result["profiles"])]
    shown = [c for c in shown if c[1] != "routing" or any(_mean(r, "routing") for r in result["profiles"])]
    head = "".join(f'<th title="{escape(meaning, quote=True)}">{name}</th>' for name, _, meaning in shown)
    body = ""
    for row in result["profiles"]:
        first = _earliest(row)
        cells = {
            "top1_agreement": _percent(row["top1_agreement"], 2),
            "kl": f"{_small(row['kl_nats']['mean'])} <em>1 in 100 above {_small(row['kl_nats']['p99'])}</em>",
            "logit_error": _percent(row["logit_error"], 2),
            "perplexity": f"{_perplexity(row['perplexity'])} <em>{_drift(row, reference)}</em>",
            "routing": _percent(_mean(row, "routing"), 2),
            "selection": _percent(_mean(row, "selection"), 2),
            "first": "never" if first is None else f"{first + 1} of {result['continued_tokens']}",
        }
        marks = "".join(f"<td>{cells[key]}</td>" for _, key, _ in shown)
        body += f"<tr><th>{escape(_name(row))}</th>{marks}</tr>"
    return f'<table class="figures"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'


def _legend_of_table() -> str:
    items = "".join(f"<li><b>{name}</b>: {meaning}.</li>" for name, _, meaning in _COLUMNS)
    return f'<details class="quiet"><summary>What the columns mean</summary><ul>{items}</ul></details>'


def _names(rows: Sequence[Mapping[str, Any]]) -> str:
    return svg.legend([_name(row) for row in rows])


def _layers(result: Mapping[str, Any]) -> str:
    rows = result["profiles"]
    lines = [Series(_name(r), [(x["layer"], x["hidden_error"]) for x in r["layers"]]) for r in rows]
    drawn = svg.plot(lines, "layer", "relative error", 1080, 280, percent=True)
    kinds = result["reference"]["layers"]
    told = "; ".join(
        f"{_name(row)}: layer {index} ({kinds[index]}) adds most, {added:.1%}"
        for row in rows[1:]
        for index, added in [worst_layer(row)]
    )
    return (
        f"<figure><figcaption>Error of the residual stream after each layer {_names(rows)}</figcaption>{drawn}</figure>"
        '<p class="quiet">rms of the difference from float32, relative to the rms of the stream. A layer that lifts '
        f"its line off the others is where to look first. {escape(told)}.</p>"
    )


def _spread(result: Mapping[str, Any]) -> str:
    rows = result["profiles"]
    lines = [Series(_name(r), [(100 * q, kl) for q, kl in r["kl_quantiles"] if q < 0.985]) for r in rows]
    drawn = svg.plot(lines, "share of positions, %", "KL, nats", 1080, 260)
    return (
        f"<figure><figcaption>KL that this share of positions stays below {_names(rows)}</figcaption>{drawn}</figure>"
        '<p class="quiet">A line that is flat and rises at the right end means a few positions carry the damage: '
        "near-ties, or experts that changed. A line that rises early means everything shifted a little.</p>"
    )


def _choices(result: Mapping[str, Any]) -> str:
    rows, figures = result["profiles"], ""
    for key, title in (("routing", "Experts chosen differently"), ("selection", "Context chosen differently")):
        lines = [Series(_name(r), [(x["layer"], 1 - x[key]) for x in r["layers"] if x[key] is not None]) for r in rows]
        if any(line.points for line in lines):
            drawn = svg.plot(lines, "layer", "share", 540, 260, percent=True)
            figures += f"<figure><figcaption>{title} {_names(rows)}</figcaption>{drawn}</figure>"
    if not figures:
        return ""
    topk = result["index_topk"]
    about = (
        f" Selection is measured at positions beyond the first {topk:,}, where there is more context than the {topk:,} "
        "positions that the indexer keeps; layers that share a selection have none of their own."
        if topk and result["window_tokens"] > topk
        else " The windows are no longer than the indexer's selection, so it takes everything and cannot differ: give "
        "a longer --text and --window."
        if topk
        else ""
    )
    return (
        f'<div class="two">{figures}</div><p class="quiet">Share of a token\'s experts, and of its selected context, '
        f"that float32 did not choose. An expert with a share near the cut changes easily and matters little."
        f"{about}</p>"
    )


def _firsts(result: Mapping[str, Any]) -> str:
    blocks = ""
    for i, prompt in enumerate(result["profiles"][0]["first_difference"]):
        body = ""
        for row in result["profiles"]:
            first = row["first_difference"][i]
            if first["at"] is None:
                body += f"<tr><th>{escape(_name(row))}</th><td>never</td><td>the same text</td><td></td></tr>"
                continue
            wanted, got = first["reference"], first["found"]
            body += (
                f"<tr><th>{escape(_name(row))}</th><td>{first['at'] + 1}</td>"
                f"<td>…{_token(first['before'])} <b>{_token(got['text'])}</b> for {_token(wanted['text'])}</td>"
                f"<td>{_percent(got['p'])} and {_percent(wanted['p'])}</td></tr>"
            )
        blocks += (
            f'<h3>{_token(prompt["prompt"])}</h3><p class="quiet">float32 continues: {_token(prompt["text"])}</p>'
            '<table class="figures words"><thead><tr><th></th><th>token</th><th>this one for float32\'s</th>'
            f"<th>float32 gives them</th></tr></thead><tbody>{body}</tbody></table>"
        )
    note = (
        '<p class="quiet">Greedy decoding. The last column tells a near-tie, which any rounding may tip, from '
        "a change of mind. After the first other token the texts are no longer comparable, so none is counted.</p>"
    )
    return note + blocks


def _token(text: str) -> str:
    return f"<q>{escape(text)}</q>".replace("\n", "⏎")


def _tasks(result: Mapping[str, Any]) -> str:
    reference = result["reference"].get("tasks")
    if not reference:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in reference)
    rows = [("float32", reference)] + [(_name(row), row["tasks"]) for row in result["profiles"]]
    body = "".join(
        f"<tr><th>{escape(name)}</th>" + "".join(f"<td>{_percent(scores[t], 0)}</td>" for t in reference) + "</tr>"
        for name, scores in rows
    )
    return (
        '<p class="quiet">Held-out questions of <code>glm5 eval</code>, answered by greedy decoding in each format.</p>'
        f'<table class="figures"><thead><tr><th></th>{head}</tr></thead><tbody>{body}</tbody></table>'
    )


def _formats(result: Mapping[str, Any]) -> str:
    out = ""
    for row in result["profiles"]:
        if row["label"] == BASELINE and row["profile"] is None:
            continue
        lines = "".join(
            f"<tr><th>{escape(_role(line['role']))}</th><td><code>{escape(line['op'])}</code></td>"
            f"<td>{escape(', '.join(line['weights']))}</td><td>{escape(line['kept_in'])}</td>"
            f"<td>{escape(line['activations'])}</td></tr>"
            for line in row["table"]
        )
        out += (
            f'<details><summary>{escape(_name(row))}</summary><table class="figures words"><thead><tr><th></th>'
            "<th>op</th><th>weights</th><th>kept in</th><th>activations</th></tr></thead>"
            f"<tbody>{lines}</tbody></table></details>"
        )
    note = (
        '<p class="quiet">Norms, rotary embeddings, softmax and routing are computed in float32 everywhere; products '
        "are summed in float32, and results rounded to 16 bits.</p>"
    )
    return out + note


def _role(name: str) -> str:
    return {"wide": "never quantised", "kv_up": "kv_b_proj"}.get(name, name.replace("_", " "))


def _limits() -> str:
    return (
        "<ul><li>Weights were rounded to nearest. A vendor's checkpoint that was smoothed, rotated or trained for its "
        "format does better: compare that checkpoint itself, its own scales are used.</li>"
        "<li>Sums are taken in float32 in one order. A chip sums in another order, and some keep fewer bits inside a "
        "block; two runs on the chip itself may differ by as much as 16 bits do here.</li>"
        "<li>Only formats are emulated: two chips with the same formats show the same figures.</li></ul>"
    )


_STYLE = """
.facts{list-style:none;padding:0;margin:8px 0 0;color:var(--quiet);font-size:13px}.facts li{margin:3px 0}
.figures em{font-style:normal;color:var(--quiet);font-size:12px;margin-left:6px}
.words td,.words th{text-align:left;white-space:normal}
q{quotes:none;background:color-mix(in srgb,var(--quiet) 14%,transparent);border-radius:4px;padding:0 4px;
white-space:pre-wrap}
details{margin:8px 0}code{font:12px ui-monospace,Menlo,Consolas,monospace}@media screen{section{overflow-x:auto}}
"""


def worst_layer(row: dict[str, Any]) -> tuple[int, float]:
    """The layer that adds most to the relative error of the residual stream, and how much it adds."""
    errors = np.array([layer["hidden_error"] for layer in row["layers"]])
    added = np.diff(errors, prepend=0.0)
    return int(np.argmax(added)), float(added.max())
