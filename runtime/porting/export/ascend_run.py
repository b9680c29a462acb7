#!/usr/bin/env python3
"""Runs this package: prefill and decode on one device or, with torchrun, on several; tokens and step times.

    python run.py --prompt-ids 1,2,3                                a package of one device
    torchrun --nproc-per-node 16 run.py --prompt-ids 1,2,3          a process for each device of the layout

Needs torch, and on Ascend torch_npu, of the releases in manifest.json (`toolchain`), and nothing else. Each process
reads manifest.json, its own weight file, and the graphs (`.pt2`, torch.export). A unit's graphs and the collectives
between them are one module: compiled, they are one graph with the collectives in it, over HCCL (on a CPU gloo).
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import json
import math
import mmap
import os
import statistics
import sys
import time
import types
from pathlib import Path

os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")  # torch_npu is imported below, or not at all

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional

SCHEMA_VERSION = 2
MEASUREMENTS = "glm5-npu-measurements"  # `glm5 calibrate --from` and `glm5 validate` know the file by it
MEASUREMENTS_VERSION = 1
FRACTAL_NZ = 29  # of CANN's aclFormat
EXCHANGES = ("npu::npu_moe_distribute_dispatch_v2", "npu::npu_moe_distribute_combine_v2")
ON_NPU = ("npugraph_ex", "torchair", "npugraph_ex-compile")  # graph modes
OUT = ".out"
DTYPES = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8,
    "I32": torch.int32, "I64": torch.int64, "BOOL": torch.bool, "F8_E4M3": torch.float8_e4m3fn,
}  # fmt: skip


class Stop(Exception):
    """Ends the run with one line."""


# --- the package ------------------------------------------------------------------------------------


def read_manifest(folder):
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        version, kind = manifest["schema_version"], manifest["format"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Stop(f"{folder}: no exported package ({type(error).__name__}: {error})") from None
    if version != SCHEMA_VERSION or kind != "ascend":
        raise Stop(
            f"{folder}: a package of format {kind!r}, manifest version {version!r}; this run.py reads ascend, "
            f"version {SCHEMA_VERSION}: use the run.py that was exported with it"
        )
    return manifest


def check_file(folder, manifest, name, whole):
    """Raises `Stop` for a file that is not the manifest's. whole: look at its bytes too."""
    path, said = folder / name, manifest["files"].get(name)
    if said is None:
        raise Stop(f"{path}: the manifest does not list it; export the package again")
    if not path.is_file():
        raise Stop(f"{path}: missing; copy the whole package, or export it again")
    if path.stat().st_size != said["bytes"]:
        raise Stop(f"{path}: {path.stat().st_size} bytes where the manifest says {said['bytes']}; copy it again")
    if whole:
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != said["sha256"]:
                raise Stop(f"{path}: altered (its hash is not the manifest's); copy it again")
    return path


class WeightFile:
    """A safetensors file, mapped into memory."""

    def __init__(self, path):
        self.path = path
        with path.open("rb") as file:
            self.map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        size = int.from_bytes(self.map[:8], "little")
        self.entries, self.begin = json.loads(self.map[8 : 8 + size]), 8 + size

    def tensor(self, name):
        if name not in self.entries:
            raise Stop(f"{self.path}: holds no weight {name}; export the package again")
        entry = self.entries[name]
        dtype, (low, high) = DTYPES[entry["dtype"]], entry["data_offsets"]
        if low == high:
            return torch.empty(entry["shape"], dtype=dtype)
        raw = bytearray(self.map[self.begin + low : self.begin + high])
        return torch.frombuffer(raw, dtype=dtype).reshape(entry["shape"])


# --- devices ----------------------------------------------------------------------------------------


