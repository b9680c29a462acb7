"""Bytes as they lie in the files that the quantiser writes are the memory ledger's (see `counted`)."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple, get_args

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from backends.emulation.number_formats import NumberFormats
from foundation.errors import UsageError
from model import ops
from model.checkpoint import Checkpoint
from model.checkpoint_writer import save
from model.formats import FORMATS, SCHEMES, CheckpointLayout, Formats, matrix_format, scheme
from model.hf_config import from_hf
from model.quantised import Matrix, quantise
from model.safetensors_file import write
from model.spelling import tensor_name
from model.split import Layout, share_bytes
from model.weights import Arrangement, Quantized, Weight, layer_weights
from runtime.deployment.ledger import stage_weight_bytes
from runtime.porting.quantize import layout_of, quantize
from tests.deployment.counted import BITS, DENSE_AND_EXPERTS, NEVER, PUBLISHED, SIZES, formats, published, raw
from tests.engine.conftest import CONFIGS, random_weights
from tests.model.test_foreign_checkpoints import SAID
from tests.model.test_spelling import turned


def test_every_format_is_here() -> None:
    """A format that is added is counted by these tests, or named as missing from them."""
    assert {name for name, fmt in FORMATS.items() if fmt.narrow} == set(PUBLISHED) - {"w4a16-g16"}
    assert set(SCHEMES) <= set(DENSE_AND_EXPERTS)


@pytest.mark.parametrize("name", PUBLISHED)
@settings(max_examples=12)
@given(data=st.data())
def test_a_matrix_takes_its_values_and_scales(name: str, data: st.DataObject) -> None:
    """Of any shape, alone or stacked as experts' gate and up are: the arrays that rounding makes, bit by bit."""
    out, width = 2 * data.draw(st.integers(1, 150), "half out"), data.draw(st.integers(1, 300), "in")
    experts, stored = data.draw(st.integers(0, 3), "experts"), PUBLISHED[name]
    fmt = matrix_format(name)
    lead = (experts, 2) if experts else ()
    whole = np.random.default_rng(0).standard_normal((*lead, out, width)).astype(np.float32)
    try:
        made = quantise(fmt, whole)
    except ValueError:
        assume(False)
        raise
    matrices = int(np.prod(lead, dtype=int))
    assert (BITS[made.values.dtype.name], BITS[made.scale.dtype.name]) == (stored.value, stored.scale)
    assert (made.values.size, made.scale.size) == (whole.size, matrices * stored.scales(out, width))
    assert (made.factor is not None) == bool(stored.factor)
    shape = (experts, width, 2, out) if experts else (width, out)
    kind = Arrangement.GATE_UP if experts else Arrangement.MATRIX
    weight = Weight("w", shape, (None,) * len(shape), ("w",), kind, "experts", True, expert_count=experts)
    assert share_bytes(weight, fmt, shape) == _matrix_bits(made) / 8


def _matrix_bits(made: Matrix) -> int:
    return sum(array.size * BITS[array.dtype.name] for array in made if array is not None)


