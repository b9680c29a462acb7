"""What the pages share: the document around a page, its style, and numbers as people read them."""

from __future__ import annotations

import math
from collections.abc import Iterable
from html import escape
from typing import Any

SATURATED = {
    "kv-pool": "the KV pool is full",
    "max-running": "the engine serves as many requests at once as it may",
    "arrivals": "requests arrive faster than they are served",
}
EVIDENCE = {
    "measured": "Every price was measured on this machine.",
    "fitted": "Prices come from fits to measurements of this chip.",
    "datasheet": "Some prices rest on datasheet figures and on rates carried over from other chips, not on "
    "measurements of this one.",
    "assumed": "Some figures that went in are assumptions: of the engine's host time, or of the chip.",
}


def document(kicker: str, title: str, subtitle: str, sections: Iterable[str]) -> str:
    """A whole HTML page that needs nothing from elsewhere. title, subtitle: plain text. sections: HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>"
        f'<header><p class="kicker">{escape(kicker)}</p><h1>{escape(title)}</h1>'
        f'<p class="quiet">{escape(subtitle)}</p></header>{"".join(sections)}</main></body></html>\n'
    )


def section(title: str, body: str) -> str:
    """A heading over its body; nothing where there is no body."""
    return f"<section><h2>{title}</h2>{body}</section>" if body else ""


def cards(items: Iterable[tuple[str, str, str]]) -> str:
    """Large figures: (name, value, note)."""
    body = "".join(
        f'<div class="card"><p>{escape(name)}</p><strong>{escape(value)}</strong><p>{escape(note)}</p></div>'
        for name, value, note in items
    )
    return f'<div class="cards">{body}</div>'


def assumed_list(assumed: Iterable[str]) -> str:
    """What nobody gave, as a list under a heading; nothing where nothing was assumed."""
    lines = "".join(f"<li>{escape(line)}</li>" for line in assumed)
    return f"<p><b>Assumed for you</b>, since nothing says it:</p><ul>{lines}</ul>" if lines else ""


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def ms(value: float | None) -> str:
    """Milliseconds, as seconds from ten of them on."""
    if not finite(value):
        return "–"
    assert value is not None
    if value >= 10_000:
        return f"{value / 1e3:,.1f} s"
    return f"{value:,.0f} ms" if value >= 100 else f"{value:.3g} ms"


def count(value: float, unit: str = "") -> str:
    if not finite(value):
        return "–"
    return (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") + unit


def gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


SCREEN = '<details class="screen"><summary data-where="{}">'
"""Begins what opens on a screen, and of which paper has the summary and where else it is."""

# A phone, and paper: tables scroll in their place or wrap, what is folded is open on paper (of `details.screen` it has
# the summary, and where the rest is), and long lines are whole.
SMALL = """
@media(max-width:700px){main{padding:20px 14px 40px}h1{font-size:24px}
.card strong{font-size:22px;overflow-wrap:anywhere}
table{display:block;max-width:100%;overflow-x:auto}.figures th,.figures td{padding:6px 7px}
.figures th:first-child{white-space:normal;min-width:110px}.named th{min-width:150px}
.figures.reasons{display:table}.reasons td,.reasons th{overflow-wrap:anywhere}
.tiles{grid-template-columns:repeat(4,minmax(0,1fr))}.tile{overflow-wrap:anywhere}.node{min-width:0}
.bars .bar{min-width:80px}li,p,figcaption{overflow-wrap:anywhere}.two>*,.three>*,.cards>*,.mesh>*{min-width:0}}
@media print{:root{color-scheme:light}body{background:none;font-size:11pt}main{max-width:none;padding:0}
*{print-color-adjust:exact;-webkit-print-color-adjust:exact}
details::details-content{display:block;content-visibility:visible;height:auto}summary{list-style:none;font-weight:600}
details.screen::details-content{display:none}.screen>summary::after{content:": "attr(data-where)}
pre{max-height:none;overflow:visible;white-space:pre-wrap;overflow-wrap:anywhere;font-size:8pt}
table{max-width:100%;font-size:9pt}section{overflow:visible}
.figures th,.figures td,.bars th,.bars td{white-space:normal;padding:3px 5px;overflow-wrap:break-word}
.figures tbody th,.bars tbody th,.reasons td{overflow-wrap:anywhere}
.named th{min-width:0}.tiles{grid-template-columns:repeat(8,minmax(0,1fr))}.tile{overflow-wrap:anywhere}
.figures.choices th,.figures.choices td{overflow-wrap:normal;padding:3px}.choices .words{min-width:0}
.choices .quiet{font-size:8pt}.choices tbody th{white-space:normal}
h2,h3,summary{break-after:avoid}figure,.card,.node,tr{break-inside:avoid}}
"""

STYLE = (
    """
