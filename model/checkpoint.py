"""Checkpoint directories: Hugging Face safetensors, sharded or not, in BF16, F32 or quantised.

Reading checks every name and shape against the model's own list before the first byte of a weight is
read; then each weight is built in the graph's layout from memory-mapped shards and handed to `put` at
once, so that one weight at a time is in host memory. Writing is the exact inverse. Free of JAX.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from itertools import count, takewhile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from model import quantised
from model.config import LayerType, Mla, ModelConfig
from model.errors import CheckpointError
from model.formats import E4M3, MatrixFormat
from model.hf_config import from_hf, load_config, read_own
from model.quantised import Matrix
from model.spelling import Found, Spelling, spelling, tensor_name
from model.stored_tensors import HEAD, StoredTensor, stored_tensors
from model.weights import Arrangement, Quantized, Weight, layer_weights, outer_weights

SCALE_SUFFIX = "_scale_inv"
FP8 = E4M3
_PLAIN_TYPES = ("F32", "F16", "BF16")
_DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16)}
# Copies of shared tensors that some releases store, buffers that older ones do, and calibrated scales of activations
# and caches, which are found anew as the program runs.
_IGNORED = re.compile(
    r"(\.shared_head\.head\.weight|layers\.\d+\.embed_tokens\.weight|rotary_emb\.inv_freq"
    r"|layers\.\d+\..*\.(input|output|activation|[qkv])(_global)?_(scale|zero_point))$"
)
_MTP_OWN = ("enorm.weight", "hnorm.weight", "eh_proj.weight")  # what no other layer has


Put = Callable[[Weight, np.ndarray], Any]
Convert = Callable[[Weight, "np.ndarray | Quantized"], "np.ndarray | Quantized"]


@dataclasses.dataclass(frozen=True)
class Group:
    """Weights that belong together: the outer ones, or one layer's, with their name prefix."""

    prefix: str
    weights: tuple[Weight, ...]

    def tensors(self, weight: Weight) -> Iterator[str]:
        """Full checkpoint names of a weight's sources; experts in order, sources in order within each."""
        for expert in range(weight.expert_count) or (None,):
            for source in weight.sources:
                yield self.prefix + (source if expert is None else source.format(e=expert))


def groups(cfg: ModelConfig, mtp: bool) -> dict[str, list[Group]]:
    """All weights of a model by place: "outer", "layers" and "mtp" (layers `num_layers`, ...)."""

    def at(index: int, kind: LayerType) -> Group:
        return Group(f"model.layers.{index}.", layer_weights(cfg, kind))

    mtp_layers = range(cfg.num_layers, cfg.num_layers + (cfg.mtp_layers if mtp else 0))
    return {
        "outer": [Group("", outer_weights(cfg))],
        "layers": [at(index, kind) for index, kind in enumerate(cfg.layers)],
        "mtp": [at(index, cfg.mtp_type) for index in mtp_layers],
    }


def stored_shape(cfg: ModelConfig, weight: Weight) -> tuple[int, ...]:
    """The shape in the checkpoint of each of a weight's sources."""
    shape = weight.shape[1:] if weight.expert_count else weight.shape
    match weight.arrangement:
        case Arrangement.PLAIN:
            return shape
        case Arrangement.MATRIX:
            return shape[::-1]
        case Arrangement.GATE_UP:
            return (shape[2], shape[0])
        case Arrangement.HEAD_KEYS | Arrangement.HEAD_VALUES:
            mla = cfg.attention
            assert isinstance(mla, Mla)
            return (cfg.heads * (mla.nope_dim + mla.v_dim), mla.kv_lora_rank)


