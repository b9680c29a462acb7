"""What a checkpoint says of its own number formats: the `quantization_config` of a config.json, and msModelSlim's
`quant_model_description.json`, read into the name of a scheme (`model.formats.scheme`). Free of JAX.

Read: DeepSeek's block FP8 (`quant_method` "fp8", blocks of 128 x 128); compressed-tensors' groups, each by what it says
of its weights: bits, type, strategy and group size; modelopt's algorithms, by name; AWQ and GPTQ
of 4 bits. A few modules stand for the rest, experts' projections and attentions', and the format of most of them is the
scheme's: what is left wide here and there is read off the tensors.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fnmatch import translate
from typing import Any

from foundation.errors import UsageError, printable, shortened
from foundation.patterns import PatternError, Patterns
from model.formats import BITS, FORMATS, FP8_BLOCK, INT8, matrix_format, scheme_of

PLAIN = "plain"
MODELSLIM_TYPES = {
    "w8a8-int8": "W8A8_DYNAMIC", "w4a8": "W4A8_DYNAMIC", "mxfp8": "W8A8_MXFP8", "mxfp4": "W4A4_MXFP4",
}  # fmt: skip
"""Format -> msModelSlim's name of it."""
MODELOPT_ALGORITHMS = {
    "FP8": "fp8-tensor", "FP8_PER_CHANNEL_PER_TOKEN": "fp8-channel", "FP8_PB_WO": "fp8-block", "MXFP8": "mxfp8",
    "NVFP4": "nvfp4", "W4A16_NVFP4": "nvfp4a16",
}  # fmt: skip
"""modelopt's name -> format, as vLLM `layers/quantization/modelopt.py` reads them. Those with "AWQ" scale activations
before they are rounded, which is not done here."""


class UnknownQuantization(Exception):
    """The text says what is not supported, on one line whatever the config holds."""

    def __init__(self, said: str) -> None:
        super().__init__(printable(said))


Applies = Callable[[str], bool]
"""Whether a pattern, or one of several, is for the module of that name."""


def scheme_name(quant: Mapping[str, Any], layers: int, moe_layers: Sequence[int], experts: int) -> str:
    """The scheme that a `quantization_config` describes; `PLAIN` for an empty one, and words for formats that can be
    read but are no scheme's (`is_scheme`).

    layers: how many there are; moe_layers: those with routed experts, of which there are `experts` each. Raises
    `UnknownQuantization`.
    """
    if not quant:
        return PLAIN
    method, read = quant.get("quant_method"), Patterns()
    found: Sequence[tuple[Applies, str]]
    if method == "fp8" and quant.get("weight_block_size") == [FP8_BLOCK, FP8_BLOCK]:
        left = _names(quant, "modules_to_not_convert") + _names(quant, "ignored_layers")
        wide, found = _matcher(left, read, plain=True), [(lambda _: True, "fp8-block")]
    elif method == "compressed-tensors":
        groups = quant.get("config_groups")
        if not isinstance(groups, Mapping) or not groups or not all(isinstance(g, Mapping) for g in groups.values()):
            raise UnknownQuantization("of compressed-tensors without `config_groups`")
        wide = _matcher([name for name in _names(quant, "ignore") if name != "Linear"], read)
        said = [(_names(group, "targets"), _format(group)) for group in groups.values()]
        named = [(_matcher([name for name in names if name != "Linear"], read), fmt) for names, fmt in said]
        others = [(_matcher(["Linear"], read), fmt) for names, fmt in said if "Linear" in names]
        found = named + others  # names and patterns come before "Linear"
    elif method in ("modelopt", "modelopt_fp4", "modelopt_mxfp8", "modelopt_mixed"):
        wide, found = _modelopt(quant, read)
    elif method in ("awq", "gptq"):
        wide, found = _turned(quant, method, read)
    else:
        raise UnknownQuantization(f"{method!r} with weight_block_size={quant.get('weight_block_size')}")

    def most(modules: list[str]) -> str:
        held = (
            "bf16" if wide(module) else next((fmt for applies, fmt in found if applies(module)), "bf16")
            for module in modules
        )
        return Counter(held).most_common(1)[0][0]

    dense = most([f"model.layers.{layer}.self_attn.o_proj" for layer in _spread(range(layers))])
    sparse = [f"model.layers.{a}.mlp.experts.{e}.up_proj" for a in _spread(moe_layers) for e in _spread(range(experts))]
    routed = most(sparse) if sparse else dense
    odd = next((name for name in (routed, dense) if not is_scheme(name)), None)
    return odd or (dense if dense == routed == "fp8-block" else scheme_of(dense, routed).name)


