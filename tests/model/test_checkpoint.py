"""Checkpoints: what we write, transformers reads back the same; FP8 blocks; and how lazily we read."""

from __future__ import annotations

import dataclasses
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from foundation.errors import UsageError
from model import checkpoint_writer
from model.checkpoint import Checkpoint, dequantise_blocks, groups
from model.checkpoint_writer import quantise_blocks, save
from model.errors import CheckpointError
from model.formats import FP8_BLOCK
from model.hf_config import from_hf
from model.weights import Quantized
from tests.marks import slow_but
from tests.model.oracle import (
    CASES,
    FAMILIES,
    SEQUENCES,
    TOLERANCE,
    Oracle,
    Paged,
    even_chunks,
    on_device,
    random_weights,
    replay,
    torch_logits,
)

Oracles = Callable[[str], Oracle]
FP8 = ml_dtypes.float8_e4m3fn

# A config whose matrices are larger than a block and no multiple of one.
WIDE = {
    "model_type": "glm_moe_dsa", "vocab_size": 64, "hidden_size": 160, "intermediate_size": 200,
    "moe_intermediate_size": 136, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 128,
    "first_k_dense_replace": 1, "q_lora_rank": 144, "kv_lora_rank": 130, "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16, "v_head_dim": 32, "index_topk": 8, "index_head_dim": 32, "index_n_heads": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "num_nextn_predict_layers": 1,
}  # fmt: skip


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


def assert_same(one: Any, other: Any) -> None:
    assert jax.tree.structure(one) == jax.tree.structure(other)
    for ours, theirs in zip(leaves(one), leaves(other), strict=True):
        assert ours.dtype == theirs.dtype
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("shard_bytes", [5_000_000_000, 50_000])
@pytest.mark.parametrize("name", slow_but(["glm_moe_dsa", "glm4_moe"], CASES))
def test_transformers_reads_back_what_we_write(oracles: Oracles, tmp_path: Path, name: str, shard_bytes: int) -> None:
    import torch

    oracle = oracles(name)
    save(tmp_path / "ours", oracle.raw_config, oracle.weights, shard_bytes=shard_bytes)
    shards = list((tmp_path / "ours").glob("*.safetensors"))
    assert (len(shards) > 3) == (shard_bytes == 50_000)
    model, info = type(oracle.torch_model).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    theirs, again = oracle.torch_model.state_dict(), model.state_dict()
    assert theirs.keys() == again.keys()
    for key, tensor in theirs.items():
        assert torch.equal(tensor, again[key]), key
    np.testing.assert_array_equal(torch_logits(model.eval(), oracle.tokens), oracle.logits)
    assert_same(Checkpoint(tmp_path / "ours").load(), Checkpoint(oracle.path).load())


def test_an_index_lists_every_tensor_once(oracles: Oracles, tmp_path: Path) -> None:
    from safetensors import safe_open

    oracle = oracles("glm_moe_dsa")
    save(tmp_path / "ours", oracle.raw_config, oracle.weights, shard_bytes=50_000)
    index = json.loads((tmp_path / "ours" / "model.safetensors.index.json").read_text())
    held: dict[str, str] = {}
    size = 0
    for shard in (tmp_path / "ours").glob("*.safetensors"):
        with safe_open(shard, framework="numpy") as file:
            for key in file.keys():  # noqa: SIM118 (not a mapping)
                assert key not in held
                held[key] = shard.name
                size += file.get_tensor(key).nbytes
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == size


def test_float32_weights_stay_float32_in_bfloat16(oracles: Oracles) -> None:
    loaded = Checkpoint(oracles("glm_moe_dsa").path).load("bfloat16")
    for place, found in groups(oracles("glm_moe_dsa").config, mtp=False).items():
        for group, held in zip(found, [loaded["outer"]] if place == "outer" else loaded[place], strict=True):
            for weight in group.weights:
                expected = np.float32 if weight.float32 else ml_dtypes.bfloat16
                assert held[weight.name].dtype == expected, weight.name
                assert held[weight.name].shape == weight.shape, weight.name


# --- block FP8 -----------------------------------------------------------------------------------


