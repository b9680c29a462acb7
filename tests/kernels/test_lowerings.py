"""Which calls kernels take, of every preset and rank, and what an artifact then holds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from backends import registry
from backends.cpu import CpuBackend
from backends.cuda import CudaBackend
from backends.errors import ArtifactError
from backends.interface import Program
from backends.kernels import attention
from backends.kernels.forms import FORMS
from backends.kernels.launch import CUSTOM_CALL
from backends.kernels.products import tiles_of
from backends.kernels.table import KERNELS, WITHOUT
from backends.toolchains import stablehlo
from backends.toolchains.walker import Graph, Port
from foundation.errors import UsageError
from model import abstract, ops
from model.config import LayerType, ModelConfig
from model.graph import Batch, Mode, StepOutput
from model.hf_config import load_config
from model.parallel import Parallel
from model.split import Layout
from runtime.execution.local.programs import Programs
from tests.cli.cli import glm5
from tests.marks import slow_but


def composites(jaxpr: Any) -> Iterator[Any]:
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "composite":
            yield eqn
        elif eqn.primitive.name in ("jit", "pjit"):
            yield from composites(eqn.params["jaxpr"].jaxpr)


def refused(cfg: ModelConfig, kind: LayerType, layout: Layout, fp8: bool, pages: int) -> dict[str, set[str]]:
    """Op to why its kernels do not take a call, over one rank's layer: a step of 16 sequences."""
    shape, local = abstract.StepShape(16, 1, pages), layout.local_shape
    weights = abstract.abstract_weights(cfg, kind, keep_fp8=fp8, local=local)
    cache = abstract.abstract_cache(cfg, kind, shape.pages, shape.page_size, local=layout.local_row)
    traced = abstract.trace_layer(
        cfg, kind, shape, mode=Mode("absorbed"), weights=weights, cache=cache, par=Parallel.of(layout), axes=layout.axes
    )
    found: dict[str, set[str]] = {}
    for eqn in composites(traced.jaxpr):
        if (kernel := KERNELS.get(eqn.params["name"])) is None:
            continue
        if why := kernel.why_not(*(v.aval for v in eqn.invars), **ops.attributes_of(eqn)):
            found.setdefault(kernel.op, set()).add(why)
    return found


NOT_OURS = {"a matrix that is not in block-FP8: XLA's libraries have that product"}
# Shares of its dense layer of 10,944 channels, tp 8 and 16, and of its experts of 1,408, tp 16.
OUT_OF_REACH = {
    "glm-4.5-air": {
        f"a matrix of {shape}: not multiples of 16"
        for shape in ("1368 x 4096", "4096 x 1368", "684 x 4096", "88 x 4096", "4096 x 88")
    }
}
PRESETS = ("glm-5", "glm-5.2", "glm-4.7-flash", "glm-4.5", "glm-4.5-air", "deepseek-v3", "deepseek-v3.2", "kimi-k2")


@pytest.mark.parametrize("name", slow_but(["glm-5", "glm-4.5-air", "deepseek-v3"], PRESETS))
def test_kernels_take_every_preset_on_every_rank(name: str) -> None:
    """FP8 weights, contexts below and above `index_topk`, tp 1 to 16 and by expert; what is refused says why."""
    cfg = load_config(name)
    few, many = 4, 40  # pages: below and above `index_topk`
    for layout, pages in ((Layout(), few), (Layout(tp=4), many), (Layout(tp=16), few), (Layout(tp=8, ep=8), many)):
        try:
            layout.check(cfg)
        except UsageError:
            continue
        for kind in cfg.layer_counts:
            if not kind.mtp:
                for op, why in refused(cfg, kind, layout, True, pages).items():
                    left = why - OUT_OF_REACH.get(name, set())
                    assert left <= (NOT_OURS if op == "glm.linear" else set()), (op, layout, kind)


def test_every_op_has_a_kernel_or_a_reason() -> None:
    assert set(KERNELS) | set(WITHOUT) == set(ops.OPS) and not set(KERNELS) & set(WITHOUT)
    lines = glm5("backends", "--verbose").out.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("cuda"))
    told = dict(line.split(maxsplit=1) for line in lines[at + 1 : at + 1 + len(ops.OPS)])
    assert set(told) == set(ops.OPS)
    assert told["glm.expert_ffn"].startswith("kernel: bfloat16 rows")
    assert told["glm.embed"] == "decomposition: a gather, which XLA has"


