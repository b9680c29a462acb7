"""The Ascend package: graphs of torch_npu's operators, and all that an engineer with the chip types.

Beside the graphs (`.pt2`), the weight files and the manifest: `run.py`, which needs torch and torch_npu alone, and
`README.md`, which says what to type and what to expect. docs/ascend.md has the rest.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from importlib import resources
from pathlib import Path

from backends.ascend import constraints
from backends.ascend.caches import PACKED, SCALED
from backends.ascend.operators import npu_release
from backends.ascend.sums import bias_name
from backends.ascend.target import NpuOptions
from backends.ascend.writer import write
from backends.errors import ArtifactError, Unsupported
from backends.toolchains.walker import Graph, Port
from foundation.errors import UsageError
from hw_profiles import Profile
from model.config import Mla
from model.formats import INT8, matrix_format, scheme
from runtime.deployment.manifest import Gear, Manifest, Phase, Step, Value, WeightRef
from runtime.porting.export.ascend_readme import readme
from runtime.porting.export.job import ExportJob, op_uses, values

RUN = "run.py"
OPERATORS = ("all", "local", "none")
_PROFILE = "ascend-910c-die"  # of `constraints.DEFAULT_SERIES`


class AscendWriter:
    """Options of the request: `npu_ops` ("all" of torch_npu's operators where they take a call, "local": but those that
    talk to other devices, or "none": ATen alone), `profile` (a Profile or None: whose number formats a package is held
    to) and `kv` ("int8", or "" for caches as wide as activations)."""

    packages: tuple[str, ...] = ("torch",)

    def __init__(self, request: ExportJob):
        chosen = request.options.get("npu_ops", "all")
        if chosen not in OPERATORS:
            raise UsageError(f"--npu-ops {chosen}: {', '.join(OPERATORS[:-1])} or {OPERATORS[-1]}")
        _refuse(request, request.options.get("profile"))
        self.options = request.options.get("npu_options") or NpuOptions(fused=chosen != "none")
        self.options = dataclasses.replace(self.options, series=request.series)
        if request.options.get("kv"):
            self.options = dataclasses.replace(self.options, int8_rope=_rope_dim(request))
        self.chosen = chosen if self.options.fused else "none"
        if matrix_format(request.cut.scheme.dense).values != INT8 and _expands(request):
            self.options = dataclasses.replace(self.options, prolog=False)
        gears: list[tuple[Phase, Gear]] = [(phase, gear) for phase, each in request.gears.items() for gear in each]
        profile = request.options.get("profile")
        self.profile = profile.name if profile else _PROFILE
        self.other_chip = "" if request.documented or profile is None else profile.description
        self.not_sent = Counter(why for each in gears if (why := request.cut.not_sent(*each)))
        why_not = constraints.undocumented(constraints.DISPATCH, request.series)
        if request.cut.exchanges and chosen == "all" and why_not:
            self.not_sent[why_not] = len(gears)
        sent = [request.cut.sent(gear) for phase, gear in gears if request.cut.sends(phase, gear)]
        self.buffer_mb = max((each.buffer_mb for each in sent), default=0)
        self.nz: dict[str, set[str]] = {}
        self.plain: dict[str, set[str]] = {}  # that some graph reads in another way
        self.declined: Counter[tuple[str, str]] = Counter()
        self.operators: set[str] = set()

    def write(self, graph: Graph, folder: Path, stem: str) -> Step:
        from runtime.execution.package.torch_archive import checked

        made, path = write(graph, self.options), folder / f"{stem}.pt2"
        path.write_bytes(made.archive)
        try:
            checked(path)
        except ArtifactError as error:
            raise Unsupported(f"what torch makes of {stem} holds more than a package may: {error}") from None
        unit = graph.name.rpartition(".")[0] or graph.name
        for port in made.inputs:
            owner = "outer" if port.name.startswith("outer.") else unit
            of = self.nz if port.name in made.nz else self.plain
            of.setdefault(owner, set()).add(port.name)
        self.declined += made.declined
        self.operators |= {name for _, names in made.used for name in names}
        uses: Counter[tuple[str, str, str]] = Counter()
        for (op, names), count in made.used.items():
            uses[op, "custom" if names else "decomposed", ", ".join(dict.fromkeys(names)) or "aten"] += count
        return Step(
            kind="graph",
            name=graph.name,
            inputs=values(made.inputs),
            outputs=values(made.outputs),
            files={"any": f"{stem}.pt2"},
            aliases=dict(made.aliases),
            ops=op_uses(uses),
        )

    def finish(self, folder: Path, manifest: Manifest) -> Manifest:
        nz = {unit: sorted(names - self.plain.get(unit, set())) for unit, names in self.nz.items()}
        manifest.extra["ascend"] = {
            "npu_ops": self.chosen,
            "torch_npu": npu_release().version,
            "series": self.options.series,
            "profile": self.profile,
            "operators": sorted(self.operators),
            "nz": {unit: names for unit, names in sorted(nz.items()) if names},
            "declined": [f"{op}: {why} ({n} times)" for (op, why), n in sorted(self.declined.items())]
            + [f"experts on other devices: {why} ({n} gears)" for why, n in sorted(self.not_sent.items())],
        }
        if self.other_chip:
            manifest.extra["ascend"]["chip"] = self.other_chip
        if self.options.int8_rope is not None:
            manifest.extra["ascend"]["rows"] = {"latent": PACKED.name, "index": SCALED.name}
        if self.buffer_mb:  # of the group in which the operators that exchange tokens are alone
            manifest.extra["ascend"]["exchange"] = {"hccl_buffer_mb": self.buffer_mb}
        caches = {unit: tuple(p for each in held for p in self._parts(each)) for unit, held in manifest.caches.items()}
        weights = {
            unit: tuple(each for ref in refs for each in self._refs(unit, ref))
            for unit, refs in manifest.weights.items()
        }
        manifest = dataclasses.replace(manifest, caches=caches, weights=weights)
        text = (resources.files("runtime.porting.export") / "ascend_run.py").read_text(encoding="utf-8")
        (folder / RUN).write_text(text, encoding="utf-8")
        (folder / "README.md").write_text(readme(manifest), encoding="utf-8")
        return manifest

    def _refs(self, unit: str, ref: WeightRef) -> tuple[WeightRef, ...]:
        """A weight's entry, and behind a scale that of the sums which some kernels want beside it."""
        bias = bias_name(f"{ref.name.removesuffix('.scale')}.values")
        if not ref.name.endswith(".scale") or bias not in self.plain.get(unit, set()):
            return (ref,)
        shape, whole, split = ((*x[:1], *x[2:]) for x in (ref.shape, ref.whole, ref.split))
        sums = dataclasses.replace(ref, name=bias, shape=shape, whole=whole, split=split, layout="SUMS")  # type: ignore[arg-type]
        return (ref, sums)

    def _parts(self, cache: Value) -> tuple[Value, ...]:
        port = Port(cache.name, cache.shape, cache.dtype)
        form = self.options.form(port)
        return values(form.ports(port)) if form else (cache,)


