"""The device contract: capabilities before compiling, artifacts in between, honest refusals."""

from __future__ import annotations

import functools
import subprocess
import sys
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from jax import export, lax
from jax.sharding import AbstractMesh, NamedSharding, PartitionSpec

from backends import registry
from backends.cpu import cache_write, expert_ffn, select_topk, sparse_attention
from backends.errors import ArtifactError, BackendUnavailable, UnknownBackend, Unsupported
from backends.interface import Artifact, Program
from backends.spmd.stages import sharded
from model import ops
from tests.marks import slow_but

CPU = registry.get("cpu")
HAS_CUDA = registry.get("cuda").unavailable() is None
PAIR = (jax.ShapeDtypeStruct((4,), "float32"), jax.ShapeDtypeStruct((4,), "float32"))


def scaled_sum(cache: jax.Array, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    cache = cache + x
    return cache, cache * 2.0


PROGRAM = Program("scaled_sum", scaled_sum, PAIR, donate=(0,), needs=frozenset({"float32"}))


def test_what_is_loaded_is_what_was_exported() -> None:
    """The artifact alone, through its bytes, computes the program."""
    artifact = Artifact.from_bytes(CPU.export(PROGRAM).to_bytes())
    run = CPU.load(artifact)
    cache, out = run(CPU.put(np.ones(4, np.float32)), CPU.put(np.arange(4, dtype=np.float32)))
    np.testing.assert_array_equal(CPU.get(cache), [1, 2, 3, 4])
    np.testing.assert_array_equal(CPU.get(out), [2, 4, 6, 8])


def test_donated_buffers_are_taken_over() -> None:
    run = CPU.load(CPU.export(PROGRAM))
    cache = CPU.zeros((4,), "float32")
    address = cache.unsafe_buffer_pointer()
    updated, _ = run(cache, CPU.put(np.ones(4, np.float32)))
    assert cache.is_deleted() and updated.unsafe_buffer_pointer() == address


def test_lowerings_are_part_of_the_artifact() -> None:
    class Doubling(type(CPU)):
        def lowerings(self):
            return {"glm.rms_norm": lambda x, w, *, eps: x * 2.0}

    def norm(x: jax.Array, w: jax.Array) -> jax.Array:
        return ops.rms_norm(x, w, eps=1e-5)

    backend = Doubling()
    run = backend.load(backend.export(Program("norm", norm, PAIR)))
    np.testing.assert_array_equal(run(np.full(4, 3, np.float32), np.ones(4, np.float32)), np.full(4, 6))


def _on_mesh() -> Program:
    """A norm and a sum over devices of one's share, whose last argument is not used."""
    mesh = AbstractMesh((2, 2), ("dp", "tp"))

    def share(weights: jax.Array, cache: jax.Array, x: jax.Array, unused: jax.Array) -> tuple[jax.Array, jax.Array]:
        return lax.psum(ops.rms_norm(x, weights, eps=1e-5), "tp"), cache + 1.0

    def split(shape: tuple[int, ...], *spec: str | None) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, "float32", sharding=NamedSharding(mesh, PartitionSpec(*spec)))

    args = (split((8,), "tp"), split((4, 4), "dp"), split((2, 8), "dp", "tp"), split((2,), "dp"))
    return sharded(Program("norm", share, args, donate=(1,)), mesh)


def test_a_program_of_several_devices_is_exported_without_any() -> None:
    """For a chip that is not here, with the mesh and every argument's place on it in the artifact."""
    cuda, program = registry.get("cuda"), _on_mesh()
    artifact = Artifact.from_bytes(cuda.export(program).to_bytes())
    assert artifact.mesh == {"dp": 2, "tp": 2} and artifact.devices == 4
    exported = export.deserialize(bytearray(artifact.payload))
    assert exported.nr_devices == 4
    mesh = program.args[0].sharding.mesh
    assert exported.in_shardings_jax(mesh) == tuple(each.sharding for each in program.args)
    with pytest.raises(BackendUnavailable, match="norm runs on 4 devices together; backend cpu is given 1"):
        CPU.load(CPU.export(program), jax.devices("cpu")[:1])