def dequantise_blocks(values: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Float32 `[out, in]` from e4m3 values and their block scales."""
    return quantised.dequantise(Matrix(values, scale))


def held_type(weight: Weight, dtype: str) -> np.dtype:
    """What a weight is held in where the rest is in `dtype`. Raises `CheckpointError` for what is no choice."""
    if dtype not in _DTYPES:
        raise CheckpointError(f"weights are held in {' or '.join(_DTYPES)}, not {dtype!r}")
    return _DTYPES["float32" if weight.float32 else dtype]


class Checkpoint:
    """A checkpoint directory whose names and shapes have been checked against its config.

    `raw_config` and `config` are those of what is stored, where config.json is at odds with it in a way that leaves no
    doubt; `notes` say where, a line each. Raises `ConfigError` or `CheckpointError`; opening reads headers only.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        if not self.path.is_dir():
            raise CheckpointError(f"{self.path}: no such checkpoint directory")
        self.raw_config = read_own(self.path, "config.json")
        self.config = load_config(self.path)
        self.notes: list[str] = []
        self._untie()
        self._check()

    def _mtp_prefix(self, number: int) -> str:
        return f"model.layers.{self.config.num_layers + number}."

    @cached_property
    def _index(self) -> dict[str, StoredTensor]:
        """What is stored, by name."""
        return stored_tensors(self.path, tuple(map(self._mtp_prefix, range(self.config.mtp_layers))))

    @cached_property
    def has_mtp(self) -> bool:
        """Whether the MTP layers the config declares are stored (transformers drops them when saving)."""
        prefixes = tuple(map(self._mtp_prefix, range(self.config.mtp_layers)))
        return bool(prefixes) and any(name.startswith(prefixes) for name in self._index)

    @cached_property
    def undeclared_mtp(self) -> tuple[str, ...]:
        """Name prefixes of whole MTP layers behind those that the config declares. Nothing uses them."""
        behind = map(self._mtp_prefix, count(self.config.mtp_layers))
        return tuple(takewhile(lambda prefix: all(prefix + own in self._index for own in _MTP_OWN), behind))

    def _untie(self) -> None:
        """A stored head that is not the embedding is the model's, whatever the config says of ties."""
        said = from_hf(self.raw_config, str(self.path / "config.json"))
        if said.tie_embeddings == self.config.tie_embeddings:
            return
        raw = {**self.raw_config, "tie_word_embeddings": False}
        if isinstance(inner := raw.get("text_config"), dict):
            raw["text_config"] = {**inner, "tie_word_embeddings": False}
        self.raw_config = raw
        self.notes.append(f"{self.path}: config.json ties the head to the embedding, but stores another: that is used")

    def _check(self) -> None:
        expected: set[str] = set()
        for group in sum(groups(self.config, self.has_mtp).values(), []):
            for weight in group.weights:
                stored = stored_shape(self.config, weight)
                for name in group.tensors(weight):
                    found = self.spelling(name, stored)
                    if found is None:
                        expected.add(name)
                        self._expect(name, stored)
                        if (kind := self._index[name].dtype_name) not in _PLAIN_TYPES:
                            raise CheckpointError(f"{self.path}: tensor {name} has the unsupported dtype {kind}")
                        continue
                    if not weight.quantised:
                        kind = "FP8" if found.format.values == FP8 else found.format.name
                        raise CheckpointError(f"{self.path}: tensor {name} must not be stored in {kind}")
                    for suffix, shape in found.parts.items():
                        expected.add(tensor_name(name, suffix))
                        self._expect(tensor_name(name, suffix), shape)
                    expected.update(tensor_name(name, suffix) for suffix in found.spare)
        if self.config.tie_embeddings:
            expected.add(HEAD)
        for prefix in self.undeclared_mtp:
            self.notes.append(
                f"{self.path}: {prefix.rstrip('.')} is an MTP layer, but config.json has num_nextn_predict_layers "
                f"{self.config.mtp_layers}: it is left out"
            )
        unused = set(self._index) - expected
        extra = sorted(n for n in unused if not _IGNORED.search(n) and not n.startswith(self.undeclared_mtp))
        if extra:
            more = f" (and {len(extra) - 1} more)" if len(extra) > 1 else ""
            raise CheckpointError(f"{self.path}: extra tensor {extra[0]}{more} that the config has no place for")

    def _look(self, name: str) -> Found | None:
        held = self._index.get(name)
        return Found(held.dtype_name, held.shape) if held else None

    def spelling(self, name: str, shape: tuple[int, ...]) -> Spelling | None:
        """How a tensor is stored: its quantised format and parts, or None where it is plain."""
        try:
            return spelling(name, shape, self._look)
        except ValueError as error:
            raise CheckpointError(f"{self.path}: tensor {error}") from None

    def _expect(self, name: str, shape: tuple[int, ...]) -> None:
        if name not in self._index:
            raise CheckpointError(f"{self.path}: missing tensor {name}, shape {list(shape)}")
        found = self._index[name].shape
        if found != shape:
            raise CheckpointError(f"{self.path}: tensor {name} has shape {list(found)}, expected {list(shape)}")

    def load(
        self,
        dtype: str = "float32",
        keep_fp8: bool = False,
        put: Put = lambda weight, array: array,
        mtp: bool = True,
        convert: Convert = lambda weight, value: value,
    ) -> dict[str, Any]:
        """All weights in the graph's layout: `{"outer": {..}, "layers": [{..}], "mtp": [{..}]}`.

        dtype: "float32" or "bfloat16" for everything that need not be float32. keep_fp8: matrices stored
        quantised (in FP8 or any other format) stay `Quantized` where `kept` says so; otherwise they are dequantised.
        `convert(weight, value)` may replace each weight, an array or `Quantized`, as soon as it is built, and
        `put(weight, array)` then takes its arrays, to a device for instance.
        """

        def build(group: Group, weight: Weight) -> Any:
            value = convert(weight, self.read(group, weight, dtype, keep_fp8))
            if isinstance(value, Quantized):
                return Quantized(put(weight, value.values), put(weight, value.scale))
            return put(weight, value)

        places = groups(self.config, mtp and self.has_mtp)
        loaded = {
            place: [{weight.name: build(group, weight) for weight in group.weights} for group in found]
            for place, found in places.items()
        }
        return {"outer": loaded["outer"][0], "layers": loaded["layers"], "mtp": loaded["mtp"]}

    def read(
        self, group: Group, weight: Weight, dtype: str = "float32", keep_fp8: bool = False
    ) -> np.ndarray | Quantized:
        """One weight of a group of `groups`, as `load` has it."""
        names = list(group.tensors(weight))
        if keep_fp8 and (kept := self.kept(group, weight)):
            held = map(self._matrix, names)
            if kept.factor is not None:  # its float32 factor is multiplied into the scales
                held = (Matrix(m.values, m.scale.astype(np.float32) * m.factor) for m in held)
            return _assemble_quantised(self.config, weight, held)
        kind = held_type(weight, dtype)
        return _assemble(self.config, weight, map(self.plain, names), kind, weight.shape)

    def kept(self, group: Group, weight: Weight) -> MatrixFormat | None:
        """The format in which `keep_fp8` keeps a weight: that of all of its matrices. None where they are plain, or
        stored in more ways than one (an expert left in 16 bits, say), and so are dequantised; routed experts are all
        of a layer, since one op takes them."""
        if weight.expert_count and not all(self._one_format(group, w) for w in group.weights if w.expert_count):
            return None
        return self._one_format(group, weight)

    def _one_format(self, group: Group, weight: Weight) -> MatrixFormat | None:
        names = list(group.tensors(weight))
        first = self._spellings[names[0]] if weight.stays_narrow else None
        if first is None or any(self._spellings[name] != first for name in names):
            return None
        types = {tuple(self._index[tensor_name(name, part)].dtype_name for part in first.parts) for name in names}
        return first.format if len(types) == 1 else None

    @property
    def tensor_names(self) -> tuple[str, ...]:
        """Of all that is stored."""
        return tuple(self._index)

    def array(self, name: str) -> np.ndarray:
        """A stored tensor as it is, a view into its shard."""
        return self._index[name].array()

    def _matrix(self, name: str) -> Matrix:
        found = self._spellings[name]
        assert found is not None
        try:
            return found.read(name, self.array)
        except ValueError as error:  # what only the values of its tensors say
            raise CheckpointError(f"{self.path}: tensor {error}") from None

    def plain(self, name: str) -> np.ndarray:
        """A tensor of the model, dequantised to float32 where it is stored quantised."""
        return quantised.dequantise(self._matrix(name)) if self._spellings[name] else self.array(name)

    @cached_property
    def _spellings(self) -> dict[str, Spelling | None]:
        """How each tensor of the model is stored."""
        return {
            name: self.spelling(name, stored_shape(self.config, weight))
            for group in sum(groups(self.config, self.has_mtp).values(), [])
            for weight in group.weights
            for name in group.tensors(weight)
        }


def _assemble_quantised(cfg: ModelConfig, weight: Weight, held: Iterable[Matrix]) -> Quantized:
    """Values and scales of one weight in the graph's layout."""
    matrices = list(held)
    rows, columns = matrices[0].scale.shape
    lead = (weight.expert_count,) if weight.expert_count else ()
    shape = (*lead, columns, 2, rows) if weight.arrangement is Arrangement.GATE_UP else (*lead, columns, rows)
    first = matrices[0]
    values = _assemble(
        cfg, weight, (m.values for m in matrices), quantised.carried(first.values[:0]).dtype, weight.shape
    )
    return Quantized(values, _assemble(cfg, weight, (m.scale for m in matrices), first.scale.dtype, shape))


def _assemble(
    cfg: ModelConfig, weight: Weight, tensors: Iterator[np.ndarray], dtype: np.dtype, shape: tuple[int, ...]
) -> np.ndarray:
    """One weight in the graph's layout from its checkpoint tensors, in order."""
    if weight.arrangement is Arrangement.PLAIN:
        return np.asarray(next(tensors), dtype, order="C")
    out = np.empty(shape, dtype)
    for view in out if weight.expert_count else (out,):
        match weight.arrangement:
            case Arrangement.MATRIX:
                view[...] = next(tensors).T
            case Arrangement.GATE_UP:
                view[:, 0, :], view[:, 1, :] = next(tensors).T, next(tensors).T
            case Arrangement.HEAD_KEYS | Arrangement.HEAD_VALUES:
                keys, values = _split_heads(cfg, next(tensors))
                view[...] = keys if weight.arrangement is Arrangement.HEAD_KEYS else values.transpose(0, 2, 1)
    return out


def _split_heads(cfg: ModelConfig, kv_b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """`kv_b_proj` as keys [h, nope, lora] and values [h, v, lora] (views)."""
    mla = cfg.attention
    assert isinstance(mla, Mla)
    per_head = kv_b.reshape(cfg.heads, mla.nope_dim + mla.v_dim, mla.kv_lora_rank)
    return per_head[:, : mla.nope_dim], per_head[:, mla.nope_dim :]
