"""From what a person names to what is exported: gears, number formats, and the grid of devices."""

from __future__ import annotations

import dataclasses
from importlib.util import find_spec
from pathlib import Path

from backends.toolchains.narrow import refusal
from foundation.errors import UsageError, shortened
from foundation.limits import within
from model.checkpoint import Checkpoint, groups
from model.config import ModelConfig
from model.formats import FORMATS, SCHEMES, matrix_format, scheme
from model.quantised import shared_size
from model.split import Grid, Layout
from model.weights import layer_weights
from runtime.deployment.manifest import MOST_STEP, Gear
from runtime.porting.export.job import ExportJob

_NEEDS = {"onnx": ("onnx",), "ascend": ("torch",), "torch": ("torch",)}  # packages beyond the core's
_CONTEXT = 4096  # tokens, by default
_MOST_GEARS = 256  # of a phase; each is traced and written
WIDE = {"f32": "float32", "bf16": "bfloat16"}
"""The dtype of a scheme's wide format."""


@dataclasses.dataclass(frozen=True)
class Placed:
    """A grid of devices, by name, and the plan it is from."""

    grid: Grid
    name: str
    plan_hash: str | None = None


def from_layout(cfg: ModelConfig, layout: Layout) -> Placed:
    """Raises `UsageError` where the model does not divide."""
    layout.check(cfg)
    return Placed(Grid.of(cfg, layout), layout.name)


def from_plan(cfg: ModelConfig, path: Path) -> Placed:
    """The pool that makes the answers. Raises `PlanFileError` for a plan of another model."""
    from runtime.deployment.plan import Plan
    from runtime.execution.cluster.deploy import grid_of

    plan = Plan.read(path, cfg)
    return Placed(grid_of(cfg, plan.serving), plan.serving.layout.name, plan.hash)


def preset_scheme(cfg: ModelConfig) -> str:
    """The number formats a model's own checkpoint has."""
    return cfg.stored_scheme.name


def check(request: ExportJob) -> None:
    """Raises `UsageError` where the format has no graphs in these number formats, or needs what is not installed."""
    for package in _NEEDS.get(request.format, ()):
        if find_spec(package) is None:
            raise UsageError(f"--format {request.format} needs {package}: pip install 'glm5-runtime[export]'")
    wanted = scheme(request.scheme)
    if why := refusal(wanted, request.format):
        known = [name for name, each in SCHEMES.items() if refusal(each, request.format) is None]
        raise UsageError(f"--formats {request.scheme}: {why}; choose {', '.join(known)}")
    _check_groups(request)
    narrow = any(matrix_format(name).narrow for name in wanted.formats)
    if request.wide_dtype and not narrow and request.wide_dtype != WIDE[wanted.wide]:
        raise UsageError(
            f"--dtype {request.wide_dtype}: with unquantised weights --formats decides; give --formats "
            f"{next(name for name, dtype in WIDE.items() if dtype == request.wide_dtype)}"
        )
    if request.weights and request.scheme == "fp8" and request.cfg.weight_format != "fp8-block":
        raise UsageError("--formats fp8 with weights needs a checkpoint in FP8; choose bf16, or --weights none")
    if request.weights and request.scheme == "fp8" and request.checkpoint and (wide := _not_fp8(request.checkpoint)):
        raise UsageError(f"--formats fp8: {wide} is not all in FP8 blocks; choose bf16, or --weights none")


def _not_fp8(checkpoint: Checkpoint) -> str | None:
    """A weight of which not every matrix is stored in FP8 blocks, though it may be."""
    for group in sum(groups(checkpoint.config, checkpoint.has_mtp).values(), []):
        for weight in group.weights:
            if weight.stays_narrow and checkpoint.kept(group, weight) != FORMATS["fp8-block"]:
                return next(group.tensors(weight))
    return None


def _check_groups(request: ExportJob) -> None:
    """Raises `UsageError` for matrices whose rows do not divide into a format's groups."""
    what = request.cut
    for kind in what.unit_types.values():
        for weight in layer_weights(request.cfg, kind):
            group = what.held(weight, kind).shared
            width = weight.shape[1 if weight.expert_count else 0]
            if isinstance(group, int) and not _divides(width, group):
                raise UsageError(
                    f"--formats {request.scheme}: {weight.name} has rows of {width}, which do not divide into groups "
                    f"of {group}; choose another size"
                )


def _divides(width: int, group: int) -> bool:
    """Whether a group's size can be told from how many there are (`model.quantised.shared_size`)."""
    try:
        return shared_size(width, -(-width // group)) == min(group, width)
    except ValueError:
        return False


def gears(cfg: ModelConfig, phase: str, batch: str, chunk: str, context: str | None, page_size: int) -> list[Gear]:
    """Every combination. Raises `UsageError` for sizes that make no step."""
    tokens = sizes("--chunk", chunk) if phase == "prefill" else [1]
    contexts = sizes("--context", context or str(min(_CONTEXT, cfg.max_positions)))
    for size in contexts:
        if size % page_size:
            raise UsageError(f"--context {size}: not a multiple of the page size, {page_size}")
        if size > cfg.max_positions:
            raise UsageError(f"--context {size}: {cfg.name} has {cfg.max_positions} positions")
        if max(tokens) > size:
            raise UsageError(f"--chunk {max(tokens)}: exceeds --context {size}")
    found = [Gear(b, t, c // page_size) for b in sizes("--batch", batch) for t in tokens for c in contexts]
    within(f"gears ({phase}): their number", len(found), _MOST_GEARS)
    for gear in found:
        size, held = max(gear.tokens, gear.context_pages) * gear.sequences, gear.context_pages * page_size
        if size > MOST_STEP or gear.sequences * held >= 2**31:
            raise UsageError(
                f"--batch {gear.sequences:,} of --context {held:,}: a step has at most {MOST_STEP:,} tokens and pages, "
                f"and {2**31 - 1:,} tokens of context; export fewer sequences"
            )
    return found


def sizes(option: str, text: str) -> list[int]:
    """Whole positive numbers separated by commas, ascending."""
    try:
        found = sorted({int(part) for part in text.split(",")})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise UsageError(f"{option} {shortened(text)}: give whole numbers of 1 or more, separated by commas")
    within(option, found[-1], MOST_STEP)
    return found