:root{color-scheme:light dark;--bg:#fbfbfa;--card:#fff;--ink:#1d2126;--quiet:#667079;--line:#e3e6e8;--warn:#b3261e;
--warnbg:#fdeceb;--good:#1d6f4a;--goodbg:#e7f5ee;--c0:#2f6fb5;--c1:#d9822b;--c2:#3a9a78;--c3:#9a5bb0;--c4:#c8566b;--c5:#6d7f2e;--c6:#4fa3c7;--c7:#a8763e;
--c8:#7a7f87;--c9:#cfd4d8}
@media screen and (prefers-color-scheme:dark){:root{
--bg:#15181c;--card:#1c2025;--ink:#e7eaed;--quiet:#98a2ab;--line:#31373d;
--warn:#ff9d94;--warnbg:#3a1f1d;--good:#7fd6ab;--goodbg:#16301f;--c0:#6aa5e3;--c1:#eda45c;--c2:#63c29f;--c3:#bf8bd3;--c4:#e5849a;--c5:#a9bb62;--c6:#7cc4e4;
--c7:#cba06b;--c8:#9aa1aa;--c9:#4a5158}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
main{max-width:1180px;margin:0 auto;padding:36px 28px 64px}
h1{font-size:30px;line-height:1.2;margin:2px 0 4px;letter-spacing:-.01em;overflow-wrap:anywhere}
h2{font-size:19px;margin:44px 0 12px;padding-top:14px;border-top:1px solid var(--line)}
h3,figcaption{font-size:14px;font-weight:600;margin:0 0 8px}
p{margin:6px 0}.quiet{color:var(--quiet);font-weight:400;font-size:14px}
.kicker{text-transform:uppercase;letter-spacing:.08em;font-size:12px;color:var(--quiet);margin:0}
.banner{background:var(--warnbg);color:var(--warn);border-left:4px solid var(--warn);padding:12px 16px;
border-radius:6px;margin:20px 0 0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(300px,100%),1fr));gap:14px;margin-top:24px}
.card,figure{background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px 18px;margin:0}
.card p{color:var(--quiet);font-size:13px;margin:0;min-height:1.5em}
.card strong{display:block;font-size:27px;font-weight:650;letter-spacing:-.02em;line-height:1.35;
font-variant-numeric:tabular-nums}
.two,.three{display:grid;gap:16px;grid-template-columns:repeat(auto-fit,minmax(min(440px,100%),1fr));margin-top:14px}
.three{grid-template-columns:repeat(auto-fit,minmax(min(320px,100%),1fr))}
figcaption{display:flex;justify-content:space-between;gap:12px;flex-wrap:wrap}
svg{display:block;width:100%;height:auto;overflow:visible}
svg text{fill:var(--quiet);font-size:12px;font-variant-numeric:tabular-nums}
.end{text-anchor:end}.mid,.none{text-anchor:middle}.none{font-size:14px}
.grid{stroke:var(--line)}.axis{stroke:var(--quiet)}.mark{stroke:var(--quiet);stroke-dasharray:3 4}
.line{fill:none;stroke:var(--c);stroke-width:1.8;stroke-linejoin:round}.area{fill:var(--c);opacity:.16}
.dots{fill:var(--c);opacity:.45}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
.figures th,.figures td{padding:7px 10px;border-bottom:1px solid var(--line);text-align:right;white-space:nowrap}
.figures th:first-child{text-align:left;padding-left:0}
.figures thead th{color:var(--quiet);font-weight:500;font-size:13px}
.bars th{text-align:left;font-weight:400;padding:3px 12px 3px 0;white-space:nowrap}
.bars td{text-align:right;padding:3px 0 3px 12px;white-space:nowrap}.bars .bar{width:55%;padding:0}
.bars b{display:block;height:14px;border-radius:3px;background:var(--c0);min-width:1px}
.stack{display:flex;height:30px;border-radius:6px;overflow:hidden;margin:4px 0 10px}.stack b{background:var(--c)}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;font-weight:400}
.legend i{display:inline-block;width:10px;height:10px;border-radius:2px;background:var(--c);margin-right:6px}
.legend em{font-style:normal;color:var(--quiet)}
.good{background:var(--goodbg);color:var(--good);border-left:4px solid var(--good);padding:12px 16px;border-radius:6px;
margin:14px 0 0}.answer{font-size:17px;max-width:none;margin:18px 0 6px}.narrow{width:auto}
figure{margin-top:14px}h3{margin-top:18px}
.figures th{font-weight:500}.named th{white-space:normal;min-width:260px}.figures.named thead th{min-width:0}
.reasons td,.reasons th{text-align:left;white-space:normal;vertical-align:top}
.mesh{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(500px,100%),1fr));gap:12px;margin:8px 0}
.node{border:1px solid var(--line);border-radius:10px;
padding:8px 10px 10px;background:var(--card)}.node p{margin:0 0 6px;color:var(--quiet);font-size:13px}
.tiles{display:grid;grid-template-columns:repeat(8,minmax(54px,1fr));gap:5px}
.tile{background:var(--c);color:#fff;border-radius:6px;padding:4px 5px;font-size:11px;line-height:1.3;min-height:46px}
.tile b{display:block;font-size:14px}
.heat{display:flex;align-items:flex-end;gap:2px;height:120px;position:relative}
.heat i{flex:1;background:var(--c1);border-radius:2px 2px 0 0}
.heat s{position:absolute;left:0;right:0;border-top:1px dashed var(--ink)}
.field{fill:var(--bg);stroke:var(--line)}.copies{fill:var(--c1)}
.choices thead th{white-space:normal;vertical-align:bottom}.choices tbody th,.choices tbody td{vertical-align:top}
.choices tbody th{white-space:nowrap}.choices .quiet{display:block}
.choices .words{white-space:normal;min-width:130px;text-align:left}
details{margin-top:10px}
ul{padding-left:20px;max-width:80ch}li{margin:6px 0}
pre{overflow:auto;max-height:480px;background:var(--card);border:1px solid var(--line);border-radius:10px;padding:14px;
font:12px/1.45 ui-monospace,Menlo,Consolas,monospace}summary{cursor:pointer}
"""
    + "".join(f".s{i}{{--c:var(--c{i})}}" for i in range(10))
    + SMALL
)
