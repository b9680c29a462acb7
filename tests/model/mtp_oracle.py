"""The multi-token-prediction layer in torch, composed here from transformers' own decoder layer.

transformers has no MTP for the DSA families, and its `MtpModel` for the others knows no second draft of
one layer; so this says what a draft is in a dozen lines, independent of our graph.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn

from model.checkpoint_writer import save
from tests.model.oracle import CASES, Oracle, random_weights


def add_mtp_layer(oracle: Oracle, path: Path, seed: int = 5) -> Path:
    """Writes the oracle's checkpoint once more, with one random MTP layer."""
    import dataclasses

    cfg = dataclasses.replace(oracle.config, mtp_layers=1)
    raw = {**oracle.raw_config, "num_nextn_predict_layers": 1, "num_mtp_layers": 1}
    save(path, raw, {**oracle.weights, "mtp": random_weights(cfg, seed)["mtp"]})
    return path


class TorchMtp:
    """One MTP layer read from the checkpoint at `path`, over the torch model of `oracle`."""

    def __init__(self, oracle: Oracle, path: Path):
        prefix = CASES[oracle.name].prefix
        self.main = oracle.torch_model
        package = type(self.main).__module__
        classes = importlib.import_module(package)
        config = type(self.main.config).from_dict({
            **self.main.config.to_dict(),
            # one layer, as an MTP layer is: a mixture of experts with an indexer of its own
            "num_hidden_layers": 1, "first_k_dense_replace": 0,
            "mlp_layer_types": ["sparse"], "indexer_types": ["full"], "layer_types": None,
        })  # fmt: skip
        config._attn_implementation = "eager"
        layer = f"model.layers.{oracle.config.num_layers}."
        stored = {
            name.removeprefix(layer): tensor.float()
            for name, tensor in load_file(path / "model.safetensors").items()
            if name.startswith(layer)
        }
        # The decoder layer is filled through a one-layer model, which knows how experts are stored.
        holder = getattr(classes, f"{prefix}ForCausalLM")(config).eval()
        block = holder.model.layers[0]
        block.load_state_dict(_fused(stored, block.state_dict()), strict=True)
        self.block, self.holder = block, holder
        width, eps = config.hidden_size, config.rms_norm_eps
        norm_class = getattr(classes, f"{prefix}RMSNorm")
        self.enorm, self.hnorm, self.head_norm = (norm_class(width, eps=eps) for _ in range(3))
        self.eh_proj = nn.Linear(2 * width, width, bias=False)
        with torch.no_grad():
            self.enorm.weight.copy_(stored["enorm.weight"])
            self.hnorm.weight.copy_(stored["hnorm.weight"])
            self.head_norm.weight.copy_(stored["shared_head.norm.weight"])
            self.eh_proj.weight.copy_(stored["eh_proj.weight"])

    @torch.no_grad()
    def hidden(self, tokens: np.ndarray) -> torch.Tensor:
        """The main stack's hidden states after its final norm, [b, t, d]."""
        return self.main.model(torch.from_numpy(tokens.astype(np.int64))).last_hidden_state

    @torch.no_grad()
    def rows(self, tokens: np.ndarray, hidden: torch.Tensor) -> torch.Tensor:
        """The decoder layer's input rows: the projection of [norm(embedding of the next token), norm(hidden)]."""
        embedded = self.main.model.embed_tokens(torch.from_numpy(tokens.astype(np.int64)))
        return self.eh_proj(torch.cat([self.enorm(embedded), self.hnorm(hidden)], dim=-1))

    @torch.no_grad()
    def run(self, rows: torch.Tensor) -> tuple[np.ndarray, torch.Tensor, torch.Tensor]:
        """Rows [b, t, d] through the layer: logits, the raw hidden states, and those after the head norm."""
        t = rows.shape[1]
        positions = torch.arange(t)[None, :]
        mask = torch.full((t, t), torch.finfo(torch.float32).min).triu(1).expand(rows.shape[0], 1, t, t)
        out = self.block(
            rows,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=self.holder.model.rotary_emb(rows, position_ids=positions),
        )
        raw = out[0] if isinstance(out, tuple) else out
        normed = self.head_norm(raw)
        return self.main.lm_head(normed).numpy(), raw, normed


def _fused(stored: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The stored tensors under the names of a transformers module, whose experts are stacked."""
    count = wanted["mlp.experts.down_proj"].shape[0]

    def stack(name: str) -> torch.Tensor:
        return torch.stack([stored[f"mlp.experts.{e}.{name}.weight"] for e in range(count)])

    fused = {name: stored[name] for name in wanted if not name.startswith("mlp.experts.")}
    fused["mlp.experts.gate_up_proj"] = torch.cat([stack("gate_proj"), stack("up_proj")], dim=1)
    fused["mlp.experts.down_proj"] = stack("down_proj")
    return fused
