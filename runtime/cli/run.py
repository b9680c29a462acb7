"""`glm5 run`: tokens from a checkpoint, on a backend chosen by a flag, or on the emulated devices of a plan."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from foundation.errors import UsageError
from foundation.reading import Unreadable, read_text
from foundation.writing import replacing
from model.formats import SCHEMES_HELP

if TYPE_CHECKING:
    from model.tokenizer import Tokenizer
    from runtime.deployment.plan import Plan
    from runtime.execution.local.request import Completion
    from runtime.execution.local.sampling import Sampling
    from runtime.execution.package.generate import Text


def run(
    backend: Annotated[str, typer.Option(help="Where to run; `glm5 backends` lists them.")] = "cpu",
    checkpoint: Annotated[
        Path | None, typer.Option(help="A Hugging Face checkpoint directory [default: an embedded tiny model].")
    ] = None,
    prompt: Annotated[str | None, typer.Option(help="Text to continue, or to answer with --chat.")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="Token ids to continue: 1,2,3.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="A file with a prompt a line: served together, printed as JSON lines.")
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Wrap the prompt in the checkpoint's chat template.")] = False,
    no_thinking: Annotated[bool, typer.Option("--no-thinking", help="With --chat: no thinking block.")] = False,
    max_tokens: Annotated[int, typer.Option(help="Most tokens to generate.")] = 64,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the smallest set with this probability.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Keep this many best tokens; 0 keeps all.")] = 0,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the sampling.")] = 0,
    mtp: Annotated[int, typer.Option(min=0, max=16, help="Draft this many tokens a step with the MTP layer.")] = 0,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Do not stop at end-of-turn tokens.")] = False,
    dtype: Annotated[str | None, typer.Option(help="float32 or bfloat16 [default: the backend's preference].")] = None,
    keep_fp8: Annotated[bool, typer.Option("--keep-fp8", help="Keep FP8 weights in FP8.")] = False,
    pool_tokens: Annotated[int | None, typer.Option(min=1, help="Size of the KV page pool in tokens.")] = None,
    prefill_chunk: Annotated[int, typer.Option(min=1, help="Prompt tokens a prefill step feeds.")] = 256,
    dump_logits: Annotated[
        Path | None, typer.Option(help="Store float32 logits [prompt + generated, vocab] in this .npz.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of streaming.")] = False,
    artifact: Annotated[
        Path | None, typer.Option(help="Run this exported package alone, with --backend ort, torch or xla.")
    ] = None,
    plan: Annotated[Path | None, typer.Option(help="With sim: the plan to execute (`glm5 plan --out`).")] = None,
    profile: Annotated[str | None, typer.Option(help="With sim: the accelerator, of `glm5 profiles list`.")] = None,
    devices: Annotated[int | None, typer.Option(min=1, help="With sim: devices in all [default: 1].")] = None,
    tp: Annotated[int | None, typer.Option(min=1, help="With sim: tensor parallelism.")] = None,
    dp: Annotated[int | None, typer.Option(min=1, help="With sim: attention data parallelism.")] = None,
    ep: Annotated[int | None, typer.Option(min=1, help="With sim: expert parallelism, 1 or tp x dp.")] = None,
    pp: Annotated[int | None, typer.Option(min=1, help="With sim: pipeline stages.")] = None,
    formats: Annotated[str | None, typer.Option(help=f"With sim: {SCHEMES_HELP} [default: the chip's own].")] = None,
    kv: Annotated[str | None, typer.Option(help="With sim: KV cache in bf16, fp8 or int8.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="With sim: whose scheduler and overheads; as of `glm5 simulate`.")
    ] = None,
    scale_memory: Annotated[float, typer.Option(help="With sim: share of the chip's memory that is there.")] = 1.0,
    trace: Annotated[Path | None, typer.Option(help="With sim: write a Chrome/Perfetto trace, a row a device.")] = None,
    coordinator: Annotated[
        str | None, typer.Option(help="Run --plan over several processes: HOST:PORT where process 0 listens.")
    ] = None,
    process: Annotated[
        str | None, typer.Option(help="With --coordinator: I/N, this is process I of N, from 0 on.")
    ] = None,
) -> None:
    """Generate text with a model on a backend."""
    arguments = dict(locals())
    from runtime.execution.cluster.options import SimOptions

    emulated = SimOptions(plan, profile, devices, tp, dp, ep, pp, formats, kv, engine, scale_memory, trace)
    if sum(option is not None for option in (prompt, prompt_ids, prompts)) > 1:
        raise UsageError("give one of --prompt, --prompt-ids and --prompts")
    if chat and prompt_ids is not None:
        raise UsageError("--chat wraps text: it goes with --prompt or --prompts, not with --prompt-ids")
    if no_thinking and not chat:
        raise UsageError("--no-thinking needs --chat")
    if dump_logits and (prompts or dump_logits.suffix != ".npz" or not dump_logits.absolute().parent.is_dir()):
        raise UsageError("--dump-logits takes one prompt, and an .npz file in a folder that exists")
    place = None
    if coordinator is not None or process is not None:
        from runtime.execution.cluster import processes

        place = processes.ProcessPlace.parse(coordinator, process)
        own = {"--artifact": artifact, "--mtp": mtp, "--keep-fp8": keep_fp8, "--pool-tokens": pool_tokens}
        wrong = [*(name for name, value in own.items() if value), *(n for n in emulated.given if n != "--plan")]
        if wrong or plan is None:
            raise UsageError(f"{wrong[0]} does not go with --coordinator" if wrong else "--coordinator needs --plan")
    ids = _parse_ids(prompt_ids) if prompt_ids is not None else None
    texts = _read_prompts(prompts) if prompts else [prompt if prompt is not None else "Hello"]
    if artifact is not None:
        own = {"--checkpoint": checkpoint, "--chat": chat, "--mtp": mtp, "--dtype": dtype, "--keep-fp8": keep_fp8,
               "--pool-tokens": pool_tokens, "--dump-logits": dump_logits}  # fmt: skip
        if wrong := [*(name for name, value in own.items() if value), *emulated.given]:
            raise UsageError(f"{wrong[0]} does not go with --artifact: the package has been made without it")
        from runtime.execution.local.sampling import Sampling

        chosen = Sampling(temperature, top_p, top_k, seed)
        return _run_artifact(
            artifact, backend, ids, texts, max_tokens, chosen, ignore_eos, as_json, prompts is not None
        )

    from backends import registry
    from model.checkpoint import Checkpoint
    from model.tokenizer import ChatTemplate, Tokenizer
    from runtime.execution.local.load import embedded_checkpoint
    from runtime.execution.local.request import Prompt
    from runtime.execution.local.sampling import Sampling

    sampling = Sampling(temperature, top_p, top_k, seed)
    started = time.perf_counter()
    adapter = registry.get(backend)
    if place and not adapter.spreads:
        raise UsageError(f"--coordinator: backend {backend} does not run over several processes; cpu and cuda do")
    if adapter.emulates:
        own = {"--mtp": mtp, "--dtype": dtype, "--keep-fp8": keep_fp8, "--pool-tokens": pool_tokens}
        if wrong := [name for name, value in own.items() if value]:
            raise UsageError(f"{wrong[0]} does not go with --backend {backend}: the plan and its formats decide that")
    else:
        if emulated.given and not place:
            raise UsageError(f"{emulated.given[0]} needs a backend that emulates: --backend sim")
        if place is None:
            registry.usable(backend)
    opened = Checkpoint(checkpoint or embedded_checkpoint())
    todo: Plan | None = None
    if adapter.emulates or place:
        from runtime.execution.cluster.session import prepare, serve

        todo = prepare(opened.config, emulated)
    if place and todo:
        place.check(todo)
        if not processes.supervised():
            return processes.supervise(place, run, arguments)
    tokenizer = Tokenizer.load(opened.path) if ids is None or (opened.path / "tokenizer.json").exists() else None
    if ids is not None:
        encoded = [ids]
    else:
        assert tokenizer is not None
        if chat:
            template = ChatTemplate.load(opened.path)
            texts = [
                template.render([{"role": "user", "content": text}], enable_thinking=not no_thinking) for text in texts
            ]
        encoded = [tuple(tokenizer.encode(text)) for text in texts]
    ends = {*opened.config.eos_token_ids, *(tokenizer.stop_token_ids if tokenizer else ())}
    stop = frozenset() if ignore_eos else frozenset(ends)
    requests = [Prompt(ids, max_tokens, sampling, stop, dump_logits is not None) for ids in encoded]
    streaming = not as_json and prompts is None
    stream = tokenizer.stream() if tokenizer and streaming else None

    def on_token(_: int, token: int) -> None:
        if streaming:
            print(stream.put(token) if stream else f"{token} ", end="", flush=True)

    more: dict[str, Any] = {}
    if todo is not None:
        machines = processes.connect(place, adapter, dtype, todo, requests) if place else adapter
        served = serve(opened, machines, todo, requests, on_token, trace)
        completions, load_s, compile_s = served.outcome.completions, served.load_s, served.compile_s
        more = {"plan": todo.serving.name, "devices": len(todo.devices), "run_s": served.run_s}
        if place:
            completions, more["processes"] = served.wall, place.count
        else:
            more["clock"] = f"virtual, priced in {served.clock.serving.spec.formats.weights}"
    else:
        from runtime.execution.local.engine import EngineConfig
        from runtime.execution.local.load import load_engine

        config = EngineConfig(drafts=mtp, prefill_chunk=prefill_chunk)
        ready = load_engine(opened, adapter, config, dtype, keep_fp8, pool_tokens)
        load_s = time.perf_counter() - started
        completions, compile_s = ready.generate(requests, on_token), ready.programs.compile_s
    if streaming:
        print(stream.flush() if stream else "")
    if dump_logits and not (place and place.index):
        _save_logits(dump_logits, completions[0])
    for completion in completions:
        result = _result(backend, completion, tokenizer, load_s, compile_s)
        result |= more
        if streaming:
            _summary(result)
            if checkpoint is None:
                print("[the embedded model knows some made-up text; --checkpoint DIR runs another]", file=sys.stderr)
        else:
            print(json.dumps(result, indent=None if prompts else 2, ensure_ascii=False), flush=True)


def _run_artifact(
    folder: Path,
    backend: str,
    ids: tuple[int, ...] | None,
    texts: list[str],
    max_tokens: int,
    sampling: Sampling,
    ignore_eos: bool,
    as_json: bool,
    many: bool,
) -> None:
    """Tokens from an exported package alone: nothing of the model's code is imported."""
    from runtime.execution.local.request import Prompt
    from runtime.execution.package.generate import Package

    started = time.perf_counter()
    package = Package(folder, backend)
    if ids is None and package.text is None:
        raise UsageError(f"{folder}: holds no tokenizer; give token ids: --prompt-ids")
    encoded = [ids] if ids is not None else [tuple(package.text.encode(text)) for text in texts]  # type: ignore[union-attr]
    stop = frozenset() if ignore_eos else package.stop_ids
    load_s, streaming = time.perf_counter() - started, not (as_json or many)
    stream = package.text.stream() if package.text and streaming else None

    def on_token(_: int, token: int) -> None:
        if streaming:
            print(stream.put(token) if stream else f"{token} ", end="", flush=True)

    completions = package.generate([Prompt(each, max_tokens, sampling, stop) for each in encoded], on_token)
    if streaming:
        print(stream.flush() if stream else "")
    for completion in completions:
        result = _result(backend, completion, package.text, load_s, package.compile_s)
        if streaming:
            _summary(result)
        else:
            print(json.dumps(result, indent=None if many else 2, ensure_ascii=False), flush=True)


