"""The oracle: tiny random checkpoints saved by transformers, and our graph driven beside them.

transformers and torch are imported only where a checkpoint is made, so that tests without an oracle do
not need them.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from model import graph
from model.cache import cache_rows
from model.checkpoint import Checkpoint, groups
from model.config import ModelConfig

VOCAB, SEQUENCES, LENGTH = 160, 3, 60  # every reference has logits [SEQUENCES, LENGTH, VOCAB]
TOPK = 16  # of the indexer: most of the LENGTH positions lie past it
TOLERANCE = 2e-4  # the project's promise; what is measured is about 2e-6
FAIR_GAP = 5e-6  # least distance between the last choice and the first rejected one: no near-ties

_COMMON = {
    "vocab_size": VOCAB, "hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 48,
    "num_hidden_layers": 3, "num_attention_heads": 4, "n_shared_experts": 1, "n_routed_experts": 8,
    "num_experts_per_tok": 3, "max_position_embeddings": 512, "pad_token_id": 0, "first_k_dense_replace": 1,
}  # fmt: skip
_MLA = {
    "num_key_value_heads": 4, "q_lora_rank": 48, "kv_lora_rank": 32, "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16, "v_head_dim": 32,
}  # fmt: skip
# 16 heads: with few, ReLU makes scores of exactly zero, and torch breaks ties in no defined order.
_DSA = {"index_topk": TOPK, "index_head_dim": 32, "index_n_heads": 16}
_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
_PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}}
_YARN = {
    "rope_parameters": {
        "rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 128,
        "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0,
    }
}  # fmt: skip
_GROUPS = {"n_group": 4, "topk_group": 2}
_GQA = {"num_key_value_heads": 2, "head_dim": 32, **_PARTIAL}


@dataclasses.dataclass(frozen=True)
class Case:
    """A tiny model: the prefix of its transformers classes and its config; `drop` names fields that are
    taken out of the saved config.json, so that we must derive them."""

    prefix: str
    fields: Mapping[str, Any]
    drop: tuple[str, ...] = ()


CASES: dict[str, Case] = {
    "glm_moe_dsa": Case(
        "GlmMoeDsa",
        {**_COMMON, **_MLA, **_DSA, **_ROPE, "num_hidden_layers": 5, "routed_scaling_factor": 2.5,
         "indexer_types": ["full", "full", "shared", "full", "shared"]},
    ),
    "deepseek_v32": Case("DeepseekV32", {**_COMMON, **_MLA, **_DSA, **_GROUPS, **_YARN}),
    "deepseek_v3": Case("DeepseekV3", {**_COMMON, **_MLA, **_GROUPS, **_YARN}),
    "glm4_moe_lite": Case("Glm4MoeLite", {**_COMMON, **_MLA, **_ROPE}),
    "glm4_moe": Case("Glm4Moe", {**_COMMON, **_GQA, "attention_bias": True, "use_qk_norm": True}),
    # variants
    "glm_moe_dsa-freq": Case(
        "GlmMoeDsa",
        {**_COMMON, **_MLA, **_DSA, **_ROPE, "num_hidden_layers": 5, "index_topk_freq": 3, "index_skip_topk_offset": 2},
        drop=("indexer_types", "mlp_layer_types", "layer_types"),
    ),
    "deepseek_v3-plain": Case(
        "DeepseekV3",
        {**_COMMON, **_MLA, **_ROPE, "q_lora_rank": None, "rope_interleave": False, "n_group": 1, "topk_group": 1,
         "norm_topk_prob": False, "n_shared_experts": 2},
    ),
    "glm4_moe-air": Case("Glm4Moe", {**_COMMON, **_GQA, "attention_bias": False, "use_qk_norm": False}),
}  # fmt: skip
FAMILIES = ("glm_moe_dsa", "deepseek_v32", "deepseek_v3", "glm4_moe_lite", "glm4_moe")


@dataclasses.dataclass(frozen=True)
class Oracle:
    """A checkpoint saved by transformers, its torch model, our view of it, and reference logits."""

    name: str
    path: Path
    torch_model: Any
    config: ModelConfig
    weights: dict[str, Any]
    tokens: np.ndarray  # int32 [SEQUENCES, LENGTH]
    logits: np.ndarray  # float32 [SEQUENCES, LENGTH, VOCAB]
    gap: float  # the narrowest top-k decision behind `logits`

    @property
    def raw_config(self) -> dict[str, Any]:
        return json.loads((self.path / "config.json").read_text())


def build(name: str, path: Path) -> Oracle:
    """Makes the checkpoint of `CASES[name]` under `path`."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.disable_progress_bar()
    case = CASES[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{case.prefix}Config")(**case.fields)
    model = getattr(transformers, f"{case.prefix}ForCausalLM")(config).eval()
    randomise(model)
    model.save_pretrained(path)
    config_file = path / "config.json"
    raw = {key: value for key, value in json.loads(config_file.read_text()).items() if key not in case.drop}
    config_file.write_text(json.dumps(raw))
    checkpoint = Checkpoint(path)
    tokens, logits, gap = _fair_reference(model)
    return Oracle(name, path, model, checkpoint.config, on_device(checkpoint.load()), tokens, logits, gap)


def randomise(model: Any) -> None:
    """Weights of a useful size, and router and norm parameters away from their trivial defaults."""
    import torch

    with torch.no_grad():
        for name, value in [*model.named_parameters(), *model.named_buffers()]:
            if value.ndim >= 2:
                value.normal_(0, 0.08)
            elif "norm" in name and "weight" in name:
                value.normal_(1, 0.1)
            elif "bias" in name:
                value.normal_(0, 0.1)


def torch_logits(model: Any, tokens: np.ndarray) -> np.ndarray:
    """Float32 logits [b, t, vocab] of a torch model."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(np.asarray(tokens, np.int64))).logits.float().numpy()


def _fair_reference(model: Any) -> tuple[np.ndarray, np.ndarray, float]:
    """Random tokens whose top-k decisions (index scores, router) are all clear, with their logits."""
    for seed in range(20):
        tokens = np.random.default_rng(seed).integers(1, VOCAB, (SEQUENCES, LENGTH)).astype(np.int32)
        logits, gap = with_narrowest_choice(model, tokens)
        if gap > FAIR_GAP:
            return tokens, logits, gap
    raise AssertionError("no tokens without near-ties in 20 tries")


def with_narrowest_choice(model: Any, tokens: np.ndarray) -> tuple[np.ndarray, float]:
    """Logits, and the least distance between a chosen and a rejected score over every top-k that ran."""
    import torch
    from torch.overrides import TorchFunctionMode

    gaps: list[float] = [np.inf]

    class Watch(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            kwargs = kwargs or {}
            if func in (torch.topk, torch.Tensor.topk):
                k = kwargs.get("k", args[1] if len(args) > 1 else None)
                ranked = args[0].sort(dim=-1, descending=True).values
                if k < ranked.shape[-1]:
                    gap = ranked[..., k - 1] - ranked[..., k]
                    # masked scores are -inf or the dtype's minimum: choosing one or another is no decision
                    real = ranked[..., k] > torch.finfo(ranked.dtype).min / 2
                    gaps.extend(gap[real].flatten().tolist())
            return func(*args, **kwargs)

    with Watch():
        return torch_logits(model, tokens), min(gaps)


def on_device(weights: Any) -> Any:
    """Host arrays as JAX arrays."""
    return jax.tree.map(jnp.asarray, weights)


def random_weights(cfg: ModelConfig, seed: int = 0) -> dict[str, Any]:
    """Float32 numpy weights as `Checkpoint.load` returns them, for a config without a checkpoint."""
    rng = np.random.default_rng(seed)

    def array(weight: Any) -> np.ndarray:
        centre, spread = (1.0, 0.1) if weight.name.endswith("_norm") else (0.0, 0.1 if len(weight.shape) == 1 else 0.08)
        return rng.normal(centre, spread, weight.shape).astype(np.float32)

    loaded = {
        place: [{weight.name: array(weight) for weight in group.weights} for group in found]
        for place, found in groups(cfg, mtp=True).items()
    }
    return {"outer": loaded["outer"][0], "layers": loaded["layers"], "mtp": loaded["mtp"]}


@functools.cache
def compiled(cfg: ModelConfig, mode: graph.Mode) -> Any:
    """`graph.step` of one config and mode, compiled once per shape."""
    return jax.jit(lambda w, c, b: graph.step(cfg, w, c, b, mode))


def garbage_caches(
    cfg: ModelConfig, kinds: Sequence[Any], pages: int, page_size: int, dtype: Any = jnp.float32
) -> list[dict[str, Any]]:
    """Caches full of large numbers: a row that is read before it is written ruins the logits."""
    shape = (pages, page_size)
    return [{row.name: jnp.full((*shape, *row.shape), 1e3, dtype) for row in cache_rows(cfg, kind)} for kind in kinds]


@dataclasses.dataclass
class Paged:
    """Feeds token chunks of a batch through `graph.step`, over a pool of shuffled pages.

    Table entries past what a sequence needs point at pages of others, as a reused table may.
    """

    config: ModelConfig
    weights: dict[str, Any]
    batch: int = SEQUENCES
    page_size: int = 8
    context: int = 64
    dtype: Any = jnp.float32
    seed: int = 0

    def __post_init__(self) -> None:
        width = -(-self.context // self.page_size)
        pages = 1 + self.batch * width
        order = np.random.default_rng(self.seed).permutation(np.arange(1, pages)).astype(np.int32)
        self.table = jnp.asarray(order.reshape(self.batch, width))
        self.caches = garbage_caches(self.config, self.config.layers, pages, self.page_size, self.dtype)
        self.start = np.zeros(self.batch, np.int32)

    def feed(self, tokens: np.ndarray, length: Sequence[int], attention: str) -> tuple[np.ndarray, np.ndarray]:
        """tokens [b, t], of which `length` are real -> logits [b, t, vocab], hidden [b, t, d]."""
        real = np.asarray(length, np.int32)
        batch = graph.Batch(jnp.asarray(tokens), jnp.asarray(self.start), jnp.asarray(real), self.table)
        out = compiled(self.config, graph.Mode(attention, "all"))(self.weights, self.caches, batch)  # type: ignore[arg-type]
        self.caches, self.start = out.caches, self.start + real
        return np.asarray(out.logits), np.asarray(out.hidden)


def replay(
    paged: Paged, tokens: np.ndarray, chunks: Sequence[Sequence[int]], width: int, attention: str, padding: int = 7
) -> list[np.ndarray]:
    """Feeds each sequence its chunks in lockstep, `width` tokens wide; logits per sequence [n, vocab].

    `chunks[i]` are the chunk sizes of sequence i (0: it idles that step); padding tokens are `padding`.
    """
    collected: list[list[np.ndarray]] = [[] for _ in chunks]
    for step in range(max(map(len, chunks))):
        length = [sizes[step] if step < len(sizes) else 0 for sizes in chunks]
        fed = np.full((len(chunks), width), padding, np.int32)
        for row, (begin, size) in enumerate(zip(paged.start, length, strict=True)):
            fed[row, :size] = tokens[row, begin : begin + size]
        logits, _ = paged.feed(fed, length, attention)
        for row, size in enumerate(length):
            collected[row].append(logits[row, :size])
    return [np.concatenate(parts) for parts in collected]


def even_chunks(total: int, size: int) -> list[int]:
    """`total` in chunks of `size`, the last one shorter."""
    return [min(size, total - begin) for begin in range(0, total, size)]
