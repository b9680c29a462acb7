"""What an assembler and XLA make of the kernels, without a GPU. Run by `make test-cuda`."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import triton

from backends.kernels import library
from backends.kernels.launch import message
from backends.kernels.variants import TARGETS, VARIANTS
from tools.kernels import KERNELS

pytestmark = pytest.mark.cuda
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
PLUGIN = find_spec("jax_cuda13_plugin") or find_spec("jax_cuda12_plugin")
WIDE = {"sparse_attention_64": 256, "latent_attention_64": 256,
        "sparse_attention_u8_64": 128, "latent_attention_u8_64": 128, "expanded_attention_64_192": 512,
        "expanded_attention_128_192": 512, "expanded_attention_128_128": 512}  # fmt: skip
"""Bytes that these may spill: 64 rows of 512 sums (a rank of eight has 8 heads, which the others take), and chunks of
prompts on sm_80 and sm_100."""
BOUNDS = {"b1": (41, 1e6), "b64": (50, 16e6), "t2048": (54, 150e6), "first2048": (50, 150e6)}
"""Of a layer: launches, and bytes of temporaries. Of the chunk, whose index scores are 67 MB and whose choices' rows
twice 101 MB, one after the other; an expert matrix in bfloat16 would be 805 or 1,611 MB."""
BOUNDS_OF_MODELS = {"b1": (30, 3e6), "b64": (32, 16e6), "t2048": (40, 300e6)}
"""The same. The least matrices of products are 2.4 MB, and 4.7 as XLA multiplies them in float32; a chunk's SiLU of
10,944 channels is 90 MB."""


@pytest.mark.parametrize("target", TARGETS)
def test_ptxas_assembles_every_kernel_and_hot_ones_do_not_spill(target: int) -> None:
    ptxas = TOOLS / ("ptxas-blackwell" if target >= 100 and (TOOLS / "ptxas-blackwell").exists() else "ptxas")
    spilling = {}
    for name in VARIANTS:
        if target == 80 and name.endswith("_u8_64"):
            continue  # not launched there: programs of 16 rows are
        path = KERNELS / "ptx" / f"{name}.sm{target}.ptx"
        (arch,) = re.findall(r"(?m)^\.target (\w+)", path.read_text())
        done = subprocess.run([ptxas, f"-arch={arch}", "-v", "-o", os.devnull, path], capture_output=True, text=True)
        assert done.returncode == 0, f"{path.name}: {done.stderr}"
        assert "serialized" not in done.stderr, f"{path.name}: its products wait for one another (C7515)"
        if spilled := sum(map(int, re.findall(r"(\d+) bytes spill", done.stderr))):
            spilling[name] = spilled
    assert spilling.keys() <= WIDE.keys() and all(spilled <= WIDE[name] for name, spilled in spilling.items())


def test_the_sources_compile_to_what_is_shipped(tmp_path: Path) -> None:
    """By the Triton that made it: one kernel, all architectures."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tools.kernels", "--only", "join_128", "--out", str(tmp_path)]
    subprocess.run(command, check=True, env=environment, capture_output=True)
    for target in TARGETS:
        name = f"join_128.sm{target}.ptx"
        assert (tmp_path / name).read_text() == (KERNELS / "ptx" / name).read_text()


@pytest.mark.skipif(PLUGIN is None, reason="JAX's CUDA plugin is not installed")
def test_the_launchers_own_writer_writes_the_same_message() -> None:
    """The plugin's, which Pallas uses, against ours."""
    from jax._src.lib import gpu_triton as theirs  # the module that Pallas takes it from

    kernel = library.compiled_kernel("sparse_attention_16", 90)
    own: Any = theirs.TritonKernel(kernel.entry, 4, 1, kernel.shared_bytes, kernel.ptx, "", 90)
    numbers: list[int | float] = [3, 8, 2048, 64, 130, 65, 0.0625]
    parameters = [theirs.create_array_parameter(0, 16)] * 7
    parameters += [theirs.create_scalar_parameter(n, "i32") for n in numbers[:-1]]
    parameters += [theirs.create_scalar_parameter(numbers[-1], "fp32")]
    parameters += [theirs.create_scalar_parameter(0, "u64")] * 2
    call = theirs.TritonKernelCall(own, 64, 1, 5, parameters)
    kinds = list(VARIANTS["sparse_attention_16"].parameters.values())[7:]
    ours = message(kernel, "sparse_attention_16", (64, 1, 5), 7, kinds, numbers, (9, 0))
    assert ours == call.to_proto("sparse_attention_16", b"")


