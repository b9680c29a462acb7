"""What a training run is: a TOML file, read strictly. Free of JAX.

`[model]` has the fields of a Hugging Face config.json, `[optimizer]` and `[[stage]]` those of the dataclasses below;
docs/training.md says what they mean. A key that nobody reads is refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar

from foundation.errors import UsageError
from foundation.reading import Unreadable, read_toml
from model.config import MOST_DRAFTS, ModelConfig
from model.errors import ConfigError
from model.hf_config import from_hf
from model.quantised import integer_formats
from runtime.deployment.document import Fault, place, validated
from runtime.training.data import TASKS

DEFAULT = Path(__file__).parent / "tiny.toml"  # makes the embedded checkpoint

MOST_STEPS = 100_000_000
"""Of a stage; the largest runs have a million."""
MOST_STEP_TOKENS = 1 << 27
"""Of a step, which is one batch here: the largest runs have a tenth."""

MODEL_DEFAULTS: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "hidden_act": "silu",
    "indexer_rope_interleave": True,
    "initializer_range": 0.02,
    "moe_layer_freq": 1,
    "n_group": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_interleave": True,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "use_cache": True,
}
MODEL_KEYS = {
    *MODEL_DEFAULTS, "first_k_dense_replace", "head_dim", "hidden_size", "index_head_dim", "index_n_heads",
    "index_topk", "indexer_types", "intermediate_size", "kv_lora_rank", "max_position_embeddings",
    "mlp_layer_types", "moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_attention_heads",
    "num_experts_per_tok", "num_hidden_layers", "num_key_value_heads", "q_lora_rank", "qk_head_dim",
    "qk_nope_head_dim", "qk_rope_head_dim", "rope_parameters", "routed_scaling_factor", "v_head_dim", "vocab_size",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Peak rates of matrices, of embeddings, norms and router, and of indexers (alone, and beside the rest); the share
    of the steps over which they rise, and fall; what a router's bias moves a step."""

    name: Literal["muon-split", "muon", "adamw"] = "muon-split"
    matrix_rate: float = 0.01
    other_rate: float = 0.005
    index_rate: float = 0.01
    weight_decay: float = 0.0
    clip: float = 1.0
    rise: float = 0.02
    fall: float = 0.4
    balance_rate: float = 0.002

    def problem(self) -> str | None:
        for key in ("matrix_rate", "other_rate", "index_rate", "clip"):
            if not getattr(self, key) > 0:
                return f"`{key}` must be above 0, not {getattr(self, key)}"
        if self.weight_decay < 0 or self.balance_rate < 0:
            return "`weight_decay` and `balance_rate` must be 0 or more"
        if not (self.rise >= 0 and self.fall >= 0 and self.rise + self.fall <= 1):
            return f"`rise` + `fall` = {self.rise} + {self.fall} must lie between 0 and 1"
        return None


@dataclasses.dataclass(frozen=True)
class TrainingStage:
    """So many steps of one kind: `rows` sequences of `length` tokens, tasks by `mix`. With `draft_weight` the MTP
    layer learns too, `drafts` deep, on `draft_rows` of the sequences. rounding: integer formats that the weights are
    seen in (quantisation-aware training), "" for none."""

    attention: Literal["dense", "warmup", "sparse"]
    steps: int
    rows: int
    length: int
    mix: Mapping[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(TASKS, 1.0))
    drafts: int = 3
    draft_rows: int = 0
    draft_weight: float = 0.0
    rounding: str = ""

    def problem(self) -> str | None:
        if said := unknown_rounding(self.rounding):
            return said
        for key in ("steps", "rows", "length"):
            if getattr(self, key) < 1:
                return f"`{key}` must be at least 1, not {getattr(self, key)}"
        if self.steps > MOST_STEPS or self.rows * self.length > MOST_STEP_TOKENS or self.drafts > MOST_DRAFTS:
            return (
                f"at most {MOST_STEPS:,} `steps` of {MOST_STEP_TOKENS:,} tokens (`rows` x `length`) and {MOST_DRAFTS} "
                f"`drafts`, not {self.steps:,} of {self.rows:,} x {self.length:,} and {self.drafts:,}"
            )
        if unknown := sorted(set(self.mix) - set(TASKS)):
            return f"`mix` has no task {unknown[0]!r}; it takes {', '.join(TASKS)}"
        if any(share < 0 for share in self.mix.values()) or not sum(self.mix.values()) > 0:
            return "the shares of `mix` must be 0 or more, and one above 0"
        if not 0 <= self.draft_rows <= self.rows:
            return f"`draft_rows` must lie between 0 and `rows` = {self.rows}, not {self.draft_rows}"
        if self.drafts < 1 or self.draft_weight < 0:
            return "`drafts` must be 1 or more and `draft_weight` 0 or more"
        if self.attention == "warmup" and self.draft_weight:
            return "the warm-up trains indexers only: set `draft_weight` to 0"
        return None

    @property
    def draft_depths(self) -> int:
        return self.drafts if self.draft_rows else 0


def unknown_rounding(name: str) -> str | None:
    """What is wrong with a stage's `rounding`."""
    if name:
        try:
            integer_formats(name)
        except UsageError as error:
            return f"`rounding`: {error}"
    return None