class RunPlace:
    """The device of this process, and whom it talks to. `groups`: by mesh axis; `column`: the stages of its ranks."""

    def __init__(self, manifest, device):
        self.axes = {axis: manifest["axes"].get(axis, 1) for axis in ("dp", "tp")}
        self.stages = 1 + max(each["stage"] for each in manifest["devices"])
        self.world = self.stages * self.axes["dp"] * self.axes["tp"]
        held = {index for each in manifest["devices"] for index in each["layers"]}
        if len(manifest["devices"]) != self.world or held != {each["index"] for each in manifest["layers"]}:
            raise Stop(f"the package does not hold all devices of {manifest['layout']}; export it without --device")
        self.rank = int(os.environ.get("RANK", "0"))
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        if processes != self.world:
            raise Stop(
                f"the package is of {self.world} devices ({manifest['layout']}) and there are {processes} processes; "
                f"start it with: torchrun --nproc-per-node {self.world} run.py"
            )
        found = [each for each in manifest["devices"] if each["index"] == self.rank]
        if not found or found[0]["weights"] is None:
            raise Stop(f"the package has no weights of device {self.rank}; export it with --weights external")
        self.share = found[0]
        self.local = int(os.environ.get("LOCAL_RANK", "0"))
        self.device = torch.device("cpu") if device == "cpu" else torch.device("npu", self.local)
        if device == "npu":
            torch.npu.set_device(self.device)
        self.groups = {}
        if self.world > 1:
            dist.init_process_group("gloo" if device == "cpu" else "hccl")
            rank_of = {
                (each["stage"], each["ranks"]["dp"], each["ranks"]["tp"]): each["index"] for each in manifest["devices"]
            }
            dp, tp = range(self.axes["dp"]), range(self.axes["tp"])
            stages = range(self.stages)
            self._join("tp", [[rank_of[s, d, t] for t in tp] for s in stages for d in dp])
            self._join("dp", [[rank_of[s, d, t] for d in dp] for s in stages for t in tp])
            self._join("stage", [[rank_of[s, d, t] for s in stages] for d in dp for t in tp])
            self._join("world", [list(range(self.world))])
            exchange = manifest["extra"]["ascend"].get("exchange")
            if exchange:  # a group in which nothing but the operators that exchange tokens is
                self._join("ep", [[rank_of[s, d, t] for d in dp for t in tp] for s in stages], exchange)

    def _join(self, axis, groups, exchange=None):
        options = None
        if exchange and self.device.type == "npu":
            import torch_npu

            options = torch_npu._C._distributed_c10d.ProcessGroupHCCL.Options()
            options.hccl_config = {"hccl_buffer_size": exchange["hccl_buffer_mb"]}
        for ranks in groups:  # every process makes every group, in the same order
            made = dist.new_group(ranks, pg_options=options) if len(ranks) > 1 else None
            if self.rank in ranks:
                self.groups[axis] = (made, ranks)

    @property
    def experts(self):
        """The group that experts are spread over: how operators call it, and this device's rank; None without one."""
        if "ep" not in self.groups:
            return None
        group, ranks = self.groups["ep"]
        if self.device.type == "cpu":
            return group.group_name, ranks.index(self.rank)
        return group._get_backend(self.device).get_hccl_comm_name(self.rank), ranks.index(self.rank)

    @property
    def stage(self):
        return self.share["stage"]

    @property
    def dp(self):
        return self.share["ranks"]["dp"]

    def synchronize(self):
        if self.device.type != "cpu":
            torch.npu.synchronize()

    def gathered(self, value):
        """What every process has, on all of them."""
        if self.world == 1:
            return [value]
        found = [None] * self.world
        dist.all_gather_object(found, value)
        return found


