"""Directories that are no checkpoint of their config: each is refused in one line that names the culprit."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.errors import CheckpointError, ConfigError, ModelError
from model.hf_config import from_hf
from model.safetensors_file import SafetensorsFile
from tests.model.oracle import CASES, random_weights

RAW = {"model_type": "glm_moe_dsa", **CASES["glm_moe_dsa"].fields, "num_nextn_predict_layers": 1}
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    save(tmp_path / "ck", RAW, random_weights(from_hf(RAW)))
    return tmp_path / "ck"


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    save(tmp_path / "ck", RAW, random_weights(from_hf(RAW)), shard_bytes=100_000)
    return tmp_path / "ck"


def refused(path: Path, *mentions: str, kind: type[ModelError] = CheckpointError) -> None:
    """Opening `path` fails with one line that holds all of `mentions`."""
    with pytest.raises(kind) as caught:
        Checkpoint(path)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 400, message
    for mention in mentions:
        assert mention in message


def rewrite(path: Path, change: Callable[[dict[str, np.ndarray]], Any]) -> None:
    """Changes the tensors of the single shard at `path`."""
    shard = SafetensorsFile(path / SINGLE)
    tensors = {name: np.array(shard.array(name)) for name in shard.names}
    change(tensors)
    whole = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    save_file(whole, path / SINGLE, metadata={"format": "pt"})


def test_the_checkpoint_is_good_before_it_is_spoiled(checkpoint: Path) -> None:
    assert Checkpoint(checkpoint).has_mtp


# --- the directory -------------------------------------------------------------------------------


def test_no_directory(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "nowhere")
    (tmp_path / "file").write_text("x")
    refused(tmp_path / "file", "file")


def test_no_config(checkpoint: Path) -> None:
    (checkpoint / "config.json").unlink()
    refused(checkpoint, "config.json", kind=ConfigError)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"\xff\xfe", b'"glm"', b"null"])
def test_a_config_that_is_no_object(checkpoint: Path, content: bytes) -> None:
    (checkpoint / "config.json").write_bytes(content)
    refused(checkpoint, "config.json", kind=ConfigError)


def test_an_unknown_model_type(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({**RAW, "model_type": "llama"}))
    refused(checkpoint, "llama", "glm_moe_dsa", kind=ConfigError)


def test_no_weights(checkpoint: Path) -> None:
    (checkpoint / SINGLE).unlink()
    refused(checkpoint, SINGLE, INDEX)


def test_a_config_of_another_size(checkpoint: Path) -> None:
    (checkpoint / "config.json").write_text(json.dumps({**RAW, "hidden_size": 32}))
    refused(checkpoint, "model.embed_tokens.weight", "[160, 64]", "[160, 32]")


# --- tensors -------------------------------------------------------------------------------------

NAMES = [
    "lm_head.weight",
    "model.norm.weight",
    "model.layers.0.mlp.gate_proj.weight",
    "model.layers.1.self_attn.indexer.k_norm.bias",
    "model.layers.2.mlp.experts.7.down_proj.weight",
    "model.layers.2.mlp.gate.e_score_correction_bias",
    "model.layers.3.self_attn.kv_b_proj.weight",
    "model.layers.5.eh_proj.weight",
]


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_tensor(checkpoint: Path, name: str) -> None:
    rewrite(checkpoint, lambda tensors: tensors.pop(name))
    refused(checkpoint, "missing", name)


@pytest.mark.parametrize("name", NAMES)
def test_a_misshapen_tensor(checkpoint: Path, name: str) -> None:
    shapes: dict[str, Any] = {}

    def spoil(tensors: dict[str, np.ndarray]) -> None:
        shapes["expected"] = list(tensors[name].shape)
        tensors[name] = np.concatenate([tensors[name], tensors[name]])
        shapes["found"] = list(tensors[name].shape)

    rewrite(checkpoint, spoil)
    refused(checkpoint, name, str(shapes["found"]), str(shapes["expected"]))


def test_a_transposed_tensor(checkpoint: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    rewrite(checkpoint, lambda tensors: tensors.update({name: np.ascontiguousarray(tensors[name].T)}))
    refused(checkpoint, name)


@pytest.mark.parametrize(
    "name", ["surprise", "model.layers.2.self_attn.indexer.wk.weight", "model.layers.6.hnorm.weight"]
)
def test_an_extra_tensor(checkpoint: Path, name: str) -> None:
    """Among them an indexer in a layer that shares, and a second MTP layer."""
    rewrite(checkpoint, lambda tensors: tensors.update({name: np.zeros((2, 2), np.float32)}))
    refused(checkpoint, "extra", name)


def test_two_extra_tensors_are_counted(checkpoint: Path) -> None:
    rewrite(checkpoint, lambda tensors: tensors.update(dict.fromkeys(("a", "b"), np.zeros(1, np.float32))))
    refused(checkpoint, "extra tensor a", "1 more")


def test_half_an_mtp_layer(checkpoint: Path) -> None:
    def spoil(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.5.mlp")]:
            del tensors[name]

    rewrite(checkpoint, spoil)
    refused(checkpoint, "missing", "model.layers.5.mlp.")


def test_a_whole_mtp_layer_may_be_absent(checkpoint: Path) -> None:
    """transformers drops it when saving: the config still declares it, and that is fine."""

    def drop(tensors: dict[str, np.ndarray]) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.5.")]:
            del tensors[name]

    rewrite(checkpoint, drop)
    assert not Checkpoint(checkpoint).has_mtp


def test_copies_that_releases_store_are_ignored(checkpoint: Path) -> None:
    copies = {"model.layers.5.shared_head.head.weight": (160, 64), "model.layers.5.embed_tokens.weight": (160, 64)}
    rewrite(checkpoint, lambda t: t.update({name: np.zeros(shape, np.float32) for name, shape in copies.items()}))
    assert Checkpoint(checkpoint).has_mtp


def test_fp8_where_the_format_has_none(checkpoint: Path) -> None:
    import ml_dtypes

    name = "model.norm.weight"
    rewrite(checkpoint, lambda t: t.update({name: t[name].astype(ml_dtypes.float8_e4m3fn)}))
    refused(checkpoint, name, "FP8")


def test_fp8_without_its_scales(checkpoint: Path) -> None:
    import ml_dtypes

    name = "model.layers.0.mlp.gate_proj.weight"
    rewrite(checkpoint, lambda t: t.update({name: t[name].astype(ml_dtypes.float8_e4m3fn)}))
    refused(checkpoint, "missing", name + "_scale_inv")


def test_an_unsupported_dtype(checkpoint: Path) -> None:
    name = "model.norm.weight"
    rewrite(checkpoint, lambda tensors: tensors.update({name: tensors[name].astype(np.float64)}))
    refused(checkpoint, name, "F64")


@pytest.mark.parametrize("dtype", [np.int8, np.uint8, np.int32])
def test_integers_are_not_taken_for_weights(checkpoint: Path, dtype: type) -> None:
    """A W8A8 checkpoint has tensors of the right names and shapes; without its scales they mean nothing."""
    name = "model.layers.0.mlp.gate_proj.weight"
    rewrite(checkpoint, lambda tensors: tensors.update({name: tensors[name].astype(dtype)}))
    refused(checkpoint, name)


def test_packed_int4_without_its_scales(checkpoint: Path) -> None:
    name = "model.layers.0.mlp.gate_proj.weight"
    rewrite(checkpoint, lambda t: t.update({name + "_packed": np.zeros((t.pop(name).shape[0], 8), np.int32)}))
    refused(checkpoint, name)


# --- shards --------------------------------------------------------------------------------------


def test_a_missing_shard(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[1]
    shard.unlink()
    refused(sharded, "missing", shard.name)


def test_an_index_that_promises_too_much(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    first, *_, last = sorted(set(index["weight_map"].values()))
    name = next(tensor for tensor, shard in index["weight_map"].items() if shard == first)
    index["weight_map"][name] = last
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, name, last, "missing")


def test_an_index_that_forgets_a_tensor(sharded: Path) -> None:
    index = json.loads((sharded / INDEX).read_text())
    del index["weight_map"]["model.norm.weight"]
    (sharded / INDEX).write_text(json.dumps(index))
    refused(sharded, "missing", "model.norm.weight")


@pytest.mark.parametrize(
    "content", ["", "{", "[]", "3", "{}", '{"weight_map": 3}', '{"weight_map": {"a": 3}}', '{"weight_map": ["a"]}']
)
def test_a_broken_index(sharded: Path, content: str) -> None:
    (sharded / INDEX).write_text(content)
    refused(sharded, INDEX)


@settings(max_examples=40)
@given(keep=st.floats(0, 1))
@example(keep=0.0)
def test_a_truncated_shard(tmp_path_factory: pytest.TempPathFactory, keep: float) -> None:
    path = tmp_path_factory.mktemp("truncated")
    (path / "config.json").write_text(json.dumps(RAW))
    full = whole_shard(tmp_path_factory)
    (path / SINGLE).write_bytes(full[: int(keep * (len(full) - 1))])
    refused(path, SINGLE)


@settings(max_examples=60)
@given(at=st.integers(0, 3000), byte=st.integers(0, 255))
@example(at=7, byte=255)  # a header of 2**63 bytes
def test_a_corrupt_header_never_ends_in_a_traceback(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
) -> None:
    """One byte of the header changed: refused, or still a consistent file of the right names and shapes."""
    path = tmp_path_factory.mktemp("corrupt")
    (path / "config.json").write_text(json.dumps(RAW))
    content = bytearray(whole_shard(tmp_path_factory))
    content[at] = byte
    (path / SINGLE).write_bytes(content)
    try:
        Checkpoint(path).load()
    except CheckpointError as error:
        assert "\n" not in str(error)


def test_a_header_that_is_no_header(checkpoint: Path) -> None:
    for header in (b"[]", b"null", b'{"a": 1}', b'{"a": {"dtype": "F32"}}', b"\xff\xff"):
        (checkpoint / SINGLE).write_bytes(struct.pack("<Q", len(header)) + header)
        refused(checkpoint, SINGLE)


_SHARD: list[bytes] = []


def whole_shard(factory: pytest.TempPathFactory) -> bytes:
    if not _SHARD:
        path = factory.mktemp("whole") / "ck"
        save(path, RAW, random_weights(from_hf(RAW)))
        _SHARD.append((path / SINGLE).read_bytes())
    return _SHARD[0]