def _modelopt(quant: Mapping[str, Any], read: Patterns) -> tuple[Applies, Sequence[tuple[Applies, str]]]:
    """What modelopt leaves wide, and the formats of what it does not; newer releases say it in config.json, older ones
    under "quantization" in a file of its own."""
    inner = quant.get("quantization", quant)
    if not isinstance(inner, Mapping):
        raise UnknownQuantization("of modelopt whose `quantization` is not an object")
    left = _names(inner, "exclude_modules") + _names(inner, "ignore")

    def named(said: Any) -> str:
        if (algorithm := str(said).upper()) not in MODELOPT_ALGORITHMS:
            known = ", ".join(MODELOPT_ALGORITHMS)
            raise UnknownQuantization(f"of modelopt with quant_algo {said!r} (known: {known}, MIXED_PRECISION)")
        return MODELOPT_ALGORITHMS[algorithm]

    if str(inner.get("quant_algo")).upper() != "MIXED_PRECISION":
        return _wildcards(left, read), [(lambda _: True, named(inner.get("quant_algo")))]
    layers = inner.get("quantized_layers")
    if not isinstance(layers, Mapping) or not all(isinstance(held, Mapping) for held in layers.values()):
        raise UnknownQuantization("of modelopt with MIXED_PRECISION and no `quantized_layers`")
    by_format: dict[str, list[str]] = {}
    for module, held in layers.items():
        by_format.setdefault(named(held.get("quant_algo")), []).append(module)
    return _wildcards(left, read), [(_below(modules), fmt) for fmt, modules in by_format.items()]


def _turned(quant: Mapping[str, Any], method: str, read: Patterns) -> tuple[Applies, Sequence[tuple[Applies, str]]]:
    """What AWQ and GPTQ leave wide, and their format: 4 bits, groups of a size or whole rows. GPTQ stores zero points
    that are all alike where it says `sym`, which engines then leave out."""
    bits, size = (quant.get(new, quant.get(old)) for new, old in (("bits", "w_bit"), ("group_size", "q_group_size")))
    said = f"of {method} with {bits} bits, groups of {size}"
    if bits != 4:
        raise UnknownQuantization(said)
    dynamic = quant.get("dynamic") or {}
    if method == "awq":
        version = str(quant.get("version", "gemm")).lower()
        odd = {"version": version != "gemm", "zero_point": not quant.get("zero_point", True)}
        wide, only, zero = _within(_names(quant, "modules_to_not_convert")), _within([""]), True
    elif not isinstance(dynamic, Mapping):
        raise UnknownQuantization("whose `dynamic` is not an object")
    else:
        odd = {
            "desc_act": bool(quant.get("desc_act")),
            "checkpoint_format": quant.get("checkpoint_format", "gptq") != "gptq",
            "dynamic": any(not key.startswith("-:") for key in dynamic),
        }
        wide, zero = _matcher([f"re:{key[2:]}" for key in dynamic], read), not quant.get("sym", True)
        blocks = {"all": quant.get("modules_in_block_to_quantize") or [[""]]}
        if isinstance(blocks["all"], list) and all(isinstance(each, list) for each in blocks["all"]):
            blocks = {"all": [name for each in blocks["all"] for name in each]}
        only = _within(_names(blocks, "all"))
    if field := next((name for name, is_odd in odd.items() if is_odd), None):
        raise UnknownQuantization(f"{said} and {field} {quant.get(field)!r}")
    if size == -1:
        name = "w4a8 with zero points" if zero else "w4a8 with 16-bit activations"
    else:
        try:
            name = matrix_format(f"w4a16-g{size}{'-zp' * zero}").name
        except UsageError:
            raise UnknownQuantization(said) from None
    return wide, [(only, name)]


def _within(parts: list[str]) -> Applies:
    """Names that have one of them in it."""

    def applies(module: str) -> bool:
        return any(part in module for part in parts)

    return applies


def _wildcards(patterns: list[str], read: Patterns) -> Applies:
    """As vLLM matches modelopt's: a part of the name, or a pattern of `*` and `?` for the whole."""
    shaped = [_compiled(translate(pattern), pattern, read) for pattern in patterns if any(c in pattern for c in "*?[")]

    def applies(module: str) -> bool:
        return any(pattern in module for pattern in patterns) or any(each.match(module) for each in shaped)

    return applies


def _compiled(regular: str, pattern: str, read: Patterns) -> re.Pattern[str]:
    try:
        return read.compiled(regular)
    except PatternError as error:
        raise UnknownQuantization(f"with the pattern {shortened(repr(pattern))}, which {error},") from None


def _below(modules: list[str]) -> Applies:
    """The modules themselves and what is in them."""
    names = set(modules)

    def applies(module: str) -> bool:
        parts = module.split(".")
        return any(".".join(parts[:end]) in names for end in range(1, len(parts) + 1))

    return applies


