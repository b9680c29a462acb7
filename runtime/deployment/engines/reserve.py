"""What an engine reserves of a device beside weights and pool, by a rule of its kind: what its constructors allocate,
and the peak of the run that it profiles itself with.

vLLM (v1/worker/gpu_worker.py determine_available_memory; 0.28, the others alike): the peak of a dummy step counts in
full, and so does all that was allocated before it:

    workspaces   FlashMLA-sparse: queries of a step, max_step_tokens x heads/tp x 576, and for a cache in FP8 what it is
                 widened to, 5 x context x 576, both in 16 bits (v1/attention/backends/mla/flashmla_sparse.py);
                 selected tokens, max_step_tokens x topk x 4 bytes; 16-bit copies of W_UK and W_UV in each layer
                 (model_executor/layers/attention/mla_attention.py); two rotary tables of the context
    peak         of the layers, or of the sampler's dummy run over max_running_requests x vocabulary; and what the
                 indexer gathers keys in, 40 x context x 132 bytes (v1/attention/backends/mla/indexer.py), beyond the
                 workspace that it shares; and the graphs, where the release profiles them
"""

from __future__ import annotations

from dataclasses import dataclass

from model.config import Mla, ModelConfig
from model.formats import CacheFormats
from model.split import Layout
from runtime.deployment.engines.engine import Engine


@dataclass(frozen=True)
class Reserve:
    """Bytes of a device. workspaces: allocated once. peak: of a step's temporaries, as the engine counts them."""

    workspaces: float
    peak: float


def reserve(
    engine: Engine, cfg: ModelConfig, layout: Layout, cache: CacheFormats, layers: int, layer_peak: float
) -> Reserve:
    """What an engine reserves on a device of a stage of `layers`, where the layers' temporaries take `layer_peak`."""
    if engine.kind != "vllm":
        return Reserve(0.0, layer_peak)
    context = engine.context_tokens or cfg.max_positions
    heads = cfg.heads / layout.tp
    workspaces, shared, gathered = 0.0, 0.0, 0.0
    if isinstance(cfg.attention, Mla):
        mla = cfg.attention
        workspaces += layers * heads * mla.kv_lora_rank * (mla.nope_dim + mla.v_dim) * 2
        workspaces += 2 * context * mla.rope_dim * 2
        if cfg.indexer:
            shared = engine.max_step_tokens * heads * mla.latent_dim * 2
            if cache.latent == "fp8_ds_mla":
                shared += 5 * context * mla.latent_dim * 2
            gathered = 40 * context * (cfg.indexer.head_dim + 4)
            workspaces += shared + engine.max_step_tokens * cfg.indexer.topk * 4
    sampler = engine.sampler_logit_bytes * engine.max_running_requests * cfg.vocab_size
    peak = max(layer_peak, sampler) + max(gathered - shared, 0.0)
    return Reserve(workspaces, peak + (0.0 if engine.graph_mode == "eager" else engine.graph_memory_bytes))