def deviceless(what: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-m", "tests.kernels.deviceless", what], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def check_layer(name: str, figures: dict[str, Any], bounds: dict[str, tuple[int, float]]) -> None:
    launches, temporary_bytes = bounds[name.split()[-1]]
    assert figures["launches"] <= launches, (name, figures)
    assert figures["temporary_bytes"] <= temporary_bytes, (name, figures)
    assert not {"copy", "transpose"} & set(figures["kernels"]), (name, figures)


@pytest.mark.skipif(PLUGIN is None, reason="JAX's CUDA plugin is not installed")
def test_a_layer_of_each_type_compiled_for_an_h200() -> None:
    """GLM-5 as a TP8 rank at 8K, FP8 weights: few launches, no expert matrix widened or transposed, no cache copied."""
    report = deviceless("layers")
    assert len(report) == 8
    for name, figures in report.items():
        check_layer(name, figures, BOUNDS)
        assert figures["largest_bytes"] <= 4 * figures["output_bytes"], (name, figures)
        assert figures["kernels"]["triton_kernel_call_ffi"] >= (1 if name.endswith("first2048") else 4)


@pytest.mark.skipif(PLUGIN is None, reason="JAX's CUDA plugin is not installed")
def test_layers_of_smaller_models_compiled_for_an_h200() -> None:
    """Whole on one device, in FP8 and bfloat16: at batch 1 nothing of a matrix's size is written either."""
    report = deviceless("models")
    assert len(report) == 24
    for name, figures in report.items():
        check_layer(name, figures, BOUNDS_OF_MODELS)


@pytest.mark.skipif(PLUGIN is None, reason="JAX's CUDA plugin is not installed")
def test_a_step_of_the_engine_compiled_for_an_h200() -> None:
    """One program from inputs to ids, by the engine's own road: every cache is the buffer that came in, and nothing is
    copied, sorted or asked of the host. Drawing costs launches once a step, not a layer. Matrices that lie as
    checkpoints have them cost neither a launch nor memory."""
    report = deviceless("steps")
    assert report["greedy, bfloat16 [in, out] b64"] == report["greedy, bfloat16 [out, in] b64"]
    for name, figures in report.items():
        assert figures["aliased"] == figures["caches"] == 4, (name, figures)
        assert not {"copy", "transpose", "sort", "while"} & set(figures["kernels"]), (name, figures)
        assert figures["host"] == 0 and figures["temporary_bytes"] <= BOUNDS[name.split()[-1]][1], (name, figures)
        most = (
            180 if name.startswith("drawn") else 100 if "FP8" in name else 90
        )  # a record's scale is found as it is made
        assert figures["launches"] <= most, (name, figures)
    assert len(report) == 7


@pytest.mark.skipif(PLUGIN is None, reason="JAX's CUDA plugin is not installed")
def test_a_step_over_eight_h200s() -> None:
    """GLM-5 in FP8, by the road of a plan over several processes: the kernels in one program a device, caches that are
    the buffers that came in, and no collective but an all-reduce behind the embedding, attention and feed-forward and
    the gathering of logits; or, by expert, rows, experts and weights sent and rows sent back."""
    report = deviceless("spread")
    assert len(report) == 4
    for name, figures in report.items():
        assert figures["aliased"] == figures["caches"] == 4, (name, figures)
        assert not {"copy", "transpose", "sort", "while"} & set(figures["kernels"]), (name, figures)
        most = {"b1": 1e6, "b64": 24e6, "b16": 40e6}[name.split()[-1]]
        assert figures["host"] == 0 and figures["temporary_bytes"] <= most, (name, figures)
        assert figures["launches"] <= (100 if "FP8" in name else 90), (name, figures)
        assert figures["kernels"]["triton_kernel_call_ffi"] == 27, (name, figures)
        by_expert = {"all-to-all": 4}
        assert figures["collectives"] == (by_expert if "ep" in name else {"all-reduce": 5, "all-gather": 1}), name
