"""Writes docs/formats.md from the records: matrix formats, schemes, rows of caches, and what engines keep where.

    python -m tools.docs_formats [FILE]      [default: docs/formats.md]

The records are `model/formats.py` and the `[cache]` sections of `runtime/deployment/engines/*.toml`; what an engine
keeps on a chip is what `glm5 model glm-5 --engine .. --profile ..` says.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from foundation.reading import read_toml
from model.config import Mla
from model.formats import FORMATS, ROWS, SCHEMES, MatrixFormat, matrix_format
from model.hf_config import load_config
from runtime.cli.model import engine_cache
from runtime.deployment import engines
from tools import page

DEFAULT = Path(__file__).resolve().parent.parent / "docs" / "formats.md"
ENGINES = Path(engines.__file__).parent
MODEL = "glm-5"
CHIPS = {
    "sglang": ("h200-sxm", "b200-sxm", "ascend-910c-die"),
    "vllm": ("h200-sxm", "b200-sxm"),
    "trtllm": ("h200-sxm", "b200-sxm"),
    "vllm-ascend": ("ascend-910c-die",),
}
"""Chips on which the last table shows an engine."""
ROLES = {"kv_up": "`kv_b_proj`", "index_key": "the indexer's `wk`", "mtp": "the MTP layer"}

PAGE = """# Table of number formats

<!-- made by `python -m tools.docs_formats`; do not edit -->

The records of `model/formats.py` and of the engines' descriptions, as tables. What is done with them, and what was
checked: [number_formats.md](number_formats.md).

## Matrices
Bits a weight count scales of blocks and groups; those of rows and whole matrices add less than 0.1 %. `w4a16-gN` and
`w4afp8-gN` have groups of N. Embedding, head, router, norms, biases, the indexer's `weights_proj` and the MTP layer's
`eh_proj` are never narrowed.

{}

{}

## Schemes
What `--formats` takes: two formats by one name. `DENSE/EXPERTS` names any other two.

{}

## Rows of caches
Bytes of a token's row in a layer of GLM-5: a latent of 512 and a rotary key of 64, an index key of 128.

{}

## Engines
What each engine keeps a cache in; `kv` is what it picks when told nothing, `sized_latent` the row that its pool is
sized with. Conditions: kv, what was asked for; sparse, attention to a selection; family, of the chip; fp8, whether the
chip keeps caches in FP8.

{}

## GLM-5 by engine and chip
`glm5 model glm-5 --engine ENGINE --profile CHIP`: bytes a token over all layers, on each tp rank.

{}
"""


def table(*columns: str, rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(line)} |" for line in (columns, *rows)]
    return "\n".join([lines[0], "|" + "---|" * len(columns), *lines[1:]])


def scale_text(fmt: MatrixFormat) -> str:
    """What shares a scale, and the scale's type."""
    if fmt.scale is None:
        return ""
    of = {"block": "128 × 128 weights", "tensor": "a matrix", "row": "an output channel"}
    which = of.get(str(fmt.shared), f"{fmt.shared} weights of a row")
    return f"{fmt.scale.name} for {which}" + (f", {fmt.factor.name} a matrix" if fmt.factor else "")


def matrix_rows() -> Iterator[tuple[str, ...]]:
    for fmt in FORMATS.values():
        wide = ", ".join(ROLES[role] for role in fmt.left_wide)
        bits = f"{fmt.bytes_per_element * 8:.6g}"
        acts, summed, layouts = fmt.activations.text, fmt.accumulate, ", ".join(fmt.layouts)
        yield f"`{fmt.name}`", fmt.values.name, scale_text(fmt), bits, acts, summed, wide, layouts


def exceptions() -> Iterator[tuple[str, ...]]:
    """Which weights stay in 16 bits, in which formats, and who leaves them so."""
    found: dict[tuple[str, str], list[str]] = {}
    for fmt in FORMATS.values():
        for role, why in fmt.left_wide.items():
            found.setdefault((ROLES[role], why), []).append(f"`{fmt.name}`")
    for (role, why), names in found.items():
        yield role, ", ".join(names), why


