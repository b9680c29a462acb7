"""What a checkpoint says of its own number formats: the `quantization_config` of a config.json, and msModelSlim's
`quant_model_description.json`, read into the name of a scheme (`model.formats.scheme`). Free of JAX.

Read: DeepSeek's block FP8 (`quant_method` "fp8", blocks of 128 x 128) and compressed-tensors' groups, each by what it
says of its weights: bits, type, strategy and group size. Two modules stand for the rest: an expert's projection and
an attention's.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from foundation.errors import UsageError
from model.formats import FORMATS, FP8_BLOCK, matrix_format, scheme_of

PLAIN = "plain"
MODELSLIM_TYPES = {
    "w8a8-int8": "W8A8_DYNAMIC", "w4a8": "W4A8_DYNAMIC", "mxfp8": "W8A8_MXFP8", "mxfp4": "W4A4_MXFP4",
}  # fmt: skip
"""Format -> msModelSlim's name of it."""


class UnknownQuantization(Exception):
    """The text says what is not supported."""


def scheme_name(quant: Mapping[str, Any], moe_layer: int | None) -> str:
    """The scheme that a `quantization_config` describes; `PLAIN` for an empty one.

    moe_layer: a layer with routed experts. Raises `UnknownQuantization`.
    """
    if not quant:
        return PLAIN
    method = quant.get("quant_method")
    if method == "fp8" and quant.get("weight_block_size") == [FP8_BLOCK, FP8_BLOCK]:
        return "fp8-block"
    if method != "compressed-tensors":
        raise UnknownQuantization(f"{method!r} with weight_block_size={quant.get('weight_block_size')}")
    groups = quant.get("config_groups")
    if not isinstance(groups, Mapping) or not groups or not all(isinstance(each, Mapping) for each in groups.values()):
        raise UnknownQuantization("of compressed-tensors without `config_groups`")
    if len(groups) == 1:  # what is ignored stays wide by role, or by the tensors that are there
        (only,) = groups.values()
        found = _format(only, quant)
        dense = found if _applies(only, quant, "model.layers.0.self_attn.o_proj") else "bf16"
        return scheme_of(dense, found).name if moe_layer is not None else scheme_of(found, found).name
    layer = moe_layer or 0
    dense, experts = (
        next((_format(group, quant) for group in groups.values() if _applies(group, quant, module)), "bf16")
        for module in (f"model.layers.{layer}.self_attn.o_proj", f"model.layers.{layer}.mlp.experts.0.up_proj")
    )
    return scheme_of(dense, experts).name


def _applies(group: Mapping[str, Any], quant: Mapping[str, Any], module: str) -> bool:
    """Whether a group is for a module, as compressed-tensors matches names: "Linear", names, or "re:" patterns."""

    def any_of(patterns: Any) -> bool:
        if not isinstance(patterns, list):
            return False
        for pattern in patterns:
            if not isinstance(pattern, str):
                continue
            try:
                if pattern in ("Linear", module) or (pattern[:3] == "re:" and re.match(pattern[3:], module)):
                    return True
            except re.error:
                raise UnknownQuantization(f"of compressed-tensors with the pattern {pattern!r}") from None
        return False

    ignored = quant.get("ignore") or []
    if not isinstance(ignored, list):
        raise UnknownQuantization("of compressed-tensors whose `ignore` is not a list")
    return any_of(group.get("targets")) and not any_of([pattern for pattern in ignored if pattern != "Linear"])


def _format(group: Mapping[str, Any], quant: Mapping[str, Any]) -> str:
    """The format of a group's matrices."""
    weights, acts = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        raise UnknownQuantization("of compressed-tensors with a group that says nothing of its weights")
    kind, bits, strategy = weights.get("type"), weights.get("num_bits"), weights.get("strategy")
    size = weights.get("group_size")
    narrow = acts.get("type") if isinstance(acts, Mapping) else None
    unknown = UnknownQuantization(
        f"of compressed-tensors with {bits}-bit {kind} weights, strategy {strategy!r}, groups of {size}, and "
        f"{narrow or '16-bit'} activations"
    )
    match kind, bits, strategy:
        case "float", 8, "block" if weights.get("block_structure") == [FP8_BLOCK, FP8_BLOCK]:
            return "fp8-block"
        case "float", 8, "tensor" | "channel":
            return f"fp8-{strategy}"
        case "float", 8, "group" if size == FORMATS["mxfp8"].shared:
            return "mxfp8"
        case "float", 4, "group" if size == FORMATS["mxfp4"].shared:
            return "mxfp4"
        case "float", 4, "tensor_group" if size == FORMATS["nvfp4"].shared:
            return "nvfp4" if narrow else "nvfp4a16"
        case "int", 8, "channel":
            return "w8a8-int8"
        case "int", 4, "channel" if narrow == "int":
            return "w4a8"
        case "int", 4, "group" if narrow in (None, "float"):
            try:
                return matrix_format(f"{'w4afp8' if narrow else 'w4a16'}-g{size}").name
            except UsageError:
                raise unknown from None
    raise unknown


def modelslim_scheme_name(types: set[str]) -> str:
    """The scheme of an msModelSlim checkpoint, from the types of its weights. Raises `UnknownQuantization`."""
    formats = {kind: name for name, kind in MODELSLIM_TYPES.items()}
    if unknown := sorted(types - {*formats, "FLOAT"}):
        raise UnknownQuantization(f"{unknown[0]} cannot be read; known: {', '.join(formats)}, FLOAT")
    found = {formats[kind] for kind in types if kind in formats}
    order = (("w4a8", "w4a8"), ("mxfp4", "mxfp4"), ("mxfp8", "mxfp8"), ("w8a8-int8", "w8a8"))
    return next((name for fmt, name in order if fmt in found), PLAIN)
