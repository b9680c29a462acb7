"""What a training step keeps on a device, in bytes: a ledger of each pipeline stage, of which the fullest counts.

    weights       16 bits of each; in FP8 training every narrow matrix is kept twice, as it is and transposed, in 8
    gradients     float32 of each that is trained
    optimizer     float32 weight and two moments, 12 bytes each; with `zero` over the ranks that hold the same weights
    activations   what the backward pass reads, of every micro-batch that a stage has under way: min(pp - stage, M),
                  and with interleaved runs (pp - 1) / interleave more (Korthikanti et al., arXiv 2205.05198)
    workspace     one layer while it goes backward (what it keeps, and gradients as large), logits and their gradient,
                  and rows on their way to and from experts

Activations follow from the traced list: outputs of ops that a gradient reads, where nothing is fused; of hidden states
each tp rank has its share of the tokens (Megatron's sequence parallelism). In FP8 what only a narrow product reads is
kept in 8 bits. Routing weights multiply before an expert's second product, as in Megatron-LM, so what comes out of it
is not kept.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping

from foundation.errors import CapacityError
from model.config import LayerType, ModelConfig
from model.formats import Formats, matrix_format
from runtime.deployment.ledger import DeviceMemory, stage_weight_bytes
from runtime.pricing import load as loads
from runtime.pricing.load import ExpertLoad
from runtime.pricing.oplist import Sizes, TracedOp
from runtime.pricing.training import backward
from runtime.pricing.training.layout import TrainLayout
from runtime.pricing.training.passes import StepPrograms, programs
from runtime.pricing.training.step import GRADIENT_BYTES, training_formats
from runtime.pricing.training.weights import stage_weights

OPTIMIZER_BYTES = 12.0
_ADDED = ("o", "down", "shared_down")
"""Products that go into a sum at once, which is what is kept of them."""
_KEPT = ("glm.linear", "glm.head_linear", "glm.route", "glm.select_topk", "add", *backward.ELEMENTWISE)


@dataclasses.dataclass(frozen=True)
class TrainingMemory:
    """Bytes on a device of the fullest stage, by part; they add up to `total_bytes`."""

    parts: Mapping[str, float]
    stage: int
    usable_bytes: float
    name: str

    @property
    def total_bytes(self) -> float:
        return sum(self.parts.values())

    @property
    def fits(self) -> bool:
        return self.total_bytes <= self.usable_bytes

    def lines(self) -> list[str]:
        """For a terminal, GB."""
        rows = [("usable", self.usable_bytes), *((f"- {name}", -size) for name, size in self.parts.items())]
        rows.append(("= free", self.usable_bytes - self.total_bytes))
        return [f"{name:28}{size / 1e9:10.2f} GB" for name, size in rows]

    @property
    def refusal(self) -> str:
        """What to say where it does not fit: a line, and the ledger below it."""
        sizes = f"{self.total_bytes / 1e9:.1f} GB a device of {self.usable_bytes / 1e9:.1f} GB usable"
        instead = "use more devices, smaller micro-batches or more recompute"
        return "\n".join([f"training {self.name} takes {sizes} on stage {self.stage}; {instead}", *self.lines()])

    def check(self) -> None:
        """Raises `CapacityError` with the ledger where it does not fit."""
        if not self.fits:
            raise CapacityError(self.refusal)


def resident_bytes(cfg: ModelConfig, layout: TrainLayout) -> float:
    """Bytes of weights, gradients and optimizer state on a device of the stage that has most."""
    return max(sum(_resident(cfg, layout, stage).values()) for stage in range(layout.pp))


def _resident(cfg: ModelConfig, layout: TrainLayout, stage: int) -> dict[str, float]:
    weights = stage_weights(cfg, layout)[stage]
    return {
        "weights": sum(stage_weight_bytes(cfg, layout.shard, Formats(), stage, mtp=False).values()),
        "gradients": GRADIENT_BYTES * weights.all,
        "optimizer": OPTIMIZER_BYTES * weights.held(layout),
    }


def training_memory(
    cfg: ModelConfig,
    layout: TrainLayout,
    device: DeviceMemory,
    formats: str = "bf16",
    micro_batches: float = math.inf,
    load: ExpertLoad | None = None,
) -> TrainingMemory:
    """The ledger of the fullest stage with full micro-batches. formats: see `training_formats`. micro_batches: of a dp
    rank, where they are fewer than stages. Raises `UsageError` for a layout that the model does not divide by.
    """
    layout.check(cfg)
    load = load or loads.uniform(cfg.moe.experts if cfg.moe else 1)
    keeps = _Keeps(cfg, layout, load, training_formats(formats))
    whole = dataclasses.replace(layout, recompute="none")
    ledgers = []
    for stage, layers in enumerate(layout.shard.stage_layers(cfg.num_layers)):
        kinds = Counter(cfg.layers[layer] for layer in layers)
        more = (layout.pp - 1) / layout.interleave if layout.interleave > 1 else 0.0
        under_way = min(layout.pp - stage + more, max(micro_batches, 1.0))
        kept = sum(count * keeps.layer(kind, layout) for kind, count in kinds.items())
        at_once = 2.0 * max(keeps.layer(kind, whole) for kind in kinds)
        last = stage == layout.pp - 1
        ledgers.append(
            {
                **_resident(cfg, layout, stage),
                "activations": kept * under_way,
                "workspace": at_once + keeps.exchanged + (keeps.logits if last else 0.0),
                "communication": device.communication_bytes,
                "runtime": device.runtime_bytes,
            }
        )
    stage = max(range(layout.pp), key=lambda number: sum(ledgers[number].values()))
    name = f"{cfg.name} on {layout.devices} devices ({layout.name}, recompute {layout.recompute})"
    return TrainingMemory(ledgers[stage], stage, device.usable_bytes, name)


class _Keeps:
    """Bytes that a full micro-batch leaves on a device."""

    def __init__(self, cfg: ModelConfig, layout: TrainLayout, load: ExpertLoad, formats: Formats):
        self.operand_bytes = matrix_format(formats.experts).activations.bytes_per_element
        self.cfg, self.layout, self.load = cfg, layout, load
        self.tokens = math.ceil(layout.rank_tokens)
        self.programs: StepPrograms = programs(cfg, dataclasses.replace(layout.shard, pp=1))

    def layer(self, kind: LayerType, layout: TrainLayout) -> float:
        """Of one layer, by the longer of its two programs."""
        given = 2.0 * self.tokens * self.cfg.hidden_size / layout.tp
        if layout.recompute == "full":
            return given
        return given + max(
            sum(self._op(op, layout) for op in program.ops)
            for program in (self.programs.dense[kind], self.programs.sparse[kind])
        )

    def _op(self, op: TracedOp, layout: TrainLayout) -> float:
        if layout.recompute == "selective" and backward.repeated(op):
            return 0.0
        if op.name == "glm.expert_ffn":
            return self._experts(op, layout)
        if op.name.endswith("_attention"):
            return self._attention(op, layout)
        if op.name not in _KEPT or (op.name != "glm.select_topk" and not backward.differentiated(op)):
            return 0.0
        if op.weights and op.weights[0] in _ADDED:
            return 0.0
        operand = op.name in ("glm.rms_norm", "glm.swiglu")
        size = sum(x.elements(self._sizes) * (self.operand_bytes if operand else x.element_bytes) for x in op.outputs)
        shared = op.outputs[0].at(self._sizes)[-1:] == (self.cfg.hidden_size,)
        return size / layout.tp if shared else float(size)

    def _attention(self, op: TracedOp, layout: TrainLayout) -> float:
        """What it gives, and where keys and values are expanded, those."""
        size = 2.0 * op.outputs[0].elements(self._sizes)
        if op.name == "glm.expanded_attention" and layout.recompute != "selective":
            (h, nope, _), (_, _, v) = op.inputs[3].at(self._sizes), op.inputs[4].at(self._sizes)
            size += 2.0 * self.tokens * h * (nope + v)
        return size

    def _experts(self, op: TracedOp, layout: TrainLayout) -> float:
        """Rows of the busiest rank: given, gate and up, and their product unless it is computed again."""
        half = (len(op.inputs) - 3) // 2
        f = op.inputs[3 + half].at(self._sizes)[1]
        product = 0.0 if layout.recompute == "selective" else self.operand_bytes * f
        return self.rows * (self.operand_bytes * self.cfg.hidden_size + 2.0 * 2 * f + product)

    @property
    def _sizes(self) -> Sizes:
        return Sizes(self.tokens, 1, 1)

    @property
    def rows(self) -> float:
        """Token-expert pairs of the busiest rank."""
        if self.cfg.moe is None:
            return 0.0
        shard = self.layout.shard
        met = self.tokens * (shard.dp if shard.dispatches else 1)
        return float(self.load.busiest_rank(met, self.cfg.moe.top_k, shard.ep)[0])

    @property
    def exchanged(self) -> float:
        """Rows sent and received."""
        return 2 * 2.0 * self.rows * self.cfg.hidden_size if self.layout.shard.dispatches else 0.0

    @property
    def logits(self) -> float:
        """In float32, and their gradient."""
        return 8.0 * self.tokens * self.cfg.vocab_size / self.layout.tp
