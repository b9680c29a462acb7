"""The `glm5` command in this process, and a small checkpoint for it."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

from model.checkpoint import groups
from model.checkpoint_writer import save
from model.hf_config import from_hf
from model.weights import Arrangement, Weight
from runtime.cli.main import main
from runtime.execution.local.load import embedded_checkpoint

# Two layers of GLM-5's architecture, with the embedded checkpoint's vocabulary.
CONFIG: dict[str, Any] = {
    "model_type": "glm_moe_dsa", "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 96,
    "moe_intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2, "max_position_embeddings": 256,
    "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16,
    "index_topk": 16, "index_head_dim": 32, "index_n_heads": 16, "first_k_dense_replace": 1,
    "indexer_types": ["full", "shared"], "num_nextn_predict_layers": 1, "eos_token_id": [993, 1000, 1002],
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
}  # fmt: skip


class Output(NamedTuple):
    """What a command left: its exit code, stdout and stderr."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        assert self.code == 0, self.err
        return json.loads(self.out)


def glm5(*words: object) -> Output:
    """Runs `glm5 words..`; what is not an expected failure is raised.

    No search is so long that it says what it is doing: whether it would depends on the machine.
    """
    out, err = io.StringIO(), io.StringIO()
    patient = mock.patch("runtime.cli.searches.QUIET_SECONDS", math.inf)
    with patient, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main([str(word) for word in words])
        except SystemExit as end:
            code = end.code
    return Output(code if isinstance(code, int) else 0 if code is None else 1, out.getvalue(), err.getvalue())


def refused(*words: object) -> str:
    """The one line that `glm5 words..` prints on stderr before it exits with 2."""
    code, out, err = glm5(*words)
    assert (code, out) == (2, ""), (code, out, err)
    assert err.startswith("glm5: ") and err.endswith("\n") and err.count("\n") == 1, err
    return err.removeprefix("glm5: ").rstrip("\n")


def make_checkpoint(folder: Path, **changed: Any) -> None:
    """A random checkpoint of `CONFIG` with keys changed, in float32 and two shards or more, with the embedded
    tokenizer and template."""
    config, rng = {**CONFIG, **changed}, np.random.default_rng(0)

    def make(weight: Weight) -> np.ndarray:
        if weight.arrangement is Arrangement.PLAIN and weight.name != "embed":
            centre = 1.0 if "norm" in weight.name else 0.0
            return (centre + 0.1 * rng.standard_normal(weight.shape)).astype(np.float32)
        return (0.1 * rng.standard_normal(weight.shape)).astype(np.float32)

    made = {
        place: [{weight.name: make(weight) for weight in group.weights} for group in found]
        for place, found in groups(from_hf(config), mtp=True).items()
    }
    save(folder, config, {**made, "outer": made["outer"][0]}, shard_bytes=500_000)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(embedded_checkpoint() / name, folder / name)
