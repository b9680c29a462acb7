"""Calibration for a named model, on a device that is made up: what each of its ops takes is known, and so is what a
step of the model takes there; the profile that comes out has to say so."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import subprocess
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

import hw_profiles
from backends import registry
from backends.interface import Capabilities, DeviceInfo, Order
from model.hf_config import load_config
from model.ops import OPS
from model.split import Layout
from runtime import pricing
from runtime.execution.local.load import embedded_checkpoint
from runtime.porting import (
    calibrate,
    calibrate_cache,
    calibrate_calls,
    calibrate_model,
    calibrate_network,
    calibrate_ops,
    calibrate_sizes,
)
from runtime.porting.calibrate_calls import ModelRank, RankStep
from runtime.porting.calibrate_ops import AXES, OpClock
from runtime.porting.calibrate_sizes import Effort
from runtime.porting.kernel_fit import FitBasis, Measurement, fitted
from runtime.pricing.eras import Chosen
from runtime.pricing.kernel import kernel_from_json
from runtime.pricing.network import Network
from runtime.serving.pricing import BatchShape
from runtime.simulation.build import PriceTables, pricer_of, spec_for
from tests.calibrate.test_fast_device import Buffer, Chip, MadeUp

SMALL = Effort(
    widths=(256, 1024), rows=(1, 64), tokens=(8, 64), chunks=(64,), rounds=1, cold_bytes=64e6,
    messages=(2.0**12, 2.0**18, 2.0**26),
)  # fmt: skip
HOP_S, LINK = 2e-6, 4e11
SHARE = {"glm.expert_ffn": 0.6, "glm.index_scores": 0.3, "glm.expanded_attention": 0.4, "glm.linear": 0.8}
"""Of the device's best rates, 0.5 where nothing is said."""


def bytes_of(avals: Sequence[Any]) -> float:
    return float(sum(math.prod(aval.shape) * aval.dtype.itemsize for aval in avals))


def op_s(chip: Chip, name: str, ins: Sequence[Any], outs: Sequence[Any], attributes: Mapping[str, Any],
         chosen: np.ndarray | None = None, groups: int = 1) -> float:  # fmt: skip
    """What an op takes: its launch, and its products or its bytes at a share of the best rates. chosen: experts, beside
    which are those of other groups of devices."""
    x, moved = ins[0], bytes_of([*ins, *outs])
    if name in ("glm.latent_attention", "glm.expanded_attention", "glm.sparse_attention", "glm.paged_attention"):
        b, t, heads, width = x.shape
        pages, table = ins[1], ins[3] if name == "glm.paged_attention" else ins[2]
        context = table.shape[1] * pages.shape[1]
        moved = bytes_of([x, *outs]) + b * context * math.prod(pages.shape[2:]) * 2
        if name == "glm.expanded_attention":
            wide = width + ins[4].shape[2]
            flops = 2.0 * b * context * heads * (wide * ins[3].shape[2] + t * wide)
        else:
            keys = ins[3].shape[2] if name == "glm.sparse_attention" else context
            flops = 2.0 * b * t * heads * keys * (width + attributes.get("value_dim", width))
    elif name == "glm.index_scores":
        flops = 2.0 * math.prod(outs[0].shape) * x.shape[2] * x.shape[3]
        moved = bytes_of([x, *outs]) + x.shape[0] * outs[0].shape[2] * x.shape[3] * 2
    elif name == "glm.expert_ffn":
        (tokens, k), gate_up = ins[1].shape, ins[3]
        held, rows = gate_up.shape[0], tokens * k / groups
        active = held * (1 - (1 - k / (held * groups)) ** tokens)  # of experts that are chosen at random
        if chosen is not None:
            active, rows = len(np.unique(chosen[chosen < held])), np.sum(chosen < held)
        moved = bytes_of(ins[3:]) * active / gate_up.shape[0] + 4.0 * rows * x.shape[1]
        flops = 6.0 * rows * x.shape[1] * gate_up.shape[3]
    elif name == "glm.linear":
        flops = 2.0 * math.prod(x.shape) * math.prod(ins[1].shape[1:])
    elif name == "glm.head_linear":
        flops = 2.0 * math.prod(x.shape) * ins[1].shape[2]
    elif name == "glm.route":
        flops = 2.0 * math.prod(x.shape) * ins[1].shape[1]
    else:
        flops = 0.0
        if name == "glm.cache_write":
            moved = 2.0 * bytes_of(ins[1:2])
    share = SHARE.get(name, 0.5)
    return chip.launch_s + max(flops / chip.flops_per_s, moved / chip.bytes_per_s) / share