def exchange(kind, value, dim, group):
    """A collective between a unit's graphs, as an operator that is compiled with them."""
    if kind == "all_reduce":
        out = functional.all_reduce(value, "sum", group)
    elif kind == "all_gather":
        out = functional.all_gather_single(value.contiguous(), dim, group)
    elif kind == "reduce_scatter":
        out = functional.reduce_scatter_single(value.contiguous(), "sum", dim, group)
    else:
        parts = dist.get_world_size(group)
        moved = value.movedim(dim, 0).contiguous()
        rows = [moved.shape[0] // parts] * parts
        out = functional.all_to_all_single(moved, rows, rows, group)
        return functional.wait_tensor(out).movedim(0, dim)
    return functional.wait_tensor(out)


# --- units ------------------------------------------------------------------------------------------


def addressed(module, experts):
    """Puts the experts' group and this device's rank into a graph's exchanges. Returns whether there are any."""
    found = [node for node in module.graph.nodes if getattr(node.target, "_schema", None) is not None]
    found = [node for node in found if node.target._schema.name in EXCHANGES]
    if found and experts is None:
        raise Stop("a graph talks to other devices, and the manifest has no group for it; export the package again")
    for node in found:
        names = [argument.name for argument in node.target._schema.arguments]
        given, named = list(node.args), dict(node.kwargs)
        for name, value in zip(("group_ep", "ep_rank_id"), experts, strict=True):
            if (place := names.index(name)) < len(given):
                given[place] = value
            else:
                named[name] = value
        node.args, node.kwargs = tuple(given), named
    if found:
        module.recompile()
    return bool(found)


class Unit(torch.nn.Module):
    """A unit's graphs and the collectives between them: tensors in by `inputs`, out by `outputs`.

    Values have numbers inside: what torch.compile has to compare at every call is kept small.
    """

    def __init__(self, steps, graphs, groups):
        super().__init__()
        self.graphs = torch.nn.ModuleList(graphs)
        names = [[[value["name"] for value in step[key]] for key in ("inputs", "outputs")] for step in steps]
        made = [name for _, outputs in names for name in outputs]
        self.inputs = list(dict.fromkeys(name for given, _ in names for name in given if name not in made))
        self.outputs = list(dict.fromkeys(name for name in made if name.endswith(OUT)))
        number = {name: place for place, name in enumerate(dict.fromkeys([*self.inputs, *made]))}
        self.count = len(number)
        self.plan = tuple(
            (step["kind"], step["dim"], step["axis"], tuple(number[name] for name in given), number[results[0]])
            for step, (given, results) in zip(steps, names, strict=True)
        )  # what a step makes has numbers in a row
        self.results = tuple(number[name] for name in self.outputs)
        self.groups = {step["axis"]: groups[step["axis"]][0] for step in steps if step["axis"]}

    def forward(self, *values):
        held = [*values, *[None] * (self.count - len(values))]
        left = 0
        for kind, dim, axis, given, first in self.plan:
            if kind == "graph":
                made = self.graphs[left](*[held[place] for place in given])
                left += 1
            else:
                made = [exchange(kind, held[given[0]], dim, self.groups[axis])]
            held[first : first + len(made)] = made
        return tuple(held[place] for place in self.results)


def unit_of(steps, graphs, groups):
    """A unit with code of its own: torch.compile keeps what it made by code, and gives up where that is too much."""
    old = Unit.forward
    forward = types.FunctionType(old.__code__.replace(), old.__globals__, old.__name__, None, old.__closure__)
    return type("Unit", (Unit,), {"forward": forward})(steps, graphs, groups)


def compiled(unit, mode, cache, rank):
    """The unit as a callable in a graph mode. cache: a folder of its own, for torchair tells units by their text."""
    if mode == "eager":
        return unit
    if mode in ("npugraph_ex", "torchair"):
        if mode == "npugraph_ex":
            from torch_npu.npu.npugraph_ex.inference import cache_compile

            return cache_compile(unit.forward, dynamic=False, cache_dir=cache, global_rank=rank)
        import torchair

        config = torchair.CompilerConfig()
        return torchair.inference.cache_compile(
            unit.forward, config=config, dynamic=False, cache_dir=cache, global_rank=rank, ge_cache=True
        )
    backend = "npugraph_ex" if mode == "npugraph_ex-compile" else mode
    return torch.compile(unit, backend=backend, fullgraph=True, dynamic=False)


class RunModel:
    """The package on this process's device: weights, caches and units."""

    def __init__(self, folder, manifest, place, mode, verify):
        self.folder, self.manifest, self.place, self.mode = folder, manifest, place, mode
        self.units = {"outer": "outer"} | {f"layers.{each['index']}": each["unit"] for each in manifest["layers"]}
        self.first, self.last = place.stage == 0, place.stage == place.stages - 1
        self.layers = [f"layers.{index}" for index in place.share["layers"]]
        self.graphs, self.made, self.load_s = {}, {}, 0.0
        self.sending = set()  # files of graphs that have exchanges
        begin = time.perf_counter()
        shapes = self._shapes()
        held = WeightFile(check_file(folder, manifest, place.share["weights"], verify))
        owners = ["outer"] * (self.first or self.last) + self.layers
        self.weights = {owner: self._weights(held, owner, shapes) for owner in owners}
        self.clear()
        place.synchronize()
        self.load_s = time.perf_counter() - begin

    def _shapes(self):
        """Shape and type of every weight as the graphs take it, by unit and name."""
        found = {}
        for program in self.manifest["programs"]:
            for name, steps in program["units"].items():
                for value in (value for step in steps for value in step["inputs"]):
                    owner = "outer" if value["name"].startswith("outer.") else name
                    found[owner, value["name"]] = (value["shape"], value["dtype"])
        return found

    def _weights(self, held, owner, shapes):
        out, unit = {}, self.units[owner]
        nz = self.manifest["extra"]["ascend"]["nz"].get(unit, [])
        for ref in self.manifest["weights"][unit]:
            stored = held.tensor(f"{owner}.{ref['name'].partition('.')[2]}")
            if (unit, ref["name"]) not in shapes:
                continue  # of a graph that this device does not run
            shape, dtype = shapes[unit, ref["name"]]
            packed = ref["dtype"] == "int4"  # two to a byte in the file, eight to an int32 in the graph
            if packed:
                stored, shape = stored.view(torch.int8), [*shape[:-1], shape[-1] * 4]
            value = stored.reshape(shape).to(self.place.device)
            if ref["name"] in nz and self.place.device.type == "npu":
                value = torch.ops.npu.npu_format_cast(value, FRACTAL_NZ)
            if packed:  # after the cast, which counts bytes
                value = value.view(getattr(torch, dtype))
            out[ref["name"]] = value
        return out

    def clear(self):
        self.caches = {
            layer: {
                value["name"]: torch.zeros(
                    value["shape"], dtype=getattr(torch, value["dtype"]), device=self.place.device
                )
                for value in self.manifest["caches"][self.units[layer]]
            }
            for layer in self.layers
        }

    def graph(self, file):
        if file not in self.graphs:
            begin = time.perf_counter()
            program = torch.export.load(check_file(self.folder, self.manifest, file, True))
            if self.place.device.type != "cpu":
                from torch.export.passes import move_to_device_pass

                program = move_to_device_pass(program, str(self.place.device))
            self.graphs[file] = program.module()
            if addressed(self.graphs[file], self.place.experts):
                self.sending.add(file)
            self.load_s += time.perf_counter() - begin
        return self.graphs[file]

    def unit(self, program, name):
        key = (program, name)
        if key not in self.made:
            steps = self.manifest["programs"][program]["units"][name]
            graphs = [self.graph(step["files"]["any"]) for step in steps if step["kind"] == "graph"]
            made = unit_of(steps, graphs, self.place.groups)
            cache = str(self.folder / "compiled" / self.mode / f"{program}-{name}")
            if any(step["files"]["any"] in self.sending for step in steps if step["kind"] == "graph"):
                # what is compiled has the group's name, which is another one at the next start
                cache += "-" + hashlib.sha256(self.place.experts[0].encode()).hexdigest()[:12]
            self.made[key] = (made, compiled(made, self.mode, cache, self.place.rank))
        return self.made[key]

    def call(self, program, name, env, owner=None):
        made, run = self.unit(program, name)
        held = {**self.weights.get("outer", {}), **self.weights.get(owner, {}), **self.caches.get(owner, {})}
        ranks = {f"rank.{axis}": rank for axis, rank in self.place.share["ranks"].items()}
        given = []
        for each in made.inputs:
            if each in ranks:
                given.append(self._scalar(ranks[each]))
            else:
                given.append(held[each] if each in held else env[each])
        results = dict(zip(made.outputs, run(*given), strict=True))
        for each, value in results.items():
            short = each.removesuffix(OUT)
            if short.startswith("cache."):
                self.caches[owner][short] = value
            else:
                env[short] = value

    def _scalar(self, value):
        return torch.tensor(value, dtype=torch.int32, device=self.place.device)

    def step(self, program, batch, watch=None):
        """Runs a step with a program, by its number; logits [sequences, vocab] on the last stage, None elsewhere.
        watch(unit, owner, call): calls what it is given, as often as it likes."""
        watch = watch or (lambda unit, call: call())
        env = {name: value.to(self.place.device) for name, value in batch.items()}
        watch("view", lambda: self.call(program, "view", env))
        if self.first:
            watch("embed", lambda: self.call(program, "embed", env, "outer"))
        else:
            self._receive(program, env)
        for layer in self.layers:
            watch(self.units[layer], lambda layer=layer: self.call(program, self.units[layer], env, layer))
        if not self.last:
            self._send(program, env)
            return None
        watch("head", lambda: self.call(program, "head", env, "outer"))
        return env["logits"]

    def _carried(self, program):
        """What goes from one stage to the next: hidden states, and a selection that layers above may share."""
        units = self.manifest["programs"][program]["units"]
        found = {}
        for layer in self.manifest["layers"]:
            for step in units[layer["unit"]]:
                for value in (*step["inputs"], *step["outputs"]):
                    if (short := value["name"].removesuffix(OUT)) in ("x", "selected"):
                        found[short] = value
        return found

    def _send(self, program, env):
        group, ranks = self.place.groups["stage"]
        for name, value in self._carried(program).items():
            held = env.get(name)
            if held is None:  # no layer so far has selected
                held = torch.zeros(value["shape"], dtype=getattr(torch, value["dtype"]), device=self.place.device)
            dist.send(held.contiguous(), ranks[self.place.stage + 1], group)

    def _receive(self, program, env):
        group, ranks = self.place.groups["stage"]
        for name, value in self._carried(program).items():
            env[name] = torch.empty(value["shape"], dtype=getattr(torch, value["dtype"]), device=self.place.device)
            dist.recv(env[name], ranks[self.place.stage - 1], group)

    def chosen(self, logits, sequences):
        """The greedy tokens of a step, on every stage."""
        if logits is not None:
            best = logits.argmax(-1).to(torch.int64)
        else:
            best = torch.empty(sequences, dtype=torch.int64, device=self.place.device)
        if self.place.stages > 1:
            group, ranks = self.place.groups["stage"]
            dist.broadcast(best, ranks[-1], group)
        return best.tolist()


# --- prompts ----------------------------------------------------------------------------------------


def pick(manifest, phase, sequences, holds):
    """The smallest gear of a phase with a place for each sequence: its number, or None. holds(chunk): the context that
    is needed with chunks of that many tokens."""
    found = []
    for number, program in enumerate(manifest["programs"]):
        gear, context = program["gear"], program["gear"]["context_pages"] * manifest["page_size"]
        if program["phase"] == phase and gear["sequences"] >= sequences and context >= holds(gear["tokens"]):
            found.append((context, gear["sequences"], -gear["tokens"], number))
    return min(found)[-1] if found else None


class Rows:
    """The sequences of this dp rank, and those of the others as far as they set the pace."""

    def __init__(self, prompts, place, max_tokens):
        self.prompts, self.max_tokens = prompts, max_tokens
        groups = place.axes["dp"]
        self.mine = [number for number in range(len(prompts)) if number % groups == place.dp]
        self.most = math.ceil(len(prompts) / groups)
        self.ids = {number: list(prompts[number]) for number in self.mine}
        self.fed = {number: 0 for number in self.mine}
        self.longest = max(map(len, prompts))
        self.stride = 0  # pages of each sequence, the same in all gears

    def batch(self, gear, most):
        """The next `most` tokens of each sequence, at most, as a step's inputs; how many each is fed."""
        b, t, pages = gear["sequences"], gear["tokens"], gear["context_pages"]
        tokens = torch.zeros((b, t), dtype=torch.int32)
        start, length = torch.zeros(b, dtype=torch.int32), torch.zeros(b, dtype=torch.int32)
        table = torch.zeros((b, pages), dtype=torch.int32)  # page 0 is nobody's
        fed = []
        for place, number in enumerate(self.mine):
            left = self.ids[number][self.fed[number] :][: min(most, t)]
            if left:
                tokens[place, : len(left)] = torch.tensor(left, dtype=torch.int32)
                start[place], length[place] = self.fed[number], len(left)
                table[place] = 1 + place * self.stride + torch.arange(pages, dtype=torch.int32)
            fed.append(len(left))
        return {"tokens": tokens, "start": start, "length": length, "page_table": table}, fed

    def take(self, fed, best):
        """Goes on by what was fed; a sequence that has no token left is given the one chosen for it."""
        for place, number in enumerate(self.mine):
            self.fed[number] += fed[place]
            done = len(self.ids[number]) >= len(self.prompts[number]) + self.max_tokens
            if fed[place] and self.fed[number] == len(self.ids[number]) and not done:
                self.ids[number].append(best[place])


def generate(model, prompts, max_tokens, times):
    """Greedy answers to prompts of token ids, by number. times: seconds of each step, by phase."""
    manifest, place = model.manifest, model.place
    rows = Rows(prompts, place, max_tokens)
    rows.stride = (manifest["pool_pages"] - 1) // rows.most
    total = rows.longest + max_tokens
    # a chunk is padded to the gear's, and its padding must lie within the context
    prefill = pick(manifest, "prefill", rows.most, lambda chunk: math.ceil(rows.longest / chunk) * chunk)
    main = pick(manifest, "decode", rows.most, lambda chunk: total)
    if main is None:
        main = pick(manifest, "prefill", rows.most, lambda chunk: total + chunk)
    if main is None:
        raise Stop(
            f"{rows.most} sequences of {total} tokens are more than a gear holds; give fewer or shorter prompts, or "
            "export with a larger --batch or --context"
        )

    def run(program, most):
        phase, gear = manifest["programs"][program]["phase"], manifest["programs"][program]["gear"]
        batch, fed = rows.batch(gear, most)
        place.synchronize()
        begin = time.perf_counter()
        best = model.chosen(model.step(program, batch), gear["sequences"])
        times.setdefault(phase, []).append(time.perf_counter() - begin)
        rows.take(fed, best)

    first = prefill if prefill is not None else main
    size = manifest["programs"][first]["gear"]["tokens"]
    for _ in range(math.ceil(rows.longest / size)):  # the same number of steps on all ranks
        run(first, size)
    for _ in range(max_tokens - 1):
        run(main, 1)
    answers = {}
    for held in place.gathered({n: rows.ids[n][len(prompts[n]) :] for n in rows.mine}):
        answers.update(held)
    return [answers[number] for number in range(len(prompts))]


# --- measuring --------------------------------------------------------------------------------------


def spread(values):
    ordered = sorted(values)
    return {
        "median_s": statistics.median(ordered),
        "least_s": ordered[0],
        "p90_s": ordered[min(len(ordered) - 1, math.ceil(0.9 * len(ordered)) - 1)],
        "count": len(ordered),
    }


def full_batch(manifest, program, seed=0):
    """A step of a full gear near the end of its context: random tokens, sequences on pages of their own."""
    gear = manifest["programs"][program]["gear"]
    b, t, pages = gear["sequences"], gear["tokens"], gear["context_pages"]
    made = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, manifest["model"]["vocab_size"], (b, t), generator=made, dtype=torch.int32)
    start = torch.full((b,), pages * manifest["page_size"] - t, dtype=torch.int32)
    table = 1 + torch.arange(b * pages, dtype=torch.int32).reshape(b, pages)
    return {"tokens": tokens, "start": start, "length": torch.full((b,), t, dtype=torch.int32), "page_table": table}


