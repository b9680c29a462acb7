"""Compiles backends/kernels/source to PTX, for every variant and architecture, and writes the index of what came of it.

    python -m tools.kernels [--only NAME ...] [--out FOLDER]      [default: all, to backends/kernels/ptx]
    python -m tools.kernels --changed                             [what is no longer of its source]

Needs Triton (`pip install "glm5-runtime[cuda-check]"`), which needs neither a GPU nor torch. The index holds the
SHA-256 of every PTX file and of what it was made of: `tests/kernels/test_shipped.py` fails where a source was changed
and this was not run.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import importlib
import json
import os
import re
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_DISABLE_LINE_INFO", "1")  # before Triton: else PTX carries this machine's paths

from backends.kernels.variants import SIZE16, TARGETS, VARIANTS, Variant, native_fp8

KERNELS = Path(__file__).resolve().parents[1] / "backends" / "kernels"
INDEX = "index.json"
KEPT = {f"{variant}.sm{target}" for variant in VARIANTS for target in TARGETS}
PTX_VERSION = {80: 80, 90: 80, 100: 86}
"""The PTX that is written, as early as has the architecture: what reads it may be an older driver's compiler."""


def source_hash(variant: Variant) -> str:
    """SHA-256 over what a variant's PTX is made of: its source, what that imports of the others, and its constants and
    parameters."""
    source = (KERNELS / "source" / f"{variant.kernel.partition('.')[0]}.py").read_bytes()
    for name in re.findall(rb"(?m)^from backends\.kernels\.source\.(\w+) import", source):
        source += (KERNELS / "source" / f"{name.decode()}.py").read_bytes()
    return hashlib.sha256(source + json.dumps(dataclasses.asdict(variant)).encode()).hexdigest()


def constants_for(variant: Variant, target: int) -> dict[str, Any]:
    """A variant's constants on an architecture."""
    own = {"NATIVE": native_fp8(target), "LOOK": target == 90}
    return {name: own.get(name, value) for name, value in variant.constants.items()}


def compiled(variant: Variant, target: int) -> Any:
    """Triton's result: `asm["ptx"]`, `metadata`."""
    triton, backends, compiler = map(importlib.import_module, ("triton", "triton.backends.compiler", "triton.compiler"))
    module, _, function = variant.kernel.partition(".")
    kernel = getattr(importlib.import_module(f"backends.kernels.source.{module}"), function)
    constants = constants_for(variant, target)
    order = [name for name in kernel.arg_names if name not in constants]
    if order != list(variant.parameters):
        raise SystemExit(f"{variant.name}: {variant.kernel} takes {order}, variants.py says {list(variant.parameters)}")
    signature = {
        name: "constexpr" if name in constants else variant.parameters[name].partition("/")[0]
        for name in kernel.arg_names
    }
    aligned = [
        index
        for index, name in enumerate(kernel.arg_names)
        if (kind := variant.parameters.get(name, "")) == SIZE16 or kind.startswith("*")
    ]
    multiples = {(index,): [["tt.divisibility", 16]] for index in aligned}
    source = compiler.ASTSource(kernel, signature, constants, multiples)
    options = {
        "num_warps": variant.warps,
        "num_stages": variant.stages,
        "ptx_version": PTX_VERSION[target],
        "enable_fp_fusion": True,
    }
    return triton.compile(source, target=backends.GPUTarget("cuda", target, 32), options=options)


def ptx_of(result: Any) -> str:
    """Its PTX, without comments on where it was made."""
    return re.sub(r"(?m)^\s*//.*\n|[ \t]+$", "", result.asm["ptx"])


def _stale(variant: Variant, entry: dict[str, Any] | None) -> bool:
    return entry is None or entry.get("source_sha256") != source_hash(variant)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="beginnings of variants' names; others stay as they are")
    parser.add_argument("--changed", action="store_true", help="only those whose source is no longer what was compiled")
    parser.add_argument("--out", type=Path, default=KERNELS / "ptx")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    index_file = asked.out / INDEX
    entries: dict[str, Any] = json.loads(index_file.read_text())["entries"] if index_file.exists() else {}
    wanted = [v for v in VARIANTS.values() if not asked.only or v.name.startswith(tuple(asked.only))]
    if asked.changed:
        wanted = [v for v in wanted if any(_stale(v, entries.get(f"{v.name}.sm{target}")) for target in TARGETS)]
    for variant in wanted:
        for target in TARGETS:
            result = compiled(variant, target)
            ptx, name = ptx_of(result), f"{variant.name}.sm{target}.ptx"
            (asked.out / name).write_text(ptx)
            entries[f"{variant.name}.sm{target}"] = {
                "entry": result.metadata.name,
                "shared_bytes": result.metadata.shared,
                "sha256": hashlib.sha256(ptx.encode()).hexdigest(),
                "source_sha256": source_hash(variant),
            }
            if result.metadata.global_scratch_size or result.metadata.num_ctas != 1:
                raise SystemExit(f"{name} wants scratch memory or clusters, which nothing here gives it")
            print(f"{name}: {len(ptx)} bytes, {result.metadata.shared} of shared memory", file=sys.stderr, flush=True)
        _write(asked.out, entries)
    for path in asked.out.glob("*.ptx"):
        if path.stem not in KEPT:
            path.unlink()


def _write(folder: Path, entries: dict[str, Any]) -> None:
    body = {
        "made_by": f"triton {importlib.import_module('triton').__version__}",
        "entries": {name: entries[name] for name in sorted(entries) if name in KEPT},
    }
    (folder / INDEX).write_text(json.dumps(body, indent=1) + "\n")


if __name__ == "__main__":
    main()