def sent_s(name: str, size: float, group: int) -> float:
    ways = 2 if name == "psum" else 1
    moved = size if name == "ppermute" else ways * (group - 1) / group * size
    return ways * math.ceil(math.log2(group)) * HOP_S + moved / LINK + 5e-6


class Modelled(MadeUp):
    """The made-up device, which knows what the contract's ops and collectives take."""

    spreads = True

    def __init__(self, chip: Chip, devices: int = 1, fp8: bool = True):
        super().__init__(chip)
        self.devices, self.fp8 = devices, fp8

    def capabilities(self) -> Capabilities:
        held = tuple(DeviceInfo(i, "made up", self.chip.memory_bytes) for i in range(self.devices))
        return Capabilities("made-up", held, frozenset({"bfloat16"}), "bfloat16", self.fp8, True, False)

    def load(self, artifact: Any, devices: Any = ()) -> Any:
        if not artifact.mesh:
            return super().load(artifact, devices)
        ((axis, group),) = artifact.mesh.items()
        local = jax.ShapeDtypeStruct((artifact.args[0].shape[0] // group,), artifact.args[0].dtype)
        traced = jax.make_jaxpr(artifact.fn, axis_env=[(axis, group)])(local)

        def run(x: Any) -> Any:
            self.now += self.chip.dispatch_s
            for eqn in traced.jaxpr.eqns:
                name = eqn.primitive.name.removesuffix("_invariant")
                if name in ("psum", "all_gather", "reduce_scatter", "all_to_all", "ppermute"):
                    self.now += sent_s(
                        name, max(bytes_of([v.aval for v in each]) for each in (eqn.invars, eqn.outvars)), group
                    )
            return x, Buffer((group,), x.dtype)

        return run

    def put(self, array: Any, order: Order | None = None) -> Buffer:
        held = super().put(array, order)
        held.values = np.asarray(array)  # type: ignore[attr-defined]
        return held

    def exhausted(self, error: Exception) -> bool:
        return False

    def _seconds(self, jaxpr: Any, args: tuple[Any, ...]) -> float:
        held = dict(zip(jaxpr.invars, jax.tree.leaves(args, is_leaf=lambda x: isinstance(x, Buffer)), strict=True))
        total = super()._seconds(jaxpr, args)
        for eqn in jaxpr.eqns:
            if eqn.primitive.name == "dynamic_update_slice":
                total += self.chip.launch_s
            if eqn.primitive.name != "composite":
                continue
            name, chosen = eqn.params["name"], None
            if name == "glm.expert_ffn":
                chosen = held[eqn.invars[1]].values
            ins, outs = ([var.aval for var in each] for each in (eqn.invars, eqn.outvars))
            total += op_s(self.chip, name, ins, outs, calibrate_calls.attributes_of(eqn), chosen)
        return total


def calibrated(
    backend: Modelled, rank: ModelRank, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> hw_profiles.Profile:
    clock = types.SimpleNamespace(perf_counter=lambda: backend.now, strftime=lambda _: "2026-11-29")
    for module in (calibrate, calibrate_cache, calibrate_sizes, calibrate_ops, calibrate_network):
        monkeypatch.setattr(module, "time", clock)
    monkeypatch.setattr(calibrate_calls, "_CONTEXTS", (512, 8192))
    monkeypatch.setattr(calibrate_ops, "_points", lambda *_: {})  # of other shapes, which take as long to trace
    monkeypatch.setattr("runtime.porting.calibrate_model.chunk_kernel", lambda *_: "sparse")
    monkeypatch.setattr(
        calibrate, "local_devices", lambda backend: [*range(backend.devices)] if backend.devices > 1 else []
    )
    monkeypatch.setattr(calibrate_network, "_zeros", lambda devices, local, dtype: Buffer((local,), np.float32))
    found = calibrate.measure(backend, SMALL, rank=rank)
    described = calibrate.profile(found, backend, "made-up", "made-up.prices.json")
    (folder / "made-up.toml").write_text(hw_profiles.dumps(described))
    (folder / "made-up.prices.json").write_text(json.dumps(calibrate.prices(found, described)))
    return hw_profiles.load(str(folder / "made-up.toml"))


def step_s(chip: Chip, rank: ModelRank, step: RankStep, rows: int) -> float:
    """What a step takes on the made-up device, op by op of the traced graph. rows: whose tokens are chosen."""
    total, tp = 0.0, rank.layout.tp
    counts = [(kind, rank.cfg.layer_counts[kind]) for kind in rank.kinds]
    for what, count in [*counts, (None, 1)]:
        at = step if what else RankStep(rows, 1, 16, 16)
        for call in calibrate_calls.calls(rank, what, at, "bfloat16", rank.stored_fp8):
            outs = jax.tree.leaves(
                jax.eval_shape(lambda *ops, c=call: OPS[c.name].meaning(*ops, **c.attributes), *call.operands)
            )
            total += count * op_s(chip, call.name, call.operands, outs, call.attributes, None, rank.layout.ep)
        if what and tp > 1:  # what attention and what the feed-forward part gives
            size = 2.0 * step.sequences * step.tokens * rank.cfg.hidden_size
            total += count * 2 * sent_s("psum", size, tp)
    return total


CASES = [
    pytest.param("glm-5-fp8", Layout(tp=8), "fp8", id="an indexer, FP8, eight ranks"),
    pytest.param("glm-4.7-flash", Layout(), "bf16", id="dense latents", marks=pytest.mark.slow),
    pytest.param("glm-4.5-air", Layout(tp=4, ep=4), "bf16", id="grouped queries, whole experts on four ranks",
                 marks=pytest.mark.slow),
]  # fmt: skip


@pytest.mark.parametrize(("model", "layout", "formats"), CASES)
def test_steps_of_the_model_come_back(
    model: str, layout: Layout, formats: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At sizes that were measured and between them: contexts that an indexer selects whole, and longer ones."""
    rank, chip = ModelRank(load_config(model), layout), Chip(dispatch_s=32e-6)
    written = calibrated(Modelled(chip, layout.devices), rank, tmp_path, monkeypatch)
    made = spec_for(rank.cfg, written, layout, formats, engine="glm5", expert_load="uniform")
    pricer = pricer_of(made, PriceTables(coarse=True))
    for sequences, context in ((8, 512), (8, 8192), (24, 2048), (32, 4096)):
        end = round(0.75 * context)
        shape = BatchShape(np.full(sequences, end), decode_rows=sequences)
        asked = step_s(chip, rank, RankStep(sequences, 1, context, end), sequences)
        assert pricer.seconds(shape) == pytest.approx(asked, rel=0.08), (sequences, context)
        between = 8 < sequences < 64 and 512 < context < 8192
        assert not (between and pricer.price(shape).extrapolated)
    for tokens, context in ((64, 512), (64, 8192)):
        end = round(0.75 * context)
        shape = BatchShape(prefill_chunks=[(tokens, end - tokens)])
        assert pricer.seconds(shape) == pytest.approx(
            step_s(chip, rank, RankStep(1, tokens, context, end), 1), rel=0.08
        )


def test_collectives_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of groups that were measured by their curves, of others by the links that the curves say."""
    backend = Modelled(Chip(), 8)
    monkeypatch.setattr(calibrate_network, "time", types.SimpleNamespace(perf_counter=lambda: backend.now))
    monkeypatch.setattr(calibrate_network, "_zeros", lambda devices, local, dtype: Buffer((local,), np.float32))
    found = calibrate_network.measure_network(backend, [*range(8)], "bfloat16", 1, SMALL.messages)
    figures = {path: value for path, (value, _) in found.figures().items()}
    assert figures["link.scale_up.latency_s"] == pytest.approx(HOP_S, rel=0.2)
    assert figures["overhead.p2p_latency_s"] == pytest.approx(sent_s("ppermute", 4096, 8), rel=0.01)
    assert figures["link.scale_up.bandwidth_bytes_per_s"] == pytest.approx(LINK, rel=0.01)
    assert found.shares()[-1][1] == pytest.approx(1, rel=0.01)
    figures["efficiency.network"] = found.shares()[-1][1]
    rates = {"chip.peak.bf16_flops_per_s": 1e14, "chip.memory.bandwidth_bytes_per_s": 1e12}
    chip = pricing.Chip.from_fields("made-up", {**figures, **rates}.get)
    curves = {key: Chosen(body) for key, body in found.collectives().items()}
    network, formula = (Network(chip, tables, "sglang") for tables in (curves, {}))
    for op, primitive in (("all_reduce", "psum"), ("all_gather", "all_gather"), ("reduce_scatter", "reduce_scatter"),
                          ("all_to_all", "all_to_all")):  # fmt: skip
        for group in (2, 4, 8):
            asked = sent_s(primitive, 2.0**18, group)
            measured = network.collective(op, 2.0**18, group)  # type: ignore[arg-type]
            assert measured.seconds == pytest.approx(asked, rel=0.01) and "calibrate" in "".join(measured.sources)
            assert formula.collective(op, 2.0**18, group).seconds == pytest.approx(asked, rel=0.5)  # type: ignore[arg-type]
    assert network.point_to_point(2.0**26).seconds == pytest.approx(sent_s("ppermute", 2.0**26, 8), rel=0.05)


def test_shapes_that_were_not_measured_together_are_between_those_that_were() -> None:
    """Ratios of a kernel whose sizes make no grid: exact where it was measured, and between two shapes between them."""
    basis, points = FitBasis(1e14, 1e12), []
    for n, k, slower in ((512, 1024, 1.0), (2048, 1024, 3.0), (768, 4096, 2.0)):
        for m in (1, 16, 256) if n != 512 else (1, 256):
            features = {"m": float(m), "n": float(n), "k": float(k), "weight_bytes": 2.0, "act_bytes": 2.0}
            moved = 2.0 * (n * k + m * k + m * n)
            points.append(Measurement(features, slower * (5e-6 + 2.0 * m * n * k / 5e13 + moved / 8e11)))
    kernel = kernel_from_json("gemm/bf16/any", fitted("gemm", points, basis, "made up", AXES["gemm"]))

    def seconds(**features: float) -> float:
        sizes = {"weight_bytes": 2.0, "act_bytes": 2.0, **features}
        return float(kernel.time({name: np.array(size) for name, size in sizes.items()}, 1e14, 1e12).seconds)

    for point in points:
        assert seconds(**point.features) == pytest.approx(point.seconds, rel=0.01)
    assert seconds(n=512, k=1024, m=16) < seconds(n=1024, k=1024, m=16) < seconds(n=2048, k=1024, m=16)


def test_a_rank_of_a_real_machine_is_measured() -> None:
    """The host itself, with ops of the embedded model."""
    rank = ModelRank(load_config(embedded_checkpoint()))
    bench = calibrate_model._Bench(registry.usable("cpu"), rank, "float32", 1e11, 1e10, OpClock(1))
    names = ("glm.linear", "glm.route", "glm.expert_ffn", "glm.latent_attention")
    found = bench.points([RankStep(2, 1, 16, 12)], rank.kinds[-1:], names)
    assert {"latent_decode/f32/any", "gemm/f32/any", "moe/f32/any", "memory/route/any"} == set(found)
    assert all(0 < point.seconds < 1 for _, points in found.values() for point in points)


def test_matrices_lie_as_the_engine_has_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a backend asks for them as checkpoints have them."""
    cpu = registry.usable("cpu")
    asking = dataclasses.replace(cpu.capabilities(), out_in=frozenset({"glm.linear"}))
    lying: list[Order | None] = []
    put = cpu.put
    monkeypatch.setattr(cpu, "capabilities", lambda: asking)
    monkeypatch.setattr(cpu, "put", lambda array, order=None: lying.append(order) or put(array, order))
    rank = ModelRank(load_config(embedded_checkpoint()))
    bench = calibrate_model._Bench(cpu, rank, "float32", 1e11, 1e10, OpClock(1))
    found = bench.points([RankStep(1, 1, 16, 12)], rank.kinds[-1:], ("glm.head_linear",))
    assert set(found) == {"bmm/f32/any"} and set(lying) == {None}
    found = bench.points([RankStep(1, 1, 16, 12)], [None], ("glm.linear",))
    assert set(found) == {"gemm/f32/any"} and set(lying) == {None, (1, 0)}


@pytest.mark.slow
def test_devices_of_a_real_machine_talk() -> None:
    """Four devices that XLA makes of the host, in a process of its own."""
    code = (
        "from backends import registry\n"
        "from runtime.porting.calibrate_network import local_devices, measure_network\n"
        "cpu = registry.usable('cpu')\n"
        "found = measure_network(cpu, local_devices(cpu), 'float32', 3, (2.0**12, 2.0**20))\n"
        "assert found.devices == 4 and set(group for _, group in found.sent) == {2, 4}\n"
        "assert all(s > 0 for points in found.sent.values() for _, s in points), found\n"
        "print(found.figures()['overhead.p2p_latency_s'][0])\n"
    )
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4"
    ran = subprocess.run([sys.executable, "-c", code], env={**os.environ, "XLA_FLAGS": flags}, capture_output=True,
                         text=True)  # fmt: skip
    assert ran.returncode == 0, ran.stderr
    assert 0 < float(ran.stdout) < 1


def test_no_more_than_fits_is_measured() -> None:
    """The device has room for two of the 256 experts that the model has, and eight are chosen; half that many are too
    few to choose from."""
    rank = ModelRank(load_config("glm-5"))
    step = RankStep(4, 1, 16, 16)
    (call,) = (c for c in calibrate_calls.calls(rank, rank.kinds[-1], step, "bfloat16", False)
               if c.name == "glm.expert_ffn")  # fmt: skip
    one = bytes_of(call.operands[3:]) / 256

    def held(experts: float) -> int:
        chip = Chip(memory_bytes=int(8 * experts * one))
        bench = calibrate_model._Bench(Modelled(chip), rank, "bfloat16", 1e15, 4e12, OpClock(1, 32e-6, 2e-6))
        case = bench._case(step, call)
        return case.call.operands[3].shape[0] if case else 0

    assert held(16.5) == 16 and held(300) == 256 and held(4) == 0


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (("--model", "glm-5", "--tp", "7"), "heads / tp = 64 / 7"),
        (("--model", "glm-5", "--tp", "8", "--ep", "3"), "ep must divide tp x dp = 8"),
        (("--model", "glm-4.5", "--tp", "12"), "KV heads / tp = 8 / 12"),
        (("--model", "glm-6"), "glm-6"),
        (("--tp", "2"), "add --model"),
        (("--from", "x.json", "--profile", "h200-sxm", "--model", "glm-5"), "leave out --model"),
    ],
)
def test_bad_input_is_one_line(given: tuple[str, ...], says: str, tmp_path: Path, capsys: Any) -> None:
    from runtime.cli.main import main

    with pytest.raises(SystemExit) as caught:
        main(["calibrate", "--out", str(tmp_path / "host.toml"), *given])
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and len(err.strip().splitlines()) == 1 and says in err
    assert not list(tmp_path.iterdir())
