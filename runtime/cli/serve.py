"""`glm5 serve`: an HTTP API in front of a model, on any backend, or at the pace of a deployment that is emulated."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Annotated

import typer

from foundation.errors import UsageError
from foundation.reading import Unreadable, read_lines
from runtime.cli import completion, device_options
from runtime.cli.given import refuse_decided, refuse_unread
from runtime.execution.cluster.options import DECIDED_BY_PLAN

_LOCAL = frozenset({"dtype", "keep_fp8", "pool_tokens", "prefill_chunk"})
_EMULATED = frozenset(
    {"plan", "profile", "devices", "tp", "dp", "ep", "pp", "formats", "engine", "scale_memory", "model",
     "tokens", "time_scale"}
)  # fmt: skip
_OF_PROCESSES = frozenset({"coordinator", "process"})
_OF_CHECKPOINTS = _LOCAL | _EMULATED | {"checkpoint", "mtp", "kv"}
_OF_PACKAGES = frozenset({"artifact", "trust_package"})


def serve(
    context: typer.Context,
    backend: device_options.BackendName = "cpu",
    checkpoint: device_options.CheckpointFolder = None,
    host: Annotated[
        str, typer.Option(help="The address to listen on; one beyond this machine wants a key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(envvar="GLM5_API_KEY", help="A key that requests must send; several may be given."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="A file with a key a line.")] = None,
    guard_health: Annotated[bool, typer.Option("--guard-health", help="/health needs a key, too.")] = False,
    allowed_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Whose web pages may ask, as http://host:port, or * [default: all where a key is needed, else none]."
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="What requests may call the model; several may be given [default: its own]."),
    ] = None,
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more are refused.")] = 256,
    max_body_mb: Annotated[float, typer.Option(help="Megabytes a request's body may have.")] = 16.0,
    ping_seconds: Annotated[float, typer.Option(help="Between signs of life in a stream that is silent.")] = 10.0,
    drain_seconds: Annotated[float, typer.Option(help="Seconds that answers go on after SIGTERM.")] = 30.0,
    warm_up: Annotated[
        int, typer.Option(min=0, max=256, help="Compile ahead for this many requests at once; 0: when they come.")
    ] = 8,
    compile_cache: device_options.CompileCache = None,
    mtp: device_options.Mtp = 0,
    dtype: device_options.Dtype = None,
    keep_fp8: device_options.KeepFp8 = False,
    pool_tokens: device_options.PoolTokens = None,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens a prefill step feeds.")] = 256,
    artifact: Annotated[
        Path | None, typer.Option(help="Serve this exported package, with --backend ort, torch or xla.")
    ] = None,
    trust_package: device_options.TrustPackage = False,
    plan: Annotated[
        Path | None,
        typer.Option(help="With sim: the plan to keep the pace of (`glm5 plan --out`); with --coordinator: to run."),
    ] = None,
    coordinator: device_options.Coordinator = None,
    process: device_options.Process = None,
    profile: device_options.SimProfile = None,
    devices: device_options.SimDevices = None,
    tp: device_options.SimTp = None,
    dp: device_options.SimDp = None,
    ep: device_options.SimEp = None,
    pp: device_options.SimPp = None,
    formats: device_options.SimFormats = None,
    kv: device_options.Kv = None,
    engine: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.engines, help="With sim: whose scheduler and overheads; as of `glm5 simulate`."
        ),
    ] = None,
    scale_memory: device_options.ScaleMemory = 1.0,
    tokens: Annotated[
        str, typer.Option(help="With sim: `model`, of the checkpoint; or `synthetic`, made up, of any model's pace.")
    ] = "model",
    model: Annotated[
        str | None,
        typer.Option(
            autocompletion=completion.models, help="With --tokens synthetic and no --plan: whose pace is kept."
        ),
    ] = None,
    time_scale: Annotated[
        float,
        typer.Option(help="With sim: seconds here for each of the chips'; above 1 where this machine is too slow."),
    ] = 1.0,
) -> None:
    """Serve a model over HTTP: OpenAI's and Anthropic's forms, tools, schemas, metrics."""
    values = dict(locals())
    spread = coordinator is not None or process is not None
    emulates, why_not = False, "does not go with --artifact: the package has been made without it; leave it out"
    if artifact is not None:
        unread = _OF_CHECKPOINTS | _OF_PROCESSES
    elif spread:
        unread = (_LOCAL | _EMULATED | _OF_PACKAGES | {"mtp", "kv"}) - {"plan", "dtype"}
        why_not = "does not go with --coordinator and --process, which serve a plan as it is; leave it out"
    else:
        from backends import registry

        emulates = registry.get(backend).emulates
        unread, why_not = (_LOCAL if emulates else _EMULATED) | _OF_PACKAGES, _why_not(emulates, backend)
    refuse_unread(context, set(values) - unread, lambda name: "needs --artifact" if name in _OF_PACKAGES else why_not)
    if plan is not None and not spread:
        refuse_decided(context, DECIDED_BY_PLAN)
    keys = _keys(api_key, api_key_file)
    _positive(max_body_mb=max_body_mb, ping_seconds=ping_seconds, drain_seconds=drain_seconds)
    try:
        from runtime.api.backing import Backing
        from runtime.api.settings import Settings
        from runtime.cli.front import Front
    except ModuleNotFoundError as error:
        raise UsageError(f"glm5 serve needs {error.name}: pip install 'glm5-runtime[serve]'") from None
    if tokens not in ("model", "synthetic"):
        raise UsageError(f"--tokens is model or synthetic, not {tokens!r}")
    sim = None
    if emulates:
        from runtime.execution.cluster.options import SimOptions

        sim = SimOptions(**{f.name: values[f.name] for f in dataclasses.fields(SimOptions) if f.name in values})
    names = [field.name for field in dataclasses.fields(Backing) if field.name not in ("sim", "warm")]
    backing = Backing(sim=sim, warm=warm_up, **{name: values[name] for name in names})
    settings = Settings(
        keys=keys, open_health=not guard_health,
        origins=_origins(allowed_origin or ["*"] * bool(keys)),
        max_queue=max_queue, max_body_bytes=int(max_body_mb * 1e6), ping_s=ping_seconds, drain_s=drain_seconds,
    )  # fmt: skip
    front = Front(host, port, tuple(served_model_name or ()), settings, compile_cache)
    if spread:
        from runtime.cli.serve_processes import ProcessesServe

        ProcessesServe(front, backing, plan, coordinator, process).run()
    else:
        front.serve_alone(backing)


def _why_not(emulates: bool, backend: str) -> str:
    if emulates:
        return f"does not go with --backend {backend}: the plan and its formats decide that; leave it out"
    return "needs a backend that emulates: --backend sim"


def _keys(given: list[str] | None, path: Path | None) -> tuple[str, ...]:
    """Raises `UsageError`."""
    keys = list(given or ())
    if path is not None:
        try:
            keys += [line for line in read_lines(path, 1 << 20) if line.strip()]
        except Unreadable as error:
            raise UsageError(f"--api-key-file {path}: {error}") from None
        if not keys:
            raise UsageError(f"--api-key-file {path}: no key in it")
    for key in keys:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise UsageError("a key has printable ASCII characters and no spaces")
    return tuple(dict.fromkeys(keys))


def _origins(given: list[str]) -> tuple[str, ...]:
    """As browsers spell them, which are compared as text. Raises `UsageError`."""
    for origin in given:
        spelt = re.fullmatch(r"[a-z][a-z0-9+.-]*://[^\s/?#@*A-Z]+", origin, re.ASCII)
        if origin != "*" and (not spelt or re.fullmatch("http:.*:80|https:.*:443", origin)):
            how = "in small letters, without a path, another * or the port that the scheme has anyway"
            raise UsageError(f"--allowed-origin {origin!r}: give * or scheme://host[:port], {how}")
    return tuple(given)


def _positive(**given: float) -> None:
    for name, value in given.items():
        if not 0 < value < 1e6:
            raise UsageError(f"--{name.replace('_', '-')} must be above 0, not {value:g}")
