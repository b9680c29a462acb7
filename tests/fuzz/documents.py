"""Plans, packages, and what is planned and simulated with, damaged, and who reads them."""

from __future__ import annotations

import functools
import io
import json
import tempfile
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

import hw_profiles
from hw_profiles.loader import PROFILES
from model.hf_config import load_config
from model.split import Layout
from runtime.deployment import engines
from runtime.deployment.manifest import FILE as MANIFEST_FILE
from runtime.deployment.manifest import Manifest
from runtime.deployment.plan import Plan, _digest
from runtime.deployment.tensors import TensorReader, TensorWriter, numpy_dtype
from runtime.planning.check import check
from runtime.planning.experts import read_load, read_placement
from runtime.planning.launch import launch
from runtime.pricing import load as expert_load
from runtime.pricing.book import PRICES_FOLDER, read_prices
from runtime.serving.workload import mooncake_trace
from runtime.simulation.validation import read_rows
from runtime.training import config as training
from tests.export.test_manifest import MANIFEST
from tests.fuzz import graphs
from tests.fuzz.checkpoints import damaged_safetensors
from tests.fuzz.kind import CHECKPOINT, Kind, document_of, of_json, of_toml
from tests.fuzz.mutations import (
    encoded,
    mutated_bytes,
    mutated_csv,
    mutated_json,
    text_of,
)  # fmt: skip
from tests.plans import formats, plan_for


@functools.cache
def _plan() -> Plan:
    cfg = load_config(CHECKPOINT)
    return plan_for(cfg, Layout(2, 1, 2), hw_profiles.load("h200-sxm"), formats("bf16"))


def _rehashed_plan(rng: Random) -> bytes:
    """A plan whose sender has hashed it anew."""
    held = json.loads(_plan().text)
    made = mutated_json(rng, held)
    if not isinstance(made, dict) or made.get("hash") != held["hash"] or rng.random() < 0.1:
        return mutated_bytes(rng, encoded(_plan().text))
    text = _plan_text({**made, "hash": "0" * 64})
    return encoded(text.replace("0" * 64, _digest(text), 1))


def _plan_text(document: dict[str, Any]) -> str:
    return "{\n" + ",\n".join(f" {json.dumps(k.split(chr(0))[0])}: {text_of(v)}" for k, v in document.items()) + "\n}\n"


def _plan_reads(folder: Path) -> None:
    found = Plan.read(folder / "plan.json")
    cfg = load_config(CHECKPOINT)
    found.require_model(cfg, "plan.json")
    check(found, cfg)
    launch(found, cfg, "sglang").text()


def _weights() -> bytes:
    shapes = {"a": ((20, 30), "float32"), "b": ((3,), "int32"), "c": ((4, 4), "int4"), "d": ((), "float32")}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "weights.safetensors"
        with TensorWriter(path, shapes) as writer:
            for name, (shape, dtype) in shapes.items():
                writer.put(name, np.zeros(shape, numpy_dtype(dtype)))
        return path.read_bytes()


def _weights_read(folder: Path) -> None:
    reader = TensorReader(folder / "w.safetensors")
    for name in reader.names:
        np.asarray(reader.array(name), copy=True)


# --- what is planned and simulated with


def _saved(array: np.ndarray, **how: Any) -> bytes:
    file = io.BytesIO()
    np.save(file, array, **how)
    return file.getvalue()


def _npy(rng: Random) -> bytes:
    plain = _saved(np.random.default_rng(0).random((4, 16)))
    match rng.randrange(4):
        case 0:
            return mutated_bytes(rng, plain)
        case 1:
            return mutated_bytes(rng, plain[:128]) + plain[128:]
        case 2:
            shape = rng.choice(
                ("(1000000000000, 1000)", "(100000, 100000)", "(-1, 16)", "(0, 16)", "(2**40, 8)", "()", "(64,)",
                 "(2,2,2)",
                 "(4294967296, 4294967296)", "x", "(" * 200, "-" * 9000 + "1", "__import__('os').getpid()", "9" * 5000)
            )  # fmt: skip
            dtype = rng.choice(("<f8", "<f8", "|O", "<c16", "|b1", "<M8[s]", "<U9", "|V0", "<f2", "5", "[('a','<f4')]"))
            text = f"{{'descr': {dtype!r}, 'fortran_order': False, 'shape': {shape}, }}"
            text += " " * (-(len(text) + 11) % 64) + "\n"
            return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + bytes(512)
        case _:
            value = rng.choice((np.nan, np.inf, -1.0, 1e308, 5e-324, 0.0))
            return _saved(np.full(rng.choice(((4, 16), (1, 1), (1, 50_000), (300, 8))), value))