def is_scheme(name: str) -> bool:
    """Whether a name of `scheme_name` is a scheme's, or words."""
    return " " not in name


def _spread(numbers: Sequence[int]) -> Sequence[int]:
    """Up to five of them: the first, the last and some between."""
    last = len(numbers) - 1
    return [numbers[i] for i in sorted({last * part // 4 for part in range(5)})] if numbers else []


def _names(held: Mapping[str, Any], key: str) -> list[str]:
    """A list of module names or patterns that may be absent."""
    value = held.get(key) or []
    if not isinstance(value, list):
        raise UnknownQuantization(f"whose `{key}` is not a list")
    return [name for name in value if isinstance(name, str)]


_NAME = re.compile(r"[\w.]*")


def _matcher(patterns: list[str], read: Patterns, plain: bool = False) -> Applies:
    """As compressed-tensors matches modules: "Linear", names, or "re:" patterns. plain: as transformers' fine-grained
    FP8 does, by a name's beginning or end, or a pattern that ends where a part of the name does."""
    names, compiled = set(patterns), []
    for pattern in patterns:
        regular = f"(?:{pattern})(?:(?<=\\.)|(?=\\.|$))" if plain else pattern[3:]
        if not _NAME.fullmatch(pattern) if plain else pattern.startswith("re:"):
            compiled.append(_compiled(regular, pattern, read))

    ends = tuple(name for name in names if name)  # of real checkpoints, hundreds
    begins = tuple(f"{name}." for name in ends)

    def applies(module: str) -> bool:
        if module in names or (not plain and "Linear" in names) or any(each.match(module) for each in compiled):
            return True
        return plain and (module.startswith(begins) or module.endswith(ends))

    return applies


def _format(group: Mapping[str, Any]) -> str:
    """The format of a group's matrices; words where its activations are not that format's."""
    weights, acts = group.get("weights"), group.get("input_activations")
    if not isinstance(weights, Mapping):
        raise UnknownQuantization("of compressed-tensors with a group that says nothing of its weights")
    kind = acts.get("type") if isinstance(acts, Mapping) else None
    bits = acts.get("num_bits") if isinstance(acts, Mapping) else None
    stored = _stored(weights, kind)
    held = matrix_format(stored)
    if weights.get("symmetric") is False and held.zero is None:
        return f"{stored} with zero points"  # which no ledger counts
    expected = held.activations
    if kind is None:
        same = expected.scale is None
    else:
        same = (kind == "int", bits) == (expected.values == INT8, BITS[expected.values])
    return stored if same else f"{stored} with {f'{bits}-bit {kind}' if kind else '16-bit'} activations"


def _stored(weights: Mapping[str, Any], activations: str | None) -> str:
    """The format that a group's weights are stored in. activations: their type, None where they stay in 16 bits: it
    chooses between formats that are stored alike."""
    kind, bits, size = weights.get("type"), weights.get("num_bits"), weights.get("group_size")
    strategy = weights.get("strategy") or ("tensor" if size is None else "channel" if size == -1 else "group")
    shared = f"blocks of {weights.get('block_structure')}" if strategy == "block" else f"groups of {size}"
    said = f"of compressed-tensors with {bits}-bit {kind} weights, strategy {strategy!r}, {shared}"
    if weights.get("actorder") not in (None, False, "weight", "static"):
        raise UnknownQuantization(f"{said}, columns in the order of their activations (actorder)")
    if weights.get("symmetric") is False and (kind, bits) != ("int", 4):
        raise UnknownQuantization(f"{said} and zero points (symmetric: false)")
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
            return "nvfp4" if activations else "nvfp4a16"
        case "int", 8, "channel":
            return "w8a8-int8"
        case "int", 4, "channel":
            return "w4a8"
        case "int", 4, "group":
            zero = "-zp" if weights.get("symmetric") is False else ""
            try:
                return matrix_format(f"{'w4afp8' if activations == 'float' else 'w4a16'}-g{size}{zero}").name
            except UsageError:
                pass
    raise UnknownQuantization(said)


def modelslim_scheme_name(types: set[str]) -> str:
    """The scheme of an msModelSlim checkpoint, from the types of its weights. Raises `UnknownQuantization`."""
    formats = {kind: name for name, kind in MODELSLIM_TYPES.items()}
    if unknown := sorted(types - {*formats, "FLOAT"}):
        raise UnknownQuantization(f"{unknown[0]} cannot be read; known: {', '.join(formats)}, FLOAT")
    found = {formats[kind] for kind in types if kind in formats}
    order = (("w4a8", "w4a8"), ("mxfp4", "mxfp4"), ("mxfp8", "mxfp8"), ("w8a8-int8", "w8a8"))
    return next((name for fmt, name in order if fmt in found), PLAIN)
