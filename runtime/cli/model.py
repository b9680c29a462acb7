"""`glm5 model`: what a model is, counted from its config: parameters, cache bytes, layer types."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from foundation.errors import UsageError
from model.cache import bytes_per_token, known_forms
from model.config import ModelConfig
from model.hf_config import load_config
from model.weights import parameter_counts
from runtime.cli import completion

# The components that are not part of "parameters_total": they are counted apart.
_APART = ("mtp",)


def describe(cfg: ModelConfig) -> dict[str, Any]:
    """The JSON object of `glm5 model --json`.

    parameters_total: every weight of the main stack, embedding and head included, MTP not.
    parameters_active: those that a token's forward pass multiplies with: `top_k` of the routed experts, the
    head, and not the embedding table. kv_bytes_per_token: over the main layers; `mtp_` the MTP layers'.
    """
    counts = parameter_counts(cfg)
    total = {k: v for k, v in counts["total"].items() if k not in _APART}
    active = {k: v for k, v in counts["active"].items() if k not in _APART}
    forms = known_forms(cfg)
    result: dict[str, Any] = {
        "name": cfg.name,
        "model_type": cfg.model_type,
        "parameters_total": sum(total.values()),
        "parameters_active": sum(active.values()),
        "parameters_mtp": counts["total"].get("mtp", 0),
        "parameters_embedding": total["embedding"],
        "parameters_by_component": total,
        "active_by_component": active,
        "kv_bytes_per_token": {name: sum(bytes_per_token(cfg, form).values()) for name, form in forms.items()},
        "index_bytes_per_token": {name: bytes_per_token(cfg, form).get("index", 0) for name, form in forms.items()},
        "layer_types": {kind.name: count for kind, count in cfg.layer_counts.items()},
        "num_layers": cfg.num_layers,
        "max_positions": cfg.max_positions,
        "weight_format": cfg.weight_format,
    }
    if cfg.mtp_layers:
        result["mtp_kv_bytes_per_token"] = {
            name: sum(bytes_per_token(cfg, form, mtp=True).values()) for name, form in forms.items()
        }
    return result


def engine_cache(cfg: ModelConfig, engine: str, profile: str) -> dict[str, Any]:
    """What an engine keeps a token in on a chip, for each cache format of the chip: rows by cache, bytes over the main
    layers on a device (of KV heads: on all tp ranks together), and those that the pool is sized with."""
    import hw_profiles
    from model.cache import cache_rows
    from model.split import Layout
    from runtime.deployment.engines import default_kv, engine_for, formats_for, sized_cache

    chip = hw_profiles.load(profile)
    described = engine_for(engine, cfg, chip, Layout())
    names = dict.fromkeys(row.name for kind in cfg.layer_counts for row in cache_rows(cfg, kind))
    found = {}
    for kv in chip.formats.kv:
        held = formats_for(described, cfg, chip, cfg.stored_scheme, kv)
        sized = sized_cache(described, cfg, chip, held)
        found[kv] = {
            "rows": {row: held.cache.of(row).name for row in names},
            "bytes_per_token": sum(bytes_per_token(cfg, held.cache).values()),
            "sized_bytes_per_token": sum(bytes_per_token(cfg, sized).values()),
            "mtp_bytes_per_token": sum(bytes_per_token(cfg, held.cache, mtp=True).values()),
        }
    return {
        "engine": described.name,
        "release": described.release,
        "profile": chip.name,
        "default": default_kv(described, cfg, chip),
        "kv": found,
    }


def model(
    name: Annotated[
        str,
        typer.Argument(
            autocompletion=completion.models,
            help="A preset (glm-5, glm-5.2, deepseek-v3, ...), a checkpoint directory or a config.json.",
        ),
    ],
    engine: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.engines,
            help="With --profile: how this engine keeps the cache there; as of `glm5 simulate`.",
        ),
    ] = None,
    profile: Annotated[
        str | None,
        typer.Option(autocompletion=completion.chips, help="An accelerator of `glm5 profiles list`, or a TOML file."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Describe a model: parameters in total and active, cache bytes per token, layer types."""
    cfg = load_config(name)
    result = describe(cfg)
    if engine is not None and profile is None:
        raise UsageError("--engine says how a cache is kept on a chip: name it with --profile")
    if profile is not None:
        result["engine_cache"] = engine_cache(cfg, engine or "sglang", profile)
    if as_json:
        print(json.dumps(result, indent=2))
        return
    from rich.table import Table

    from runtime.cli.terminal import Terminal

    console = Terminal()
    console.print(f"[bold]{result['name']}[/] ({result['model_type']}, {result['num_layers']} layers)")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("parameters")
    table.add_column("total", justify="right")
    table.add_column("active a token", justify="right")
    for component, size in sorted(result["parameters_by_component"].items(), key=lambda item: -item[1]):
        table.add_row(component, _si(size), _si(result["active_by_component"].get(component, 0)))
    table.add_row("[bold]sum[/]", _si(result["parameters_total"]), _si(result["parameters_active"]))
    if result["parameters_mtp"]:
        table.add_row("mtp (apart)", _si(result["parameters_mtp"]), "")
    console.print(table, "")
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("cache format")
    table.add_column("bytes a token", justify="right")
    table.add_column("of it index", justify="right")
    for fmt, size in result["kv_bytes_per_token"].items():
        table.add_row(fmt, f"{size:,}", f"{result['index_bytes_per_token'][fmt]:,}")
    console.print(table, "")
    if "engine_cache" in result:
        _show_engine_cache(console, result["engine_cache"])
    types = Table(box=None, pad_edge=False, header_style="bold")
    types.add_column("layer type")
    types.add_column("layers", justify="right")
    for kind, count in result["layer_types"].items():
        types.add_row(kind, str(count))
    console.print(types)


def _show_engine_cache(console: Any, found: dict[str, Any]) -> None:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"KV cache under {found['engine']} {found['release']} on {found['profile']}")
    table.add_column("bytes a token", justify="right")
    table.add_column("rows")
    for kv, held in found["kv"].items():
        sized = held["sized_bytes_per_token"]
        note = "" if sized == held["bytes_per_token"] else f"; the pool is sized with {sized:,}"
        rows = ", ".join(f"{cache} {row}" for cache, row in held["rows"].items())
        label = f"{kv} (default)" if kv == found["default"] else kv
        table.add_row(label, f"{held['bytes_per_token']:,}", rows + note)
    console.print(table, "")


def _si(count: int) -> str:
    for unit, suffix in ((1e9, " B"), (1e6, " M"), (1e3, " K")):
        if count >= unit:
            return f"{count / unit:,.2f}{suffix}"
    return str(count)