@pytest.mark.parametrize("tokens, top_k, count", [(1, 4, 3), (9, 4, 40), (33, 4, 3), (33, 1, 1)])
def test_tiles_hold_every_choice_once(tokens: int, top_k: int, count: int) -> None:
    """Conservation: the tiles' places are those of all choices with an expert here, each under its expert."""
    made = jax.jit(tiles_of, static_argnums=(1, 2))
    for seed in range(8):
        ids = np.random.default_rng(seed).integers(0, count + 2 * (seed % 3), (tokens, top_k)).astype(np.int32)
        order, tiles = map(np.asarray, made(jnp.asarray(ids), count, 16))
        flat, held = ids.reshape(-1), []
        assert sorted(order) == list(range(flat.size))
        for expert, first, places in tiles:
            assert 0 <= places <= 16
            choices = order[first : first + places]
            assert (flat[choices] == expert).all()
            held += list(choices)
        assert sorted(held) == list(np.flatnonzero(flat < count))


def example() -> Program:
    """Two linears: one that kernels take, one in float32 that they do not."""

    def both(x: Any, values: Any, scale: Any, other: Any) -> Any:
        return ops.linear(x, values, scale), ops.linear(other, other)

    s = jax.ShapeDtypeStruct
    args = (s((1, 1, 128), "bfloat16"), s((128, 2, 32), "float8_e4m3fn"), s((1, 2, 1), "float32"), s((4, 4), "float32"))
    return Program("linears", both, args, needs=frozenset({"fp8_weights"}))


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("kind", ["bfloat16", "float8_e4m3fn", "records"])
def test_a_row_is_written_in_either_form(tokens: int, kind: str) -> None:
    """To the bit, to the first and last places and to page 0, padding's; other rows are as they were."""
    rng = np.random.default_rng(tokens)
    plain, width = (64, 512 + 64) if kind == "records" else (0, 32)
    rows = jnp.asarray(rng.standard_normal((1, tokens, width)), "bfloat16")
    held = (5, 4, 656) if kind == "records" else (5, 4, width)
    made = rng.integers(0, 100, held) if kind == "records" else rng.standard_normal(held)
    pages = jnp.asarray(made, "uint8" if kind == "records" else kind)
    written = FORMS["glm.cache_write"]
    for first in (0, 3, 9, 20 - tokens):
        slots = jnp.arange(first, first + tokens, dtype=jnp.int32)[None]
        ours, meant = (
            np.asarray(jax.jit(lambda *given, run=run: run(*given, cache="latent", plain=plain))(pages, rows, slots))
            for run in (written, ops.OPS["glm.cache_write"].meaning)
        )
        assert ours.dtype == meant.dtype and (ours.view(np.uint8) == meant.view(np.uint8)).all()
        same = np.delete(np.arange(20), np.asarray(slots))
        before = np.asarray(pages).reshape(20, -1)[same].view(np.uint8)
        assert (ours.reshape(20, -1)[same].view(np.uint8) == before).all()


@pytest.mark.parametrize("shape, matrix", [((1, 1, 48), (48, 640)), ((1, 48), (48, 2, 320)), ((1, 1, 48), (48, 24)),
                                           ((2, 1, 48), (48, 640))])  # fmt: skip