def measure_program(model, program, repeat, warm):
    """Step times of a gear: whole steps, and with a wait after each unit the units. Seconds."""
    place, units, whole = model.place, {}, []
    batch = full_batch(model.manifest, program)
    for number in range(warm + repeat):
        place.synchronize()
        begin = time.perf_counter()
        model.step(program, batch)
        place.synchronize()
        if number >= warm:
            whole.append(time.perf_counter() - begin)

    def watch(unit, call):
        place.synchronize()
        begin = time.perf_counter()
        call()
        place.synchronize()
        units.setdefault(unit, []).append(time.perf_counter() - begin)

    for _ in range(repeat):
        model.step(program, batch, watch)
    found = model.manifest["programs"][program]
    return {
        "phase": found["phase"],
        "gear": found["gear"],
        "context_tokens": found["gear"]["context_pages"] * model.manifest["page_size"],
        "step": spread(whole),
        "units": {unit: {"calls_a_step": len(seconds) // repeat, **spread(seconds)} for unit, seconds in units.items()},
    }


class OperatorTimes(torch.fx.Interpreter):
    """Runs a graph node by node, and times each operator."""

    def __init__(self, module, place, found):
        super().__init__(module)
        self.place, self.found = place, found

    def call_function(self, target, args, kwargs):
        if not isinstance(target, torch._ops.OpOverload):
            return super().call_function(target, args, kwargs)
        self.place.synchronize()
        begin = time.perf_counter()
        result = super().call_function(target, args, kwargs)
        self.place.synchronize()
        seconds = time.perf_counter() - begin
        tensors = torch.utils._pytree.tree_leaves((args, kwargs))
        shapes = tuple((tuple(x.shape), str(x.dtype)[6:]) for x in tensors if isinstance(x, torch.Tensor))
        made = [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]
        outputs = tuple((tuple(x.shape), str(x.dtype)[6:]) for x in made)
        equation = args[0] if args and isinstance(args[0], str) else ""
        key = (target._schema.name.replace("::", "."), shapes, outputs, equation)
        self.found.setdefault(key, []).append((seconds, *groups_of(kwargs.get("group_list"))))
        return result


def groups_of(counts):
    """Of a grouped product: the rows that its groups have, which may be few of those it is given, and how many groups
    have any. counts: rows by group."""
    return (None, None) if counts is None else (int(counts.sum()), int((counts > 0).sum()))


def mean(values):
    return None if None in values else statistics.fmean(values)


def measure_empty(place, count=50):
    """Seconds of an operator that has nothing to do, with the wait for it: what every operator's time begins at."""
    value, times = torch.zeros(1, device=place.device), []
    for _ in range(count):
        place.synchronize()
        begin = time.perf_counter()
        torch.ops.aten.add.Tensor(value, value)
        place.synchronize()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)


def measure_operators(model, program, repeat):
    """Times of every operator of a gear's graphs, run one by one: by name, shapes and types of its tensors."""
    found, batch = {}, full_batch(model.manifest, program)
    plain = dict(model.made)

    class Timed(torch.nn.Module):
        def __init__(self, graph):
            super().__init__()
            self.times = [OperatorTimes(graph, model.place, found)]  # a list: it is no module

        def forward(self, *values):
            return self.times[0].run(*values)

    def interpreted(unit):
        steps = model.manifest["programs"][program]["units"][unit]
        graphs = [model.graph(step["files"]["any"]) for step in steps if step["kind"] == "graph"]
        made = Unit(steps, [Timed(graph) for graph in graphs], model.place.groups)
        return made, made

    for unit in model.manifest["programs"][program]["units"]:
        model.made[program, unit] = interpreted(unit)
    for number in range(repeat + 1):
        if number == 1:
            found.clear()  # the first time, kernels are loaded
        model.step(program, batch)
    model.made = plain
    phase = model.manifest["programs"][program]["phase"]
    return [
        {
            "operator": name,
            "phase": phase,
            "inputs": [{"shape": list(shape), "dtype": dtype} for shape, dtype in shapes],
            "outputs": [{"shape": list(shape), "dtype": dtype} for shape, dtype in outputs],
            "equation": equation,
            "calls_a_step": len(calls) // repeat,
            "rows": mean([rows for _, rows, _ in calls]),
            "groups": mean([groups for _, _, groups in calls]),
            **spread([seconds for seconds, *_ in calls]),
        }
        for (name, shapes, outputs, equation), calls in sorted(
            found.items(), key=lambda each: -sum(seconds for seconds, *_ in each[1])
        )
    ]


# --- the command ------------------------------------------------------------------------------------


def arguments():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--prompt-ids", action="append", metavar="1,2,3", help="token ids; several times for a batch")
    parser.add_argument("--prompt", action="append", metavar="TEXT", help="text, with the package `tokenizers`")
    parser.add_argument("--max-tokens", type=int, default=16, help="tokens of each answer [16]")
    parser.add_argument("--device", choices=("npu", "cpu"), help="[npu where torch_npu finds one, else cpu]")
    parser.add_argument(
        "--graph-mode",
        help="eager; npugraph_ex or torchair (compiled once, kept in compiled/ beside this file); npugraph_ex-compile "
        "(torch.compile); or a backend of torch.compile [npugraph_ex on npu, eager on cpu]",
    )
    parser.add_argument("--measure", type=int, default=0, metavar="N", help="then time N full steps of each gear")
    parser.add_argument("--operators", action="store_true", help="with --measure: time each operator as well")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write tokens and times, for `glm5 calibrate --from`")
    parser.add_argument("--verify-weights", action="store_true", help="hash the weight file first")
    parser.add_argument(
        "--kernels", metavar="MODULE",
        help="import MODULE and call its register() first: kernels for a device that torch_npu has none for",
    )  # fmt: skip
    parser.add_argument("--package", type=Path, default=Path(__file__).resolve().parent, help="[this file's folder]")
    return parser.parse_args()


def torch_npu_reason():
    """Why there is no NPU to be used, None where there is one; imports torch_npu."""
    try:
        importlib.import_module("torch_npu")
    except (ImportError, OSError) as error:
        return f"torch_npu does not import ({' '.join(str(error).split())[:120]})"
    return None if torch.npu.is_available() else "torch_npu finds no device (see npu-smi info)"


def prompts_of(given, folder, manifest):
    found = []
    for text in given.prompt_ids or []:
        try:
            found.append([int(part) for part in text.split(",")])
        except ValueError:
            raise Stop(f"--prompt-ids {text[:60]}: whole numbers separated by commas") from None
    if given.prompt:
        try:
            import tokenizers
        except ImportError:
            raise Stop("--prompt needs the package `tokenizers`; or give --prompt-ids") from None
        if not manifest["tokenizer"]:
            raise Stop("the package holds no tokenizer; give --prompt-ids")
        text = tokenizers.Tokenizer.from_file(str(check_file(folder, manifest, manifest["tokenizer"], True)))
        found += [text.encode(prompt).ids for prompt in given.prompt]
    found = found or [[1]]
    vocabulary = manifest["model"]["vocab_size"]
    for ids in found:
        if not ids or any(not 0 <= each < vocabulary for each in ids):
            raise Stop(f"a prompt has tokens from 0 to {vocabulary - 1}, and at least one")
    if given.max_tokens < 1:
        raise Stop("--max-tokens: 1 or more")
    return found


def graph_mode(asked, device):
    """The mode to run in."""
    mode = asked or ("npugraph_ex" if device == "npu" else "eager")
    if mode in ON_NPU and device != "npu":
        raise Stop(f"--graph-mode {mode} compiles for an NPU; on {device} leave it out, or give aot_eager")
    if mode not in ("eager", *ON_NPU, *torch._dynamo.list_backends(exclude_tags=None)):
        raise Stop(f"--graph-mode {mode}: eager, {', '.join(ON_NPU)} or a backend of torch.compile, as aot_eager")
    return mode


def register_kernels(name):
    sys.path.insert(0, os.getcwd())
    try:
        register = importlib.import_module(name).register
    except (ImportError, AttributeError) as error:
        raise Stop(f"--kernels {name}: {error}") from None
    register()


def run(given):
    folder = given.package
    manifest = read_manifest(folder)
    if given.measure < 0:
        raise Stop("--measure: 0 or more")
    if given.operators and not given.measure:
        raise Stop("--operators goes with --measure N")
    if given.json and not given.json.absolute().parent.is_dir():
        raise Stop(f"--json {given.json}: its folder is not there")
    device = given.device
    if device != "cpu":
        reason = torch_npu_reason()
        if reason and device == "npu":
            raise Stop(f"--device npu: {reason}")
        device = "cpu" if reason else "npu"
    mode = graph_mode(given.graph_mode, device)
    if given.kernels:
        register_kernels(given.kernels)
    lacking = [name for name in manifest["extra"]["ascend"]["operators"] if not _runs(name, device)]
    if lacking:
        raise Stop(
            f"no kernels for {device} of {', '.join(lacking[:3])}{' ..' if len(lacking) > 3 else ''}: run it on a host "
            "with torch_npu and a device, or export with --npu-ops none"
        )
    prompts = prompts_of(given, folder, manifest)
    place = RunPlace(manifest, device)
    with torch.inference_mode():
        model = RunModel(folder, manifest, place, mode, given.verify_weights)
        times = {}
        answers = generate(model, prompts, given.max_tokens, times)
        result = {
            "kind": MEASUREMENTS,
            "version": MEASUREMENTS_VERSION,
            "date": time.strftime("%Y-%m-%d"),
            "model": manifest["model"]["name"],
            "config_sha256": manifest["model"]["config_sha256"],
            "layout": manifest["layout"],
            "devices": place.world,
            "formats": manifest["formats"],
            "dtype": manifest["dtype"],
            "device": torch.npu.get_device_name(place.local) if device == "npu" else "cpu",
            "versions": _versions(device),
            "graph_mode": mode,
            "load_s": model.load_s,
            "prompts": prompts,
            "tokens": answers,
            "steps": {phase: spread(seconds[1:] or seconds) for phase, seconds in times.items()},
            "empty_s": measure_empty(place) if given.operators else None,
            "programs": [],
            "operators": [],
        }
        for program in range(len(manifest["programs"])) if given.measure else ():
            model.clear()
            result["programs"].append(measure_program(model, program, given.measure, 2))
            if given.operators:
                result["operators"] += measure_operators(model, program, given.measure)
    if place.rank == 0:
        show(result)
        if given.json:
            given.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    if place.world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _runs(name, device):
    key = {"npu": "PrivateUse1", "cpu": "CPU"}[device]
    try:
        return torch._C._dispatch_has_kernel_for_dispatch_key(f"npu::{name}", key)
    except RuntimeError:
        return False


def _versions(device):
    found = {"torch": torch.__version__}
    if device == "npu":
        import torch_npu

        found["torch_npu"] = torch_npu.__version__
    return found


def show(result):
    print(f"{result['model']}, {result['layout']}, {result['formats']}, on {result['devices']} x {result['device']}")
    for number, tokens in enumerate(result["tokens"]):
        print(f"tokens {number}: {' '.join(map(str, tokens))}")
    for phase, found in result["steps"].items():
        print(f"{phase}: {found['count']} steps, {found['median_s'] * 1e3:.2f} ms (median, the first left out)")
    for program in result["programs"]:
        gear = program["gear"]
        size = f"{gear['sequences']} x {gear['tokens']} tokens, context {program['context_tokens']}"
        print(f"{program['phase']} {size}: {program['step']['median_s'] * 1e3:.3f} ms a step")
        for unit, found in program["units"].items():
            print(f"  {unit:32} {found['calls_a_step']:3} x {found['median_s'] * 1e3:9.3f} ms")


def main():
    try:
        run(arguments())
    except Stop as reason:
        print(f"run.py: {reason}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
