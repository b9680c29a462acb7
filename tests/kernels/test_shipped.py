"""What is shipped: PTX of the sources as they are, for every variant and architecture, and launches of it."""

from __future__ import annotations

import hashlib
import re
import zlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from backends.kernels import library
from backends.kernels.launch import launch, message
from backends.kernels.variants import TARGETS, VARIANTS
from tools.kernels import KERNELS, source_hash

SHIPPED = sorted((KERNELS / "ptx").glob("*.ptx"))


def test_every_variant_is_shipped_for_every_architecture_and_nothing_else() -> None:
    expected = {f"{name}.sm{target}" for name in VARIANTS for target in TARGETS}
    assert set(library.index()["entries"]) == expected == {path.stem for path in SHIPPED}
    assert sum(path.stat().st_size for path in SHIPPED) < 20e6


def test_what_is_shipped_was_compiled_of_the_sources_as_they_are() -> None:
    """Where this fails: python -m tools.kernels --changed"""
    entries = library.index()["entries"]
    for name, entry in entries.items():
        ptx = (KERNELS / "ptx" / f"{name}.ptx").read_bytes()
        assert entry["sha256"] == hashlib.sha256(ptx).hexdigest(), f"{name}: altered"
        assert entry["source_sha256"] == source_hash(VARIANTS[name.partition(".")[0]]), f"{name}: its source changed"


def test_ptx_is_of_its_architecture_and_takes_what_the_launch_gives() -> None:
    """One entry each, as many parameters as a launch has, arrays as 64-bit pointers and numbers in 32 bits, and two
    pointers to scratch memory. No path of the machine it was made on; no flushing of subnormal numbers in products."""
    for path in SHIPPED:
        text, (variant, _, target) = path.read_text(), path.stem.partition(".sm")
        assert re.search(rf"^\.target sm_{target}a?$", text, re.M), path.name
        (entry,) = re.findall(r"\.visible \.entry (\w+)\(", text)
        assert entry == library.compiled_kernel(variant, int(target)).entry
        head = text[text.index(".visible .entry") :].partition("{")[0]
        kinds = re.findall(r"\.param \.(u64|b64|u32|b32|f32)", head)
        wide = [kind.startswith("*") for kind in VARIANTS[variant].parameters.values()] + [True, True]
        assert [kind.endswith("64") for kind in kinds] == wide, path.name
        assert "/" not in re.sub(r"//.*", "", text), path.name
        assert not re.search(r"\b(mul|add|fma)\.(rn\.)?ftz", text), path.name


RUNS = [((8, 0), 80), ((8, 6), 80), ((8, 9), 80), ((9, 0), 90), ((10, 0), 100), ((10, 3), 80), ((12, 0), 80)]


@pytest.mark.parametrize("capability, target", RUNS)
def test_a_capability_takes_ptx_that_it_runs(capability: tuple[int, int], target: int) -> None:
    assert library.target_for(capability) == target


@pytest.mark.parametrize("capability", [capability for capability, _ in RUNS])
def test_what_a_card_launches_fits_into_its_shared_memory(capability: tuple[int, int]) -> None:
    """All but those that one of fewer rows stands in for."""
    large = {name for name in VARIANTS if not library.fits(name, capability)}
    records = {"sparse_attention_u8_64", "latent_attention_u8_64"}
    assert large <= {"sparse_attention_64", "latent_attention_64", "expanded_attention_128_192"} | records
    assert not large or library.shared_bytes_of(capability) < 100 * 1024 + 1


def parsed(data: bytes) -> dict[int, list[Any]]:
    """A protobuf message by field: numbers, and bytes of what has a length."""
    found: dict[int, list[Any]] = {}
    at = 0

    def varint() -> int:
        nonlocal at
        number = shift = 0
        while True:
            byte = data[at]
            at += 1
            number |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return number

    while at < len(data):
        key = varint()
        if key & 7 == 0:
            value: Any = varint()
        else:
            size = varint() if key & 7 == 2 else 4
            value, at = data[at : at + size], at + size
        found.setdefault(key >> 3, []).append(value)
    return found


@given(st.integers(-(2**31), 2**31 - 1), st.integers(1, 65535))
def test_the_launchers_message_says_what_was_asked(number: int, height: int) -> None:
    """Read back by an independent reader, with the field numbers of jaxlib's triton.proto."""
    kernel = library.CompiledKernel("entry", "text", 90, 50_000)
    kinds = ["i32", "fp32"]
    whole = parsed(message(kernel, "join_512", (7, height, 1), 2, kinds, [number, 0.5], (9, 0)))
    (call,) = whole[1]
    assert whole[4] == [b"join_512"]
    fields = parsed(call)
    assert (fields[2], fields[3], fields[4]) == ([7], [height], [1])
    inner = parsed(fields[1][0])
    assert (inner[1], inner[2], inner[3], inner[4], inner[6]) == ([b"entry"], [4], [50_000], [b"text"], [90])
    parameters = [parsed(each) for each in fields[5]]
    assert parameters[:2] == [{1: [b"\x10\x10"]}] * 2
    assert parameters[2] == {3: [number % 2**64]} and parameters[3] == {7: [b"\x00\x00\x00\x3f"]}
    assert parameters[4:] == [{6: [0]}] * 2


def test_a_launch_that_is_not_the_variants_is_refused() -> None:
    x = jnp.zeros((1, 4, 512), jnp.float32)
    out = [jax.ShapeDtypeStruct((1, 512), jnp.bfloat16)]
    with pytest.raises(ValueError, match="join_512 takes .* not 2 arrays and 1 numbers"):
        launch("join_512", (9, 0), out, (1,), [x], [4])
    with pytest.raises(ValueError, match=r"cannot be launched on a grid of \(1, 65536, 1\)"):
        launch("join_512", (9, 0), out, (1, 65536), [x, x], [4])
    half = [x.astype(jnp.bfloat16)] * 6
    with pytest.raises(ValueError, match="takes multiples of 16, not 17"):
        outs = [jax.ShapeDtypeStruct((1,), jnp.bfloat16)]
        launch("expert_up_16_bf16", (9, 0), outs, (1,), half[:4], [1, 17, 32, 1, 1, 1, 1])


def test_a_launch_is_compressed_whole() -> None:
    kernel = library.compiled_kernel("join_512", 90)
    raw = message(kernel, "join_512", (1, 1, 1), 3, ["i32"], [1], (9, 0))
    assert zlib.decompress(zlib.compress(raw, 9)) == raw and kernel.ptx.encode() in raw