class Tensor(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    bytes: int


def tensors_in(folder: Path) -> dict[str, Tensor]:
    """Every tensor of a checkpoint directory, as its files' headers have it; nothing lies between them."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(size))
        header.pop("__metadata__", None)
        here = {
            n: Tensor(e["dtype"], tuple(e["shape"]), -int(np.subtract(*e["data_offsets"]))) for n, e in header.items()
        }
        assert sum(tensor.bytes for tensor in here.values()) == path.stat().st_size - 8 - size
        found |= here
    return found


PARTS = r"(?:(_scale_inv|_scale|_packed|_global_scale|_shape|_offset)|(?:\.weight)?(\.scale_bias))?$"
SPARE = ("_shape", "_offset", ".scale_bias")
"""Written beside a matrix for its readers: shapes, zero points that are all 0, and what an integer kernel adds."""
COMPONENTS = (
    (r"embed_tokens", "embedding"), (r"lm_head", "head"), (r"mlp\.gate\.", "router"), (r"norm", "norms"),
    (r"\.indexer\.", "indexer"), (r"self_attn", "attention"), (r"shared_experts", "shared_experts"),
    (r"\.experts\.", "experts"), (r"mlp\.", "dense_ffn"),
)  # fmt: skip


class Counted(NamedTuple):
    """Bytes that a device holds of a file's tensors, by component, and by name what it holds in another size."""

    held: Counter[str]
    differs: dict[str, tuple[int, int]]


def count_file(written: dict[str, Tensor], source: dict[str, Tensor], name: str, layers: int) -> Counted:
    """What one device holds of a checkpoint's file. source: what it was made of, which has each matrix's shape."""
    held: Counter[str] = Counter()
    differs: dict[str, tuple[int, int]] = {}
    rest = dict(written)
    for tensor, plain in source.items():
        bare = tensor.removesuffix(".weight")
        parts = {
            suffix: rest.pop(full)
            for suffix in ("", "_packed", "_scale", "_scale_inv", "_global_scale", *SPARE)
            if (full := bare + suffix if suffix == ".scale_bias" else tensor + suffix) in rest
        }
        found = re.match(r"model\.layers\.(\d+)\.", tensor)
        mtp = bool(found) and int(found[1]) >= layers  # type: ignore[index]
        component = "mtp" if mtp else next(c for pattern, c in COMPONENTS if re.search(pattern, tensor))
        stored = published(name, "experts" if ".experts." in tensor else component)
        wide = stored is None or re.search(NEVER, tensor) or re.search(stored.wide, tensor + " MTP" * mtp)
        if wide or stored is None:
            (only,) = parts.items()  # as it is, nothing beside it
            assert only[0] == "" and only[1].shape == plain.shape, tensor
            of_float32 = name == "f32" or tensor.endswith("e_score_correction_bias")
            size = int(np.prod(plain.shape)) * (4 if of_float32 else 2)
        else:
            out, width = plain.shape
            spare = {suffix: parts.pop(suffix) for suffix in SPARE if suffix in parts}
            differs |= {tensor + suffix: (part.bytes, 0) for suffix, part in spare.items()}
            factor = parts.pop("_global_scale", Tensor("F32", (), 0))
            (values,) = [parts.pop(s) for s in ("", "_packed") if s in parts]
            ((_, scale),) = parts.items()
            assert values.bytes * 8 == out * width * stored.value, tensor
            assert scale.bytes * 8 == stored.scales(out, width) * stored.scale, tensor
            assert factor.bytes * 8 == stored.factor, tensor
            parts = {"values": values, "scale": scale, "factor": factor}
            size = sum(part.bytes for part in parts.values())
            if "kv_b_proj" in tensor:  # its halves are widened when loaded
                size = out * width * 2
        if size != (in_file := sum(part.bytes for part in parts.values())):
            differs[tensor] = (in_file, size)
        held[component] += size
    assert not rest, sorted(rest)
    return Counted(held, differs)


def spellings(name: str) -> list[CheckpointLayout | None]:
    def admitted(layout: CheckpointLayout) -> bool:
        try:
            return layout_of(scheme(name), layout) == layout
        except UsageError:
            return False

    return [layout for layout in get_args(CheckpointLayout) if admitted(layout)] or [None]


def every(fast: dict[str, tuple[str, ...]]) -> list[Any]:
    """Every scheme of every family; slow but for those named."""
    return [
        pytest.param(name, family, marks=() if name in fast[family] else pytest.mark.slow)
        for family in CONFIGS
        for name in DENSE_AND_EXPERTS
    ]


@pytest.mark.parametrize(
    ("name", "family"), every({"dsa": tuple(DENSE_AND_EXPERTS), "mla": ("fp8", "w4a8"), "gqa": ("f32", "nvfp4")})
)
def test_written_bytes_are_the_ledgers(sources: dict[str, Path], tmp_path: Path, name: str, family: str) -> None:
    """A checkpoint that is written in a scheme has the bytes that the ledger says one device holds, MTP included, but
    for what each allowance here names."""
    source = Checkpoint(sources[family])
    before = tensors_in(source.path)
    ledger = stage_weight_bytes(source.config, Layout(), formats(name), 0, mtp=True)
    for layout in spellings(name):
        out = tmp_path / str(layout)
        result = quantize(source, scheme(name), out, layout)
        written = tensors_in(out)
        found = count_file(written, before, name, source.config.num_layers)
        assert found.held == ledger, layout
        assert result.bytes == sum(tensor.bytes for tensor in written.values())
        assert result.bytes - sum(a - b for a, b in found.differs.values()) == sum(ledger.values())
        allowed = {
            "f32": r".*",  # plain tensors keep the source's 16 bits in the file
            "fp8": r".*kv_b_proj\.weight$",
            "w4afp8": r".*kv_b_proj\.weight$",
        }.get(name, "nothing")
        opened = Checkpoint(out)
        for tensor, (in_file, held) in found.differs.items():
            spare = tensor.endswith(SPARE)
            assert spare or re.match(allowed, tensor), (tensor, in_file, held)
            if spare:
                assert held == 0 and (not tensor.endswith("_offset") or not opened.array(tensor).any())
    if source.config.tie_embeddings:
        assert "lm_head.weight" not in before and "head" not in ledger


def test_a_float32_source_leaves_wide_tensors(tmp_path: Path) -> None:
    """Tensors that no format narrows are written as they were: float32 ones take twice what a device holds of them."""
    config = raw("dsa", **SIZES)
    cfg = from_hf(config)
    save(tmp_path / "source", config, random_weights(cfg))
    quantize(Checkpoint(tmp_path / "source"), scheme("w8a8"), tmp_path / "out")
    before, written = tensors_in(tmp_path / "source"), tensors_in(tmp_path / "out")
    found = count_file(written, before, "w8a8", cfg.num_layers)
    assert found.held == stage_weight_bytes(cfg, Layout(), formats("w8a8"), 0, mtp=True)
    plain = {n: (a, b) for n, (a, b) in found.differs.items() if not n.endswith(SPARE)}
    assert plain and all(in_file == 2 * held and before[n].dtype == "F32" for n, (in_file, held) in plain.items())
    assert not any(name.endswith("e_score_correction_bias") for name in plain)


def test_zero_points_are_counted(tmp_path: Path) -> None:
    """Experts in INT4 with zero points, as compressed-tensors packs them: the config says that they are there, the
    ledger counts them, and an emulated chip multiplies by what is stored."""
    config = raw("dsa", **SIZES)
    save(tmp_path / "plain", config, random_weights(from_hf(config)))
    quantize(Checkpoint(tmp_path / "plain"), scheme("w4a16-g16"), tmp_path / "packed")
    written = tensors_in(tmp_path / "packed")
    rng, opened = np.random.default_rng(0), Checkpoint(tmp_path / "packed")
    tensors = {name: np.array(opened.array(name)) for name in written}
    for name in [name for name in written if name.endswith("weight_scale")]:
        out, groups = written[name].shape
        points = rng.integers(-(2**31), 2**31, (-(-out // 8), groups)).astype(np.int32)
        tensors[name.replace("scale", "zero_point")] = points
    said = json.loads((tmp_path / "packed" / "config.json").read_text())
    for group in said["quantization_config"]["config_groups"].values():
        group["weights"]["symmetric"] = False
    (tmp_path / "zero").mkdir()
    (tmp_path / "zero" / "config.json").write_text(json.dumps(said))
    write(tmp_path / "zero" / "model.safetensors", tensors)

    found = Checkpoint(tmp_path / "zero")
    asked = found.config.stored_scheme
    assert asked.name == "w4a16-g16-zp"
    held = stage_weight_bytes(found.config, Layout(), Formats(asked.dense, asked.experts), 0, mtp=True)
    of_experts = [
        tensor.bytes
        for name, tensor in tensors_in(tmp_path / "zero").items()
        if re.search(r"layers\.\d+\.mlp\.experts\..*weight_(packed|scale|zero_point)", name)
    ]
    assert held["experts"] == sum(of_experts)
    assert held["experts"] > stage_weight_bytes(found.config, Layout(), formats("w4a16-g16"), 0, mtp=True)["experts"]

    layers, kept = found.load()["layers"], found.load(keep_fp8=True)["layers"]
    chip = NumberFormats(found.config, Formats(asked.dense, asked.experts))
    for place, kind in enumerate(found.config.layers):
        for weight in layer_weights(found.config, kind):
            if weight.expert_count:
                stored = chip.weight(weight, kept[place][weight.name])
                assert isinstance(stored, Quantized) and stored.values.min() < -8
                np.testing.assert_array_equal(ops.dequantise(*stored, np.float32), layers[place][weight.name])
                with pytest.raises(UsageError, match="zero points are read"):
                    chip.weight(weight, layers[place][weight.name])


@pytest.mark.parametrize("method", SAID)
def test_zero_points_of_awq_and_gptq_are_counted(tmp_path: Path, method: str) -> None:
    """What their tensors take on disk the ledger says a device holds; but for the order of GPTQ's columns."""
    config = raw("dsa", **SIZES)
    cfg = from_hf(config)
    save(tmp_path / "plain", config, random_weights(cfg))
    opened = Checkpoint(tmp_path / "plain")
    tensors = {name: np.array(opened.array(name)) for name in opened.tensor_names}
    narrow: list[str] = []
    mtp = f"layers.{cfg.num_layers}."
    for name in [name for name in tensors if ".mlp.experts." in name and mtp not in name]:
        out, width = tensors.pop(name).shape
        held, _ = turned(method, width, 16, out)
        parts = {tensor_name(name, part.removeprefix("layer")): array for part, array in held.items()}
        tensors, narrow = tensors | parts, narrow + list(parts)
    left = {
        "awq": {"modules_to_not_convert": ["self_attn", "shared_experts", mtp]},
        "gptq": {"modules_in_block_to_quantize": [[".experts."]]},
    }[method]
    quant = {"quant_method": method, "bits": 4, "group_size": 16, **SAID[method], **left}
    (tmp_path / "turned").mkdir()
    (tmp_path / "turned" / "config.json").write_text(json.dumps({**config, "quantization_config": quant}))
    write(tmp_path / "turned" / "model.safetensors", tensors)

    found, written = Checkpoint(tmp_path / "turned"), tensors_in(tmp_path / "turned")
    asked = found.config.stored_scheme
    assert asked.name == "w4a16-g16-zp"
    ledger = stage_weight_bytes(found.config, Layout(), Formats(asked.dense, asked.experts), 0, mtp=True)
    on_disk = sum(written[name].bytes for name in narrow if not name.endswith("g_idx"))
    assert ledger["experts"] == on_disk > 0
    assert any(name.endswith("g_idx") for name in narrow) == (method == "gptq")
