"""From a run's state to a checkpoint directory that transformers, the engine and everything else here reads."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import tokenizers

from foundation.writing import new_folder
from model.checkpoint_writer import copy_companions
from model.module import Model
from model.tokenizer import ChatTemplate, Tokenizer
from model.weights import parameter_counts
from runtime.training import vocabulary
from runtime.training.config import TrainConfig
from runtime.training.data import Generator

TEMPLATE = Path(__file__).parent / "chat_template.jinja"

CARD = """# {name}

GLM-5's architecture (`glm_moe_dsa`) in miniature, trained from scratch on text made by a seeded generator: recall of
who has what, sums of two numbers below 100, copying, tool calls in GLM-5's chat format, and sentences about a dozen
animals. It knows nothing else: it is a checkpoint to test, measure and show a runtime with, whose answers are right
or wrong, and not a language model to use.

- {parameters:,} parameters in BF16: MLA with a lightning indexer that selects {topk} positions ({layers} layers,
  {shared} of which share the selection of a layer below), {experts} experts of which {chosen} run, a shared expert,
  one MTP layer for drafts.
- A byte-level BPE tokenizer of {vocab} tokens, GLM-5's special tokens among them in GLM-5's order. It is not GLM-5's
  own file, nor are the weights.
- Trained for {steps} steps ({stages}) with {optimizer}.
- Sequences were at most {length} tokens long: nothing was learnt past that.
- It has nothing to think: ask with thinking off. With it on, sums at the start of a chat come out wrong.

`glm5 train --config {config} --out DIR` makes it, `glm5 eval --checkpoint DIR` asks it the held-out questions.
MIT licence.
"""


def make_tokenizer(config: TrainConfig) -> tokenizers.Tokenizer:
    """The tokenizer that a config's vocabulary size gives."""
    template = ChatTemplate(TEMPLATE.read_text(encoding="utf-8"))
    return vocabulary.train(vocabulary.corpus(template), config.model.vocab_size)


def make_generator(config: TrainConfig, made: tokenizers.Tokenizer) -> Generator:
    """The maker of a run's text."""
    template = ChatTemplate(TEMPLATE.read_text(encoding="utf-8"))
    return Generator(Tokenizer(made, tuple(vocabulary.stop_ids(made))), template, config.seed)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def raw_config(config: TrainConfig, made: tokenizers.Tokenizer) -> dict[str, Any]:
    """The checkpoint's config.json."""
    stops = vocabulary.stop_ids(made)
    return {**config.raw_model, "eos_token_id": stops, "pad_token_id": stops[0]}


def write(folder: Path, config: TrainConfig, model: Model, made: tokenizers.Tokenizer, config_name: str) -> None:
    """Writes the checkpoint directory `folder`, in the place of an earlier one. Raises `UsageError` where the disk
    does not take it; the earlier one then stays."""
    stops = vocabulary.stop_ids(made)
    with new_folder(folder, replace=True) as new:
        _save(model, new)
        (new / "tokenizer.json").write_text(made.to_str(pretty=True) + "\n", encoding="utf-8")
        shutil.copyfile(TEMPLATE, new / "chat_template.jinja")
        _write_json(new / "tokenizer_config.json", vocabulary.tokenizer_config(config.model.max_positions))
        _write_json(new / "generation_config.json", {"eos_token_id": stops, "pad_token_id": stops[0]})
        (new / "README.md").write_text(_card(folder.name, config, config_name), encoding="utf-8")


def write_tuned(folder: Path, model: Model, source: Path) -> None:
    """Writes what became of the checkpoint directory `source`, whose tokenizer and settings it keeps, to `folder`, in
    the place of an earlier one. Raises `UsageError` where the disk does not take it; the earlier one then stays."""
    with new_folder(folder, replace=True) as new:
        _save(model, new)
        copy_companions(source, new)


def _save(model: Model, folder: Path) -> None:
    """In a folder that is there; `Model.save` makes its own."""
    model.save(folder / "saved", "bfloat16")
    for file in (folder / "saved").iterdir():
        file.rename(folder / file.name)
    (folder / "saved").rmdir()


def _card(name: str, config: TrainConfig, config_name: str) -> str:
    cfg = config.model
    assert cfg.indexer is not None and cfg.moe is not None
    return CARD.format(
        name=name,
        parameters=sum(parameter_counts(cfg)["total"].values()),
        topk=cfg.indexer.topk,
        layers=cfg.num_layers,
        shared=sum(kind.indexer == "shared" for kind in cfg.layers),
        experts=cfg.moe.experts,
        chosen=cfg.moe.top_k,
        vocab=cfg.vocab_size,
        steps=config.steps,
        optimizer={"muon-split": "Muon Split", "muon": "Muon", "adamw": "AdamW"}[config.optimizer.name],
        stages=", ".join(f"{stage.steps} {stage.attention}" for stage in config.stages),
        length=max(stage.length for stage in config.stages),
        config=config_name,
    )
