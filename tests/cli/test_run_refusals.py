"""`glm5 run` with what it cannot serve: one line that says what to change, exit code 2, nothing written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from backends import registry
from tests.cli.cli import refused

FIRST = "model-00001-of-00003.safetensors"
NORM = "model.layers.0.input_layernorm.weight"


@pytest.fixture
def broken(small: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint, to be broken."""
    return Path(shutil.copytree(small, tmp_path / "broken"))


def edit_config(folder: Path, **fields: Any) -> None:
    """Sets fields of config.json; None removes one."""
    raw = {**json.loads((folder / "config.json").read_text()), **fields}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in raw.items() if value is not None}))


def edit_tensors(folder: Path, edit: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Rewrites the shard that holds `NORM`, and the index with it."""
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shard = index["weight_map"][NORM]
    tensors = safetensors.numpy.load_file(folder / shard)
    edit(tensors)
    safetensors.numpy.save_file(tensors, folder / shard)
    kept = {name: place for name, place in index["weight_map"].items() if place != shard}
    index["weight_map"] = kept | dict.fromkeys(tensors, shard)
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"model_type": "llama"}, "unknown model_type 'llama'; known: glm_moe_dsa"),
        ({"hidden_size": None}, "missing field `hidden_size`"),
        ({"qk_head_dim": 7}, "`qk_head_dim`=7 contradicts"),
        ({"indexer_types": ["full"]}, "`indexer_types` has 1 entries but `num_hidden_layers` is 2"),
    ],
)
def test_config(broken: Path, fields: dict[str, Any], text: str) -> None:
    edit_config(broken, **fields)
    assert text in refused("run", "--checkpoint", broken)


def test_checkpoint_files(broken: Path, tmp_path: Path) -> None:
    assert "no such checkpoint directory" in refused("run", "--checkpoint", tmp_path / "none")
    content = (broken / FIRST).read_bytes()
    for damaged in (content[: len(content) // 2], content[:4], b"\xff" * len(content)):
        (broken / FIRST).write_bytes(damaged)
        line = refused("run", "--checkpoint", broken)
        assert f"{FIRST}: truncated or corrupt shard" in line
    (broken / FIRST).unlink()
    assert f"{FIRST}: shard is missing" in refused("run", "--checkpoint", broken)
    (broken / "config.json").write_text("{")
    assert "config.json: not valid JSON" in refused("run", "--checkpoint", broken)
    (broken / "config.json").unlink()
    assert "config.json: no such file" in refused("run", "--checkpoint", broken)


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda tensors: tensors.pop(NORM), f"missing tensor {NORM}, shape [64]"),
        (lambda tensors: tensors.update(surplus=np.zeros(3)), "extra tensor surplus"),
        (lambda tensors: tensors.update({NORM: np.zeros(63, np.float32)}), f"{NORM} has shape [63], expected [64]"),
    ],
)
def test_tensors(broken: Path, edit: Callable[[dict[str, np.ndarray]], None], text: str) -> None:
    edit_tensors(broken, edit)
    assert text in refused("run", "--checkpoint", broken)


def test_a_template_that_leaves_the_sandbox(broken: Path) -> None:
    (broken / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    line = refused("run", "--checkpoint", broken, "--chat", "--prompt", "Hi")
    assert "chat_template.jinja: refused by the sandbox" in line
    (broken / "chat_template.jinja").unlink()
    assert "has no chat template" in refused("run", "--checkpoint", broken, "--chat", "--prompt", "Hi")


def ids(count: int) -> str:
    return ",".join(["5"] * count)


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (("--prompt-ids", ids(250), "--max-tokens", 7), "prompt (250 tokens) + max-tokens (7) = 257 exceeds"),
        (("--prompt-ids", ids(40), "--max-tokens", 9, "--pool-tokens", 48), "exceeds the page pool's 48 tokens"),
        (("--prompt-ids", "1,1024"), "token id 1024 is out of range"),
        (("--prompt-ids", "1,-1"), "token id -1 is out of range"),
        (("--prompt-ids", "1,two"), "--prompt-ids takes whole numbers separated by commas, not '1,two'"),
        (("--prompt-ids", ""), "--prompt-ids takes whole numbers"),
        (("--prompt", ""), "the prompt has no tokens"),
        (("--prompt", "Hi", "--prompt-ids", "1"), "give one of --prompt, --prompt-ids and --prompts"),
        (("--prompt-ids", "1", "--chat"), "--chat wraps text"),
        (("--no-thinking",), "--no-thinking needs --chat"),
        (("--max-tokens", 0), "max-tokens must be at least 1"),
        (("--temperature", -1), "temperature must be 0 (greedy) or more"),
        (("--temperature", "nan"), "temperature must be 0 (greedy) or more"),
        (("--top-p", 0), "top-p must be above 0"),
        (("--top-k", -1), "top-k must be 0 (off) or more"),
        (("--seed", -1), "'--seed'"),
        (("--mtp", 17), "'--mtp'"),
        (("--dtype", "float16"), "backend cpu computes in bfloat16, float32, not in float16"),
        (("--backend", "tpu"), "unknown backend 'tpu'; known: cpu, cuda"),
        (("--prompts", "/nonexistent/prompts.txt"), "--prompts /nonexistent/prompts.txt: No such file"),
        (("--nonsense",), "No such option: --nonsense"),
    ],
)
def test_requests(small: Path, words: tuple[object, ...], text: str) -> None:
    assert text in refused("run", "--checkpoint", small, *words)


def test_a_backend_that_cannot_be_used() -> None:
    reason = registry.get("cuda").unavailable()
    if reason is None:
        pytest.skip("an NVIDIA GPU is here")
    line = refused("run", "--backend", "cuda")
    assert line == f"backend cuda cannot be used here: {reason} (see `glm5 backends`)"


def test_files(small: Path, tmp_path: Path) -> None:
    words = ("run", "--checkpoint", small, "--max-tokens", 1)
    for target in (tmp_path / "none" / "logits.npz", tmp_path / "logits.npy"):
        said = refused(*words, "--dump-logits", target)
        assert "--dump-logits takes" in said or f"{target} cannot be written" in said
    assert list(tmp_path.iterdir()) == []
    prompts = tmp_path / "prompts.txt"
    for content, text in ((b"\n \n", "no prompt in it"), (b"\xff\xfe", "not UTF-8 text")):
        prompts.write_bytes(content)
        assert text in refused(*words, "--prompts", prompts)
    prompts.write_text("Hi\n")
    assert "--dump-logits takes one prompt" in refused(
        *words, "--prompts", prompts, "--dump-logits", tmp_path / "logits.npz"
    )
    assert list(tmp_path.iterdir()) == [prompts]


def test_no_mtp_layer(broken: Path) -> None:
    edit_config(broken, num_nextn_predict_layers=0)
    index = json.loads((broken / "model.safetensors.index.json").read_text())
    for shard in set(index["weight_map"].values()):
        tensors = safetensors.numpy.load_file(broken / shard)
        kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("model.layers.2.")}
        safetensors.numpy.save_file(kept, broken / shard)
    index["weight_map"] = {k: v for k, v in index["weight_map"].items() if not k.startswith("model.layers.2.")}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "holds no MTP layer: --mtp needs one" in refused("run", "--checkpoint", broken, "--mtp", 1)