def _parse_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"--prompt-ids takes whole numbers separated by commas, not {text!r}") from None


def _read_prompts(path: Path) -> list[str]:
    try:
        lines = [line for line in read_text(path).splitlines() if line.strip()]
    except Unreadable as error:
        raise UsageError(f"--prompts {path}: {error}") from None
    if not lines:
        raise UsageError(f"--prompts {path}: no prompt in it")
    return lines


def _result(
    backend: str, completion: Completion, tokenizer: Tokenizer | Text | None, load_s: float, compile_s: float
) -> dict[str, Any]:
    decoded = len(completion.token_ids) - 1
    return {
        "backend": backend,
        "prompt_ids": list(completion.prompt_ids),
        "token_ids": list(completion.token_ids),
        "text": tokenizer.decode(list(completion.token_ids)) if tokenizer else None,
        "finish_reason": completion.finish_reason,
        "timings_s": {
            "load": load_s,
            "compile": compile_s,
            "ttft": completion.ttft_s,
            "decode": completion.decode_s,
            "tpot": completion.decode_s / decoded if decoded else None,
        },
        "accept_length": completion.accept_length,
    }


def _summary(result: dict[str, Any]) -> None:
    timings = result["timings_s"]
    rate = f", then {1 / timings['tpot']:.1f} tok/s" if timings["tpot"] else ""
    accept = f", {result['accept_length']:.2f} tokens a step" if result["accept_length"] else ""
    digits = 4 if "clock" in result else 2
    if "clock" in result:
        print(f"[{result['plan']}; clock: {result['clock']}]", file=sys.stderr)
    print(
        f"[{result['backend']}: {len(result['prompt_ids'])} + {len(result['token_ids'])} tokens, "
        f"{result['finish_reason']}; first token after {timings['ttft']:.{digits}f} s{rate}{accept}; "
        f"compiling took {timings['compile']:.1f} s]",
        file=sys.stderr,
    )


def _save_logits(path: Path, completion: Completion) -> None:
    import numpy as np

    assert completion.logits is not None
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, logits=completion.logits)