def test_who_runs_one_device_only_says_so() -> None:
    with pytest.raises(Unsupported, match="ascend cannot run norm: it runs programs of one device only"):
        registry.get("ascend").export(_on_mesh())


def test_an_artifact_of_another_version_is_refused() -> None:
    whole = Artifact("p", "cpu", "f", (), {}, b"").to_bytes()
    with pytest.raises(ArtifactError, match="artifact version 2, this release reads 3"):
        Artifact.from_bytes(whole.replace(b'"version": 3', b'"version": 2'))


def test_buffers_are_exchanged_with_torch_without_a_copy() -> None:
    tensor = torch.arange(64, dtype=torch.float32)
    buffer = CPU.from_dlpack(tensor)
    assert buffer.unsafe_buffer_pointer() == tensor.data_ptr()
    back = torch.from_dlpack(CPU.put(np.arange(5, dtype=np.float32)))
    assert back.tolist() == [0, 1, 2, 3, 4]


def test_a_missing_capability_is_named_before_compiling() -> None:
    needy = Program("p", scaled_sum, PAIR, needs=frozenset({"float32", "fp4_weights"}))
    with pytest.raises(Unsupported, match="lacks fp4_weights"):
        CPU.export(needy)


@pytest.mark.skipif(HAS_CUDA, reason="the refusal needs a host without a GPU")
def test_cuda_without_a_gpu_exports_and_says_why_it_cannot_run() -> None:
    cuda = registry.get("cuda")
    assert cuda.capabilities().devices == ()
    artifact = cuda.export(PROGRAM)
    assert artifact.platform == "cuda" and len(artifact.payload) > 100
    with pytest.raises(BackendUnavailable, match="cuda"):
        cuda.load(artifact)
    with pytest.raises(BackendUnavailable, match="cuda cannot be used here: .*CUDA plugin is not installed"):
        registry.usable("cuda")
    with pytest.raises(ArtifactError, match="for cuda; backend cpu loads"):
        CPU.load(artifact)


def test_unknown_backend_lists_the_known_ones() -> None:
    with pytest.raises(UnknownBackend, match="'tpu'; known: cpu, cuda"):
        registry.get("tpu")


def test_the_registry_is_lazy() -> None:
    code = "import sys, backends.registry; sys.exit('jax' in sys.modules or 'backends.cpu' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@given(st.data())
def test_a_damaged_artifact_is_refused(data: st.DataObject) -> None:
    """Cut anywhere, or with any byte changed, it never loads as something else."""
    whole = Artifact("p", "cpu", "f", (1,), {"jax": "0"}, b"payload bytes").to_bytes()
    cut = data.draw(st.integers(0, len(whole) - 1))
    with pytest.raises(ArtifactError):
        Artifact.from_bytes(whole[:cut])
    payload_at = data.draw(st.integers(len(whole) - 13, len(whole) - 1))
    with pytest.raises(ArtifactError, match="truncated or altered"):
        Artifact.from_bytes(whole[:payload_at] + bytes([whole[payload_at] ^ 1]) + whole[payload_at + 1 :])