def load_file() -> Path:
    path = Path("load.npy").absolute()
    if not path.exists():
        path.write_bytes(_saved(np.random.default_rng(0).random((4, 16))))
    return path


def _placement() -> Any:
    return {"placement": [[list(range(d * 4, d * 4 + 4)) for d in range(4)] for _ in range(4)], "gap": {"mean": 0.0}}


def _trace(rng: Random) -> bytes:
    rows = [
        {"timestamp": i * 500, "input_length": 600 + i * 100, "output_length": 5 + i, "hash_ids": [0, i]}
        for i in range(6)
    ]
    if rng.random() < 0.25:
        return mutated_bytes(rng, encoded("\n".join(map(text_of, rows))))
    made = mutated_json(rng, rows)
    return encoded("\n".join(map(text_of, made)) if isinstance(made, list) else text_of(made))


_ROWS = (
    "model,system,devices,precision,engine,engine_version,isl,osl,concurrency,tp,dp,moe_tp,ep,ttft_ms,tpot_ms,measured\n"
    "glm-5,h200-sxm,8,fp8,sglang,0.5.9,128,16,2,8,1,8,1,300,20,2026-03-25\n" * 1,
    "device,model,num_queries,query_len,context,world,tp,dp,ep,mtp,q_linear,q_attn,measured_s,name\n"
    "ascend-910c-die,glm-5,4,1,1000,16,1,16,16,0,W8A8_DYNAMIC,DISABLED,0.02,x\n",
)


def _csv(rng: Random) -> bytes:
    text = rng.choice(_ROWS)
    return mutated_bytes(rng, text.encode()) if rng.random() < 0.3 else encoded(mutated_csv(rng, text))


def _prices() -> Any:
    """One kernel's, of the file that every chip's prices are read beside."""
    held = document_of(PRICES_FOLDER / "transfer.json")
    return {**held, "kernels": dict(list(held["kernels"].items())[:1])}


def _profile_reads(folder: Path) -> None:
    found = hw_profiles.load(folder / "p.toml")
    hw_profiles.check(found)
    hw_profiles.dumps(found)


def _training_reads(folder: Path) -> None:
    found = training.read(folder / "c.toml")
    assert found.hash and found.at(0) and found.model


def kinds() -> dict[str, Kind]:
    """All of them, by name."""
    data = Path(engines.__file__).parent
    return {
        "plan": Kind("plan.json", _rehashed_plan, _plan_reads, named=False),
        "manifest": Kind(
            MANIFEST_FILE, of_json(lambda: json.loads(MANIFEST.to_json())), lambda f: Manifest.read(f), named=False
        ),
        "package weights": Kind("w.safetensors", damaged_safetensors(_weights()), _weights_read),
        "training config": Kind("c.toml", of_toml(training.DEFAULT), _training_reads),
        "engine": Kind("e.toml", of_toml(*sorted(data.glob("*.toml"))), lambda f: engines.load(str(f / "e.toml"))),
        "profile": Kind(
            "p.toml", of_toml(*(PROFILES / f"{name}.toml" for name in ("h200-sxm", "ascend-910c", "cpu-host"))),
            _profile_reads,
        ),
        "prices": Kind(
            "prices.json", of_json(_prices),
            lambda f: read_prices(f / "prices.json"),
        ),
        "trace": Kind("t.jsonl", _trace, lambda f: mooncake_trace(f / "t.jsonl")),
        "expert load": Kind(
            "counts.json", of_json(lambda: [3, 1, 4, 1, 5, 9, 2, 6]),
            lambda f: expert_load.parse(str(f / "counts.json"), 8),
        ),
        "load": Kind("l.npy", _npy, lambda f: read_load(f / "l.npy")),
        "placement": Kind(
            "place.json", of_json(_placement), lambda f: read_placement(f / "place.json", read_load(load_file()))
        ),
        "measured rows": Kind("rows.csv", _csv, lambda f: read_rows(f / "rows.csv")),
        "onnx graph": Kind("graph.onnx", graphs.onnx_graph, graphs.onnx_opens),
        "torch graph": Kind("graph.pt2", graphs.pt2_graph, graphs.pt2_opens),
        "stablehlo graphs": Kind("graph.jax_export", graphs.stablehlo_graph, graphs.stablehlo_opens),
    }  # fmt: skip