def torch_dequantise(values: Any, scale: Any) -> Any:
    """Block by block, as the format is defined: value * scale of its 128 x 128 block."""
    out = values.float()
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            rows, columns = slice(128 * i, 128 * (i + 1)), slice(128 * j, 128 * (j + 1))
            out[rows, columns] *= scale[i, j]
    return out


def write_wide(path: Path, **options: Any) -> dict[str, Any]:
    weights = random_weights(from_hf(WIDE))
    save(path, WIDE, weights, **options)
    return weights


def test_fp8_tensors_follow_the_format(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", exc_type=ImportError)
    from safetensors.torch import load_file

    write_wide(tmp_path / "plain")
    write_wide(tmp_path / "fp8", fp8=True)
    plain = load_file(tmp_path / "plain" / "model.safetensors")
    fp8 = load_file(tmp_path / "fp8" / "model.safetensors")
    quantised = {key for key, tensor in fp8.items() if tensor.dtype == torch.float8_e4m3fn}
    assert {key for key in fp8 if key.endswith("_scale_inv")} == {key + "_scale_inv" for key in quantised}
    # what a release keeps in 16 bits (facts/glm5.md 1.2): embedding, head, router, norms, eh_proj, weights_proj
    kept = ("embed_tokens", "lm_head", "mlp.gate.", "norm", "eh_proj", "weights_proj")
    assert quantised == {key for key in plain if not any(part in key for part in kept)}
    for key in quantised:
        scale = fp8[key + "_scale_inv"]
        assert scale.dtype == torch.float32
        assert tuple(scale.shape) == tuple(-(-n // FP8_BLOCK) for n in plain[key].shape)
        # e4m3 has 3 bits of mantissa: relative error 2**-4, absolute 2**-10 of a block's unit scale
        error = (torch_dequantise(fp8[key], scale) - plain[key]).abs()
        assert (error <= plain[key].abs() * 2**-4 + float(scale.max()) * 2**-10).all(), key
        assert float(fp8[key].float().abs().max()) == 448.0, "a block should use the whole range"
    quantisation = json.loads((tmp_path / "fp8" / "config.json").read_text())["quantization_config"]
    assert quantisation["quant_method"] == "fp8" and quantisation["weight_block_size"] == [128, 128]


def test_fp8_loads_as_an_independent_dequantisation(tmp_path: Path) -> None:
    pytest.importorskip("torch", exc_type=ImportError)
    from safetensors.torch import load_file

    write_wide(tmp_path / "fp8", fp8=True)
    stored = load_file(tmp_path / "fp8" / "model.safetensors")
    dequantised = {
        key: (torch_dequantise(tensor, stored[key + "_scale_inv"]) if key + "_scale_inv" in stored else tensor)
        for key, tensor in stored.items()
        if not key.endswith("_scale_inv")
    }
    from safetensors.torch import save_file

    (tmp_path / "reference").mkdir()
    (tmp_path / "reference" / "config.json").write_text(json.dumps(WIDE))
    save_file(dequantised, tmp_path / "reference" / "model.safetensors", metadata={"format": "pt"})
    assert_same(Checkpoint(tmp_path / "fp8").load(), Checkpoint(tmp_path / "reference").load())


def test_quantised_weights_round_trip_to_the_bit(tmp_path: Path) -> None:
    write_wide(tmp_path / "first", fp8=True)
    first = Checkpoint(tmp_path / "first").load(keep_fp8=True)
    kept = [leaf for leaf in jax.tree.leaves(first, is_leaf=is_quantised) if is_quantised(leaf)]
    assert len(kept) > 10 and all(leaf.values.dtype == FP8 and leaf.scale.dtype == np.float32 for leaf in kept)
    assert all(any(n > 1 for n in leaf.scale.shape) for leaf in kept), "more blocks than one"
    save(tmp_path / "second", WIDE, first, fp8=True, shard_bytes=100_000)
    second = Checkpoint(tmp_path / "second").load(keep_fp8=True)
    again = [leaf for leaf in jax.tree.leaves(second, is_leaf=is_quantised) if is_quantised(leaf)]
    assert_same(kept, again)
    # kv_b_proj is dequantised when loaded and quantised anew: the values are the same, scales to rounding
    for one, other in zip(leaves(first), leaves(second), strict=True):
        np.testing.assert_allclose(one.astype(np.float32), other.astype(np.float32), rtol=3e-7)


def is_quantised(leaf: Any) -> bool:
    return isinstance(leaf, Quantized)


def test_logits_with_fp8_kept_are_those_dequantised(tmp_path: Path) -> None:
    write_wide(tmp_path / "fp8", fp8=True)
    checkpoint = Checkpoint(tmp_path / "fp8")
    tokens = np.random.default_rng(0).integers(0, 64, (SEQUENCES, 20)).astype(np.int32)
    results = {}
    for keep in (False, True):
        paged = Paged(checkpoint.config, on_device(checkpoint.load(keep_fp8=keep)), context=24)
        results[keep] = np.stack(replay(paged, tokens, [even_chunks(20, 10)] * SEQUENCES, 10, "absorbed"))
    assert np.abs(results[False]).max() > 1
    np.testing.assert_allclose(results[True], results[False], atol=1e-5)


def test_transformers_reads_our_fp8(oracles: Oracles, tmp_path: Path) -> None:
    """Where a matrix is no larger than a block: with more, transformers 5.23 splits the rows evenly over
    the rows of the scale grid, which is wrong unless they are a multiple of 128 (and for the 576 rows of
    a real kv_a_proj it raises)."""
    from transformers import FineGrainedFP8Config

    oracle = oracles("glm4_moe")
    save(tmp_path / "fp8", oracle.raw_config, oracle.weights, fp8=True)
    model = type(oracle.torch_model).from_pretrained(
        tmp_path / "fp8", quantization_config=FineGrainedFP8Config(dequantize=True), dtype="float32"
    )
    theirs = torch_logits(model.eval(), oracle.tokens)
    assert np.abs(theirs - oracle.logits).max() > 10 * TOLERANCE, "FP8 must have cost something"
    weights = on_device(Checkpoint(tmp_path / "fp8").load())
    ours, _ = Paged(oracle.config, weights).feed(oracle.tokens, [oracle.tokens.shape[1]] * SEQUENCES, "expanded")
    assert np.abs(ours - theirs).max() < TOLERANCE


@pytest.mark.parametrize("shape", [(128, 128), (1, 1), (200, 300), (129, 127)])
def test_quantising_inverts(shape: tuple[int, int]) -> None:
    matrix = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    matrix[: shape[0] // 2] *= 1e-6  # blocks of very different sizes
    values, scale = quantise_blocks(matrix)
    np.testing.assert_allclose(dequantise_blocks(values, scale), matrix, rtol=2**-4, atol=float(scale.max()) * 2**-10)
    zero, unit = quantise_blocks(np.zeros(shape, np.float32))
    assert not zero.astype(np.float32).any() and (unit == 1).all()


# --- laziness ------------------------------------------------------------------------------------


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def hollow_checkpoint(folder: Path) -> int:
    """A checkpoint of 8 GB, all hole; its bytes."""
    raw = {**WIDE, "vocab_size": 12_500_000, "num_nextn_predict_layers": 0}
    cfg, offset = from_hf(raw), 0
    header: dict[str, Any] = {}
    for name, shape in stored_shapes(cfg):
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    encoded = json.dumps(header).encode()
    (folder / "config.json").write_text(json.dumps(raw))
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        file.truncate(8 + len(encoded) + offset)
    return offset


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc to see resident memory")
def test_opening_reads_headers_only(tmp_path: Path) -> None:
    assert hollow_checkpoint(tmp_path) > 8e9
    before = resident_bytes()
    checkpoint = Checkpoint(tmp_path)
    assert resident_bytes() - before < 20e6
    assert not checkpoint.has_mtp


def stored_shapes(cfg: Any) -> list[tuple[str, list[int]]]:
    """Names and shapes of a checkpoint's tensors, from what `save` writes for a tiny vocabulary."""
    small = dataclasses.replace(cfg, vocab_size=8)
    tensors = checkpoint_writer._disassemble_all(small, random_weights(small), fp8=False)
    return [(name, [cfg.vocab_size if n == 8 and i == 0 else n for i, n in enumerate(t.shape)]) for name, t in tensors]


@pytest.mark.parametrize("keep_fp8", [False, True])
def test_one_weight_at_a_time_is_in_memory(tmp_path: Path, keep_fp8: bool) -> None:
    write_wide(tmp_path / "fp8", fp8=True)
    previous: list[weakref.ref[np.ndarray]] = []
    seen: list[str] = []

    def put(weight: Any, array: np.ndarray) -> None:
        alive = [ref for ref in previous if ref() is not None]
        # a matrix kept in FP8 is put in two parts: its values may still be there when its scales are built
        assert len(alive) <= (1 if keep_fp8 else 0)
        previous.append(weakref.ref(array))
        seen.append(weight.name)

    loaded = Checkpoint(tmp_path / "fp8").load(keep_fp8=keep_fp8, put=put)
    wanted = [w.name for found in groups(from_hf(WIDE), True).values() for group in found for w in group.weights]
    assert list(dict.fromkeys(seen)) == list(dict.fromkeys(wanted))
    assert len(loaded["layers"]) == 2 and len(loaded["mtp"]) == 1


# --- writing -------------------------------------------------------------------------------------


def test_an_existing_directory_is_never_overwritten(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "keep.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="already exists") as error:
        write_wide(tmp_path / "taken")
    assert str(tmp_path / "taken") in str(error.value)
    assert [file.name for file in (tmp_path / "taken").iterdir()] == ["keep.txt"]


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, OSError])
def test_an_interrupted_write_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruption: type[BaseException]
) -> None:
    written: list[Path] = []
    real = checkpoint_writer.write

    def interrupted(path: Path, tensors: Any) -> None:
        real(path, tensors)
        written.append(path)
        if len(written) == 2:
            raise interruption("no more")

    monkeypatch.setattr(checkpoint_writer, "write", interrupted)
    with pytest.raises(KeyboardInterrupt if interruption is KeyboardInterrupt else UsageError):
        write_wide(tmp_path / "out", shard_bytes=100_000)
    assert len(written) == 2
    assert list(tmp_path.iterdir()) == []


def test_a_neighbour_is_not_taken_for_a_leftover(tmp_path: Path) -> None:
    """Writing `out` must not delete a directory of the user's that happens to be called `out.tmp`."""
    (tmp_path / "out.tmp").mkdir()
    (tmp_path / "out.tmp" / "keep.txt").write_text("mine")
    write_wide(tmp_path / "out")
    assert (tmp_path / "out.tmp" / "keep.txt").read_text() == "mine"


@pytest.mark.parametrize("keep_fp8", [True, False])
def test_what_is_written_is_what_the_config_says(tmp_path: Path, keep_fp8: bool) -> None:
    """Weights kept in FP8, or dequantised, and written again with the config they came with: its
    `quantization_config` must match the tensors, or transformers reads nonsense."""
    write_wide(tmp_path / "first", fp8=True)
    first = Checkpoint(tmp_path / "first")
    raw = WIDE if keep_fp8 else first.raw_config
    save(tmp_path / "second", raw, first.load(keep_fp8=keep_fp8))
    expected = "fp8-block" if keep_fp8 else "plain"
    assert Checkpoint(tmp_path / "second").config.weight_format == expected


@pytest.mark.parametrize("name", FAMILIES)
def test_parameters_of_the_checkpoint_are_all_used(oracles: Oracles, name: str) -> None:
    """Every tensor that transformers saves is a source of exactly one weight (kv_b_proj of its two halves)."""
    oracle = oracles(name)
    named = [
        tensor
        for found in groups(oracle.config, mtp=False).values()
        for group in found
        for weight in group.weights
        for tensor in group.tensors(weight)
    ]
    twice = {tensor for tensor in named if named.count(tensor) > 1}
    assert all("kv_b_proj" in tensor for tensor in twice)
    assert set(named) == set(Checkpoint(oracle.path)._index)
