"""A page in a real browser: what is wider than the screen, and what stays folded or cut on paper."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

BROWSER = next(
    (path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None
)
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium, to lay a page out")
PHONE, PAPER = 390, 700  # CSS pixels; A4 between the usual margins

# In a frame of that width: what ends beyond the right edge, what is cut off by its own box, which figures and short
# words of tables go on in the next line, what stays folded.
_MEASURE = r"""
const frame = document.querySelector("iframe");
frame.onload = () => {
  const inside = frame.contentDocument, view = frame.contentWindow, all = [...inside.querySelectorAll("body *")];
  const name = e => e.tagName.toLowerCase() + "." + (e.getAttribute("class") || "");
  const scrolls = e => e && e !== inside.body && e !== inside.documentElement &&
    (["auto", "scroll", "hidden"].includes(view.getComputedStyle(e).overflowX) || scrolls(e.parentElement));
  const beyond = e => e.getBoundingClientRect().right > inside.documentElement.clientWidth + 1;
  const wide = e => e.clientWidth && e.scrollWidth > e.clientWidth + 1
    && view.getComputedStyle(e).overflowX !== "visible";
  const high = e => e.clientHeight && e.scrollHeight > e.clientHeight + 1
    && view.getComputedStyle(e).overflowY !== "visible";
  const closed = e => e.getClientRects().length === 0 || !e.checkVisibility({contentVisibilityAuto: true});
  const words = node => [...node.data.matchAll(/[\w.,%]{1,12}(?![\w.,%])/g)].filter(m => {
    if (m.index && /[\w.,%]/.test(node.data[m.index - 1])) return false;
    const range = inside.createRange();
    range.setStart(node, m.index);
    range.setEnd(node, m.index + m[0].length);
    return new Set([...range.getClientRects()].map(r => Math.round(r.top))).size > 1;
  }).map(m => m[0]);
  const split = cell => {
    const walk = inside.createTreeWalker(cell, NodeFilter.SHOW_TEXT), all = [];
    while (walk.nextNode()) all.push(...words(walk.currentNode));
    return all;
  };
  const found = {
    width: inside.documentElement.clientWidth,
    page: inside.documentElement.scrollWidth,
    height: inside.body.scrollHeight,
    run_off: all.filter(e => !e.closest("svg") && beyond(e) && !scrolls(e.parentElement)).map(name),
    cut: all.filter(wide).concat(all.filter(high)).map(name),
    folded: [...inside.querySelectorAll("details:not(.screen) > :not(summary)")].filter(closed).map(name),
    split: [...inside.querySelectorAll("td, thead th")].flatMap(split),
    folds: inside.querySelectorAll("details").length,
  };
  document.title = JSON.stringify(found);
};
frame.srcdoc = PAGE;
"""


def laid_out(html: str, width: int, folder: Path, paper: bool = False) -> dict[str, Any]:
    """What `_MEASURE` finds of a page that is `width` CSS pixels wide; on `paper`, by the rules for print."""
    if paper:
        html = html.replace("@media print", "@media all").replace("@media screen", "@media not all")
    script = _MEASURE.replace("PAGE", json.dumps(html).replace("</", "<\\/"))
    outer = folder / "outer.html"
    outer.write_text(
        f'<!doctype html><meta charset="utf-8"><title></title><iframe style="width:{width}px;height:900px;border:0">'
        f"</iframe><script>{script}</script>",
        encoding="utf-8",
    )
    assert BROWSER
    options = ("--headless", "--no-sandbox", "--disable-gpu", "--window-size=1000,1000", "--virtual-time-budget=2000")
    done = subprocess.run(
        [BROWSER, *options, f"--user-data-dir={folder / 'profile'}", "--dump-dom", outer.as_uri()],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    title = re.search(r"<title>(.+?)</title>", done.stdout)
    assert title, done.stderr[-2000:]
    return json.loads(unescape(title[1]))


def check(html: str, folder: Path) -> None:
    """On a phone nothing runs off the page; on paper nothing is folded or cut off, and nothing runs off either."""
    phone = laid_out(html, PHONE, folder)
    assert phone["page"] <= phone["width"] and phone["run_off"] == [], phone
    paper = laid_out(html, PAPER, folder, paper=True)
    assert paper["page"] <= paper["width"] and paper["run_off"] == [], paper
    assert paper["folded"] == [] and paper["cut"] == [] and paper["split"] == [], paper