def _expands(request: ExportJob) -> bool:
    """Whether some graph of a package expands keys from latents: it then reads matrices in plain products."""
    topk = request.cfg.indexer.topk if request.cfg.indexer else None
    contexts = [gear.context_pages * request.page_size for gear in request.gears.get("prefill", ())]
    return any(topk is None or context <= topk for context in contexts)


def _rope_dim(request: ExportJob) -> int:
    """Of the latents that are to be kept in int8. Raises `UsageError` where there are none."""
    if request.options["kv"] != "int8":
        raise UsageError(f"--kv {request.options['kv']}: int8, or leave it out for caches as wide as activations")
    if not isinstance(request.cfg.attention, Mla):
        raise UsageError(f"--kv int8: {request.cfg.name} keeps no latents, whose scales are found as rows are written")
    return request.cfg.attention.rope_dim


def _refuse(request: ExportJob, profile: Profile | None) -> None:
    """Raises `UsageError` for a chip that is none, or that has no units for the package's number formats."""
    if profile is None:
        return
    if profile.family != "ascend":
        raise UsageError(f"--profile {profile.name}: {profile.description} is no Ascend chip")
    if lacking := set(scheme(request.scheme).formats) - {"f32", *profile.formats.weights}:
        raise UsageError(
            f"--formats {request.scheme}: {profile.name} has no units for {', '.join(sorted(lacking))}; it has "
            f"{', '.join(profile.formats.weights)}"
        )
    if (kv := request.options.get("kv")) and kv not in profile.formats.kv:
        raise UsageError(f"--kv {kv}: {profile.name} keeps caches in {' or '.join(profile.formats.kv)}")


__all__ = ["AscendWriter"]