@pytest.mark.parametrize(
    ("tokens", "quantised", "elsewhere"),
    slow_but(
        [(1, True, 0), (8, False, 3), (200, True, 3), (200, False, 0)],
        # each two of them in every way
        [*product((1, 8, 200), (False, True), (0, 3)), (2, True, 3), (2, False, 0), (5, True, 0), (40, False, 3)],
    ),
)
def test_cpu_experts_equal_their_meaning(tokens: int, quantised: bool, elsewhere: int) -> None:
    """Uneven loads, experts nobody chose, and experts that live on another device."""
    rng = np.random.default_rng(tokens)
    e, d, f, k = 6, 24, 20, 3
    x = jnp.asarray(rng.standard_normal((tokens, d)), jnp.float32)
    skew = rng.standard_normal((tokens, e + elsewhere)) + np.linspace(2, -2, e + elsewhere)
    ids = jnp.asarray(np.argsort(-skew, axis=1)[:, :k].clip(max=e), jnp.int32)
    share = jnp.asarray(rng.random((tokens, k)), jnp.float32)
    gate_up = jnp.asarray(rng.standard_normal((e, d, 2, f)) * 0.2, jnp.float32)
    down = jnp.asarray(rng.standard_normal((e, f, d)) * 0.2, jnp.float32)
    matrices: tuple[jax.Array, ...] = (gate_up, down)
    if quantised:
        scales = [jnp.asarray(rng.random(s) + 0.5, jnp.float32) for s in ((e, 1, 2, 1), (e, 1, 1))]
        matrices = (gate_up.astype("float8_e4m3fn"), scales[0], down.astype("float8_e4m3fn"), scales[1])
    expected = ops.expert_ffn(x, ids, share, *matrices)
    np.testing.assert_allclose(jax.jit(expert_ffn)(x, ids, share, *matrices), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("start", "tokens"), slow_but([(6, 1), (0, 3), (0, 4), (6, 11)], product((0, 1, 6), (1, 3, 4, 11)))
)
def test_cpu_cache_writes_equal_their_meaning_and_copy_nothing(tokens: int, start: int) -> None:
    """Ragged chunks from any start, through shuffled pages; no instruction copies an array of the cache's size."""
    rng = np.random.default_rng(tokens)
    page, length = 4, np.array([tokens, max(tokens - 3, 0), 1])
    pages = jnp.asarray(rng.standard_normal((16, page, 3)), jnp.float32)
    rows = jnp.asarray(rng.standard_normal((3, tokens, 3)), jnp.float32)
    table = 1 + rng.permutation(15).reshape(3, 5)
    at = start + np.arange(tokens)
    held = table[:, at // page] * page + at % page
    slots = jnp.asarray(np.where(np.arange(tokens) < length[:, None], held, 0), jnp.int32)
    written, expected = cache_write(pages, rows, slots), ops.cache_write(pages, rows, slots)
    np.testing.assert_array_equal(written[1:], expected[1:])  # page 0 belongs to nobody
    compiled = jax.jit(cache_write, donate_argnums=(0,)).lower(pages, rows, slots).compile()
    assert "f32[16,4,3]{2,1,0} copy(" not in str(compiled.as_text())


_select = jax.jit(select_topk, static_argnames="k")


@given(st.integers(0, 2**32 - 1), st.sampled_from([2, 7]), st.sampled_from([2, 40]))
def test_cpu_selections_are_the_best_visible_with_ties_to_the_lowest(seed: int, k: int, values: int) -> None:
    """As a mask, with scores that often tie, rows that see less than k, and scores of either sign and zero."""
    rng, t, context = np.random.default_rng(seed), 3, 24
    scores = rng.integers(-values, values, (2, t, context)) * rng.choice([1 / 3, -0.0], (2, t, context))
    visible = np.arange(context) <= np.sort(rng.integers(0, context, t))[None, :, None]
    scores = jnp.asarray(np.where(visible, scores, -np.inf), jnp.float32)
    expected = np.zeros(scores.shape, bool)
    np.put_along_axis(expected, np.asarray(ops.select_topk(scores, k=k)), True, axis=2)
    chosen = np.asarray(_select(scores, k=k))
    np.testing.assert_array_equal(chosen & visible, expected & visible)


def test_cpu_sparse_attention_takes_positions_or_their_mask() -> None:
    rng, k, context = np.random.default_rng(0), 6, 16
    query = jnp.asarray(rng.standard_normal((2, 3, 4, 8)), jnp.float32)
    pages = jnp.asarray(rng.standard_normal((9, 4, 8)), jnp.float32)
    table = jnp.asarray(1 + rng.permutation(8).reshape(2, 4), jnp.int32)
    positions = jnp.asarray([[4, 5, 6], [13, 14, 15]], jnp.int32)
    scores = jnp.asarray(rng.standard_normal((2, 3, context)), jnp.float32)
    scores = jnp.where(jnp.arange(context)[None, None, :] <= positions[:, :, None], scores, -jnp.inf)
    chosen, mask = (jax.jit(select, static_argnames="k")(scores, k=k) for select in (ops.select_topk, select_topk))
    meant, ours = (
        jax.jit(functools.partial(attend, scale=0.3, value_dim=5))
        for attend in (ops.sparse_attention, sparse_attention)
    )
    expected = meant(query, pages, table, chosen, positions)
    for selected in (chosen, mask):
        out = ours(query, pages, table, selected, positions)
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