def test_a_product_is_one_in_either_form(shape: tuple[int, ...], matrix: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x, weight = (jnp.asarray(rng.standard_normal(each), "float32") for each in (shape, matrix))
    ours = np.asarray(FORMS["glm.linear"](x, weight))
    exact = np.tensordot(np.asarray(x, np.float64), np.asarray(weight, np.float64), 1)
    assert ours.shape == exact.shape and np.abs(ours - exact).max() < 1e-5


class Told(CpuBackend):
    """Tells its compiler what it does not know."""

    compiler_options = {"xla_no_such_option": 0}


def test_an_option_that_a_compiler_does_not_know_is_left_out() -> None:
    s = jax.ShapeDtypeStruct((3,), "float32")
    for optimise in (True, False):
        program = Program("twice", lambda x: x + x, (s,), optimise=optimise)
        backend = Told()
        assert backend.load(backend.export(program))(np.ones(3, np.float32)).tolist() == [2, 2, 2]


def test_an_artifact_holds_the_kernels_where_they_reach() -> None:
    """Exported without a GPU, for the card that the adapter exports for; it says so."""
    artifact = registry.get("cuda").export(example())
    module = export.deserialize(bytearray(artifact.payload)).mlir_module()
    assert module.count(f"@{CUSTOM_CALL}") == 1 and module.count("stablehlo.dot_general") == 1
    assert artifact.versions["compute_capability"] == "9.0"


class OfCard(CudaBackend):
    """The adapter beside a card of a compute capability, as far as that is asked before compiling. says: what its
    driver says to a kernel that is tried."""

    def __init__(self, capability: str, says: str = ""):
        self._says = says
        self._found = [type("Card", (), {"compute_capability": capability, "device_kind": "a card", "id": 0,
                                         "memory_stats": lambda self: None})()], None  # fmt: skip

    def _try_a_kernel(self) -> None:
        if self._says:
            raise jax.errors.JaxRuntimeError(self._says)


REFUSED = "INTERNAL: ptxas fatal : Unsupported .version 8.6; current version is '8.4'\n  in a second line"


def test_a_driver_that_refuses_kernels_gets_the_decompositions_and_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    old = OfCard("9.0", REFUSED)
    assert old.lowerings() == {} and OfCard("9.0").lowerings().keys() == KERNELS.keys() | FORMS.keys()
    (note,) = set(old.op_notes().values())
    assert note == f"decomposition: the driver does not take kernels ({REFUSED.splitlines()[0]}); a newer one may"
    artifact = old.export(example())
    assert "compute_capability" not in artifact.versions  # so any card may run it
    monkeypatch.setenv("GLM5_KERNELS", "off")  # nothing is tried then
    assert set(old.op_notes().values()) == {"decomposition: GLM5_KERNELS=off"}


def test_the_kernel_that_is_tried_is_one_launch() -> None:
    s = jax.ShapeDtypeStruct
    exported = export.export(
        jax.jit(lambda *given: attention.join((9, 0), *given)), platforms=["cuda"],
        disabled_checks=[export.DisabledSafetyCheck.custom_call(CUSTOM_CALL)],
    )(s((1, 2, 512), "float32"), s((1, 2, 2), "float32"))  # fmt: skip
    assert exported.mlir_module().count(f"@{CUSTOM_CALL}") == 1


class Refusing(CpuBackend):
    """A driver that refuses a kernel as a program is loaded, as it is called, or as its result is fetched."""

    explain = CudaBackend.explain

    def __init__(self, where: str):
        self._where = where

    def _at(self, where: str) -> Any:
        if where == self._where:
            raise jax.errors.JaxRuntimeError(REFUSED.replace("version 8.6", "target sm_100a"))

    def export(self, program: Program) -> Any:
        return None

    def load(self, artifact: Any, devices: Any = ()) -> Any:
        self._at("load")

        def run(weights: Any, caches: Any, *_: Any) -> Any:
            self._at("call")
            logits: Any = np.ones((1, 1), np.float32)
            return StepOutput(logits, logits, caches), logits, None

        return run

    def get(self, buffer: Any) -> Any:
        self._at("get")


@pytest.mark.parametrize("where", ["load", "call", "get"])
def test_a_kernel_that_is_refused_later_is_a_line(where: str) -> None:
    weights = {"outer": {}, "layers": [], "mtp": []}
    programs = Programs(Refusing(where), load_config("glm-4.7-flash"), weights, 1, 1, "float32")
    ones = np.ones(1, np.int32)
    with pytest.raises(ArtifactError) as said:
        programs.step(Batch(ones[:, None], ones - 1, ones, ones[:, None]), Mode())
    text = str(said.value)
    assert "\n" not in text and "Unsupported .target sm_100a" in text and "GLM5_KERNELS=off" in text


def test_a_card_below_8_0_gets_the_decompositions_and_a_line() -> None:
    old = OfCard("7.5")
    assert old.lowerings() == {}
    assert set(old.op_notes().values()) == {"decomposition: kernels need compute capability 8.0, not 7.5"}
    assert "compute capability 8.0 or newer is needed" in str(old.unavailable())


def test_kernels_of_another_card_are_refused_in_a_line() -> None:
    artifact = registry.get("cuda").export(example())
    with pytest.raises(ArtifactError, match="linears has kernels for compute capability 9.0, this GPU has 8.0; export"):
        OfCard("8.0").load(artifact)
    assert OfCard("8.9").export(example()).versions["compute_capability"] == "8.9"


def test_a_package_for_cuda_holds_the_kernels() -> None:
    """`glm5 export --format stablehlo`: the file for JAX on cuda has them; the neutral one, and the CPU's, do not."""
    program = example()
    traced = jax.make_jaxpr(program.fn)(*program.args)
    inputs, outputs = (
        tuple(Port(f"{side}{i}", each.shape, str(each.dtype)) for i, each in enumerate(avals))
        for side, avals in (("in", traced.in_avals), ("out", traced.out_avals))
    )
    graph = Graph("linears", traced, inputs, outputs)
    assert CUSTOM_CALL in stablehlo.text(graph, "cuda") and CUSTOM_CALL not in stablehlo.text(graph, "cpu")
    assert "glm.linear" in stablehlo.neutral(graph) and CUSTOM_CALL not in stablehlo.neutral(graph)


def test_a_switch_turns_them_off(monkeypatch: pytest.MonkeyPatch) -> None:
    backend = CudaBackend()
    assert set(backend.lowerings()) == KERNELS.keys() | FORMS.keys()
    monkeypatch.setenv("GLM5_KERNELS", "off")
    assert not backend.lowerings() and all("GLM5_KERNELS=off" in note for note in backend.op_notes().values())
    monkeypatch.setenv("GLM5_KERNELS", "no")
    with pytest.raises(UsageError, match="on or off"):
        backend.lowerings()