@dataclasses.dataclass(frozen=True)
class TrainConfig:
    """A run. `raw_model` is the checkpoint's config.json but for the ids of its stop tokens."""

    raw_model: Mapping[str, Any]
    optimizer: OptimizerConfig
    stages: tuple[TrainingStage, ...]
    seed: int
    save_every: int
    log_every: int

    @property
    def model(self) -> ModelConfig:
        return from_hf(self.raw_model, "[model]")

    @property
    def steps(self) -> int:
        return sum(stage.steps for stage in self.stages)

    def at(self, step: int) -> TrainingStage:
        """The stage of a step, counted from 0."""
        for stage in self.stages:
            if step < stage.steps:
                return stage
            step -= stage.steps
        raise IndexError(step)

    def count(self, *attention: str) -> int:
        """Steps in stages of these kinds."""
        return sum(stage.steps for stage in self.stages if stage.attention in attention)

    @property
    def hash(self) -> str:
        """Of everything that decides what is trained."""
        content = dataclasses.asdict(dataclasses.replace(self, save_every=0, log_every=0))
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclasses.dataclass(frozen=True)
class _File:
    """The tables of the file, before each is read."""

    model: Mapping[str, Any]
    optimizer: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    stage: tuple[Mapping[str, Any], ...] = ()
    seed: int = 0
    save_every: int = 100
    log_every: int = 20

    def problem(self) -> str | None:
        for key, least in (("seed", 0), ("save_every", 1), ("log_every", 1)):
            if getattr(self, key) < least:
                return f"`{key}` must be a whole number, {least} or more, not {getattr(self, key)}"
            if getattr(self, key) >= 2**31:
                return f"`{key}` must be below 2^31, not {getattr(self, key):.3g}"
        return None if self.stage else "needs at least one [[stage]]"


class Checked(Protocol):
    """A dataclass that says what is wrong with its values, in half a line; None where nothing is."""

    def problem(self) -> str | None: ...


_Table = TypeVar("_Table", bound=Checked)


def table(where: str, kind: type[_Table], raw: Any) -> _Table:
    """A dataclass from a TOML table, strictly. Raises `UsageError`, one line that begins with `where`."""
    made: _Table = validated(kind, raw, UsageError, where, say=_say)
    if problem := made.problem():
        raise UsageError(f"{where}: {problem}")
    return made


def _say(where: str, fault: Fault) -> str:
    if fault.missing:
        return f"{where}: missing key `{fault.missing[0]}`"
    if fault.unknown:
        return f"{where}: unknown key `{fault.unknown[0]}`; it takes {', '.join(fault.known)}"
    wrong = "must be " + " or ".join(map(repr, fault.choices)) if fault.choices else fault.wrong
    return f"{where}: `{place(fault.path)}` {wrong}, not {fault.shown}"


def tables(path: Path) -> dict[str, Any]:
    """What a TOML file holds. Raises `UsageError`, one line."""
    try:
        return read_toml(path)
    except Unreadable as error:
        what = f"not valid TOML ({error})" if error.reason in ("syntax", "encoding") else error
        raise UsageError(f"{path}: {what}") from None


def read(path: str | Path) -> TrainConfig:
    """The run that a TOML file describes. Raises `UsageError`, one line, for anything it cannot mean."""
    path = Path(path)
    raw = tables(path)
    file = table(str(path), _File, raw)
    config = TrainConfig(
        _model(path, file.model),
        table(f"{path}: [optimizer]", OptimizerConfig, file.optimizer),
        tuple(table(f"{path}: [[stage]] {i}", TrainingStage, each) for i, each in enumerate(file.stage, 1)),
        file.seed,
        file.save_every,
        file.log_every,
    )
    _check(path, config)
    return config


def _model(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    if unknown := sorted(set(raw) - MODEL_KEYS):
        raise UsageError(f"{path}: [model]: unknown key `{unknown[0]}`")
    full = {**MODEL_DEFAULTS, **raw}
    try:
        from_hf(full, "[model]")
    except ConfigError as error:
        raise UsageError(f"{path}: {error}") from None
    return full


def _check(path: Path, config: TrainConfig) -> None:
    model = config.model
    if model.model_type != "glm_moe_dsa" or model.indexer is None or model.moe is None:
        raise UsageError(f"{path}: [model]: training is for `model_type` glm_moe_dsa with experts")
    if model.mtp_layers > 1:
        raise UsageError(f"{path}: [model]: `num_nextn_predict_layers` must be 0 or 1: one MTP layer is stored")
    for i, stage in enumerate(config.stages, 1):
        where = f"{path}: [[stage]] {i}"
        if stage.length > model.max_positions:
            raise UsageError(
                f"{where}: `length` {stage.length} exceeds `max_position_embeddings` {model.max_positions}"
            )
        if stage.attention != "dense" and stage.length <= model.indexer.topk:
            raise UsageError(f"{where}: `length` {stage.length} must exceed `index_topk` {model.indexer.topk}")
        if stage.draft_rows and not model.mtp_layers:
            raise UsageError(f"{where}: `draft_rows` needs `num_nextn_predict_layers` = 1")
