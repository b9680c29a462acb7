"""Makes a random checkpoint for tests: GLM-5's architecture at a 300,000th of its size, with random weights.

    python tools/make_tiny_checkpoint.py [DIR]      [default: tests/data/random-glm5]

The same bytes every time: weights are uniform, so they come from the generator's bits by exact arithmetic
only. A tokenizer is trained on runtime/training/corpus.txt; the chat template is the one beside it.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import tokenizers

from model.checkpoint import groups
from model.checkpoint_writer import save
from model.config import ModelConfig
from model.hf_config import from_hf
from model.weights import Arrangement, Weight, parameter_counts
from runtime.training import vocabulary
from runtime.training.vocabulary import SPECIAL, VISIBLE, stop_ids

ROOT = Path(__file__).resolve().parent.parent
CORPUS, TEMPLATE = (ROOT / "runtime" / "training" / name for name in ("corpus.txt", "chat_template.jinja"))
DEFAULT = ROOT / "tests" / "data" / "random-glm5"
SEED, VOCAB = 5, 1024

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Matrices keep the size of what they are given, but for these: the residual stays mostly the token's own
# embedding, so that the MTP layer, which is given the token, drafts what the main stack then says; and
# logits have a deviation of a few units.
GAINS = dict.fromkeys(("o", "down", "experts_down", "shared_down"), 0.15) | {"head": 3.0, "embed_hidden": 0.1}
FAN_IN_AXIS = {Arrangement.MATRIX: -2, Arrangement.GATE_UP: -3, Arrangement.HEAD_KEYS: -1, Arrangement.HEAD_VALUES: -2}

CONFIG: dict[str, Any] = {
    "architectures": ["GlmMoeDsaForCausalLM"],
    "model_type": "glm_moe_dsa",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "first_k_dense_replace": 1,
    "head_dim": 16,
    "hidden_act": "silu",
    "hidden_size": 128,
    "index_head_dim": 32,
    "index_n_heads": 16,
    "index_topk": 64,
    "indexer_rope_interleave": True,
    "indexer_types": ["full", "full", "full", "shared", "full", "shared"],
    "initializer_range": 0.02,
    "intermediate_size": 256,
    "kv_lora_rank": 64,
    "max_position_embeddings": 2048,
    "mlp_layer_types": ["dense", *["sparse"] * 5],
    "moe_intermediate_size": 32,
    "moe_layer_freq": 1,
    "n_group": 1,
    "n_routed_experts": 16,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 6,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 64,
    "qk_head_dim": 40,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "rms_norm_eps": 1e-5,
    "rope_interleave": True,
    "rope_parameters": {"rope_theta": 1000000, "rope_type": "default"},
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 1,
    "topk_method": "noaux_tc",
    "use_cache": True,
    "v_head_dim": 32,
    "vocab_size": VOCAB,
}

CARD = """# random-glm5

GLM-5's architecture (`glm_moe_dsa`) with **random weights**: a checkpoint to run, test and measure a
runtime with, small enough to ship. It has learnt nothing; what it writes means nothing.

- MLA with a lightning indexer that selects 64 positions (6 layers, two of which share the selection of
  the layer below), 16 experts of which 4 run, a shared expert, one MTP layer, {parameters:,} parameters in
  BF16, 2048 positions.
- A byte-level BPE tokenizer of {vocab} tokens, GLM-5's special tokens among them in GLM-5's order, trained on
  a few pages of text written for it; GLM-5's chat format. Neither is GLM-5's own file.
- The weights are scaled so that greedy text varies, and the MTP layer leans on the token it is given, so
  that some of its drafts are accepted.

Made by `python tools/make_tiny_checkpoint.py`, which gives the same bytes every time. MIT licence.
"""


def rare_tokens(tokenizer: tokenizers.Tokenizer) -> list[int]:
    """Tokens that plain text does not want: special ones, parts of characters, control characters."""
    first_added = VOCAB - len(SPECIAL) - len(VISIBLE)
    texts = [tokenizer.decode([token]) for token in range(first_added)]
    odd = [i for i, text in enumerate(texts) if "\ufffd" in text or not text.replace("\n", "").isprintable()]
    return odd + list(range(first_added, VOCAB))


def uniform(rng: np.random.Generator, shape: tuple[int, ...], deviation: float) -> np.ndarray:
    """Float32 of mean 0 and this standard deviation."""
    return (rng.random(shape, np.float32) * np.float32(2) - np.float32(1)) * np.float32(deviation * 3**0.5)


def make_weight(rng: np.random.Generator, weight: Weight, rare: list[int]) -> np.ndarray:
    """A weight in the graph's layout, in the checkpoint's precision."""
    if weight.arrangement is Arrangement.PLAIN:
        centre, deviation = (0.0, 1.0) if weight.name == "embed" else (float(weight.name.endswith("norm")), 0.1)
        array = centre + uniform(rng, weight.shape, deviation)
    else:
        fan_in = weight.shape[FAN_IN_AXIS[weight.arrangement]]
        array = uniform(rng, weight.shape, GAINS.get(weight.name, 1.0) * fan_in**-0.5)
    if weight.name == "head":
        array[:, rare] *= np.float32(0.25)
    if weight.name == "embed_hidden":  # [embedding; hidden] -> hidden: pass the embedding on
        array += np.eye(*weight.shape, dtype=np.float32)
    return array.astype(np.float32 if weight.float32 else ml_dtypes.bfloat16)


def make_weights(cfg: ModelConfig, rare: list[int]) -> dict[str, Any]:
    """All weights, as `Checkpoint.load` returns them; `rare` tokens get small logits."""
    rng = np.random.default_rng(SEED)
    made = {
        place: [{weight.name: make_weight(rng, weight, rare) for weight in group.weights} for group in found]
        for place, found in groups(cfg, mtp=True).items()
    }
    return {"outer": made["outer"][0], "layers": made["layers"], "mtp": made["mtp"]}


def write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def make(folder: Path) -> None:
    """Writes the checkpoint into `folder`, which must not exist."""
    tokenizer = vocabulary.train([CORPUS.read_text(encoding="utf-8")], VOCAB, WORDS)
    stops = stop_ids(tokenizer)
    raw = {**CONFIG, "eos_token_id": stops, "pad_token_id": stops[0]}
    cfg = from_hf(raw)
    save(folder, raw, make_weights(cfg, rare_tokens(tokenizer)))
    (folder / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    shutil.copyfile(TEMPLATE, folder / "chat_template.jinja")
    write_json(folder / "tokenizer_config.json", vocabulary.tokenizer_config(cfg.max_positions))
    sampling = {"do_sample": True, "temperature": 1.0, "top_p": 0.95}
    write_json(folder / "generation_config.json", {"eos_token_id": stops, "pad_token_id": stops[0], **sampling})
    counts = parameter_counts(cfg)["total"]
    (folder / "README.md").write_text(CARD.format(parameters=sum(counts.values()), vocab=VOCAB), encoding="utf-8")


def main() -> None:
    """Makes the checkpoint aside, then puts its files into DIR, over older ones."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, default=DEFAULT, metavar="DIR")
    target = parser.parse_args().folder
    with tempfile.TemporaryDirectory() as temporary:
        made = Path(temporary) / "random-glm5"
        make(made)
        shutil.copytree(made, target, copy_function=shutil.copyfile, dirs_exist_ok=True)
    size = sum(file.stat().st_size for file in target.iterdir())
    print(f"{target}: {size:,} bytes")


if __name__ == "__main__":
    main()