def scheme_rows() -> Iterator[tuple[str, ...]]:
    for scheme in SCHEMES.values():
        experts = matrix_format(scheme.experts)
        yield f"`{scheme.name}`", f"`{scheme.dense}`", f"`{scheme.experts}`", f"{experts.bytes_per_element * 8:.6g}"


def rules() -> Iterator[tuple[str, str, Mapping[str, Any]]]:
    """Engine and release, cache, and the rule: an entry of a `[cache]` section."""
    for name in engines.names():
        document = read_toml(ENGINES / f"{name}.toml")
        for cache, rule in document["cache"].items():
            yield f"{name} {document['release']}", cache, rule


def held_rows() -> Iterator[tuple[str, ...]]:
    """Each row format by the caches that engines keep in it, with the bytes of such a row of the model."""
    cfg = load_config(MODEL)
    assert isinstance(cfg.attention, Mla) and cfg.indexer
    width, rope, index = cfg.attention.latent_dim, cfg.attention.rope_dim, cfg.indexer.head_dim
    users: dict[tuple[str, str], dict[str, None]] = {}
    for engine, cache, rule in rules():
        if cache in ("latent", "index", "heads"):
            for value in (rule["value"], *(case["value"] for case in rule.get("cases", ()))):
                users.setdefault((cache, value), {})[engine.split()[0]] = None
    for name, fmt in ROWS.items():
        scales = f"{fmt.scale.name} for {fmt.shared or 'the row'}" if fmt.scale else ""
        for cache, size in (("latent", fmt.bytes(width, rope)), ("index", fmt.bytes(index)), ("heads", 0)):
            if found := users.get((cache, name)):
                kept = f"{fmt.values.name}" + (f", rotary part {fmt.rope.name}" if fmt.rope else "")
                yield f"`{name}`", cache, kept, scales, f"{size}" if size else "", ", ".join(found)


def when(conditions: Mapping[str, Any]) -> str:
    return ", ".join(f"{key} = {str(value).lower()}" for key, value in conditions.items())


def rule_rows() -> Iterator[tuple[str, ...]]:
    for engine, cache, rule in rules():
        cases = [f"`{case['value']}` where {when(case['when'])}" for case in rule.get("cases", ())]
        text = "; ".join([*cases, f"else `{rule['value']}`" if cases else f"`{rule['value']}`"])
        yield engine, f"`{cache}`", text, f"{rule['source']} ({rule['date']}, {rule['grade']})"


def kept_rows() -> Iterator[tuple[str, ...]]:
    cfg = load_config(MODEL)
    for engine, chips in CHIPS.items():
        for chip in chips:
            found = engine_cache(cfg, engine, chip)
            for kv, held in found["kv"].items():
                rows = ", ".join(f"{cache} `{row}`" for cache, row in held["rows"].items())
                size, sized = held["bytes_per_token"], held["sized_bytes_per_token"]
                pool = "" if size == sized else f"{sized:,}"
                label = f"{kv}, by default" if kv == found["default"] else kv
                yield f"{found['engine']} {found['release']}", chip, label, rows, f"{size:,}", pool


def render() -> str:
    """The page."""
    about = ("format", "weights", "scales", "bits a weight", "activations", "summed in", "stays in 16 bits", "layouts")
    tables = (
        table(*about, rows=list(matrix_rows())),
        table("stays in 16 bits", "in", "who leaves it so", rows=list(exceptions())),
        table("scheme", "dense matrices", "routed experts", "bits a weight of an expert", rows=list(scheme_rows())),
        table("row", "cache", "kept as", "scales", "bytes", "engines", rows=list(held_rows())),
        table("engine", "cache", "rows", "source (date, grade)", rows=list(rule_rows())),
        table("engine", "chip", "`--kv`", "rows", "bytes a token", "the pool is sized with", rows=list(kept_rows())),
    )
    return PAGE.format(*tables)


if __name__ == "__main__":
    page.write(__doc__, DEFAULT, render)
