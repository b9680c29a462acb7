"""Muon Split against plain Muon and AdamW: loss and largest attention logit after equal steps, over several seeds.

    python -m bench.optimizers [--steps N] [--seeds N] [--config FILE] [--folder DIR]

The model, the text and the rates are those of the embedded checkpoint's config; steps are dense, over short sequences.
All three step matrices by the same root mean square (optax's `consistent_rms`), so a rate means the same to each.
Prints a Markdown table: mean and range over seeds. Loss is the mean of the last fifth of the steps.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import tempfile
from pathlib import Path

from runtime.training import config as configs
from runtime.training import metrics
from runtime.training.config import TrainConfig, TrainingStage
from runtime.training.trainer import train

NAMES = ("muon-split", "muon", "adamw")
MIX = {"recall": 1.0, "arithmetic": 1.0, "copy": 1.0, "sentences": 0.5}


def run(config: TrainConfig, source: Path, folder: Path) -> tuple[float, float]:
    """(loss of the last fifth, largest attention logit of the last fifth) of a run."""
    train(config, folder, source, resume=True)
    last = [record for record in metrics.load(folder) if record["step"] > 0.8 * config.steps]
    return statistics.mean(r["loss"] for r in last), max(r["logit_max"] for r in last)


def spread(values: list[float], digits: int) -> str:
    low, high = min(values), max(values)
    return f"{statistics.mean(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--config", type=Path, default=configs.DEFAULT)
    parser.add_argument("--folder", type=Path, help="keep the runs here, and go on from what is there")
    arguments = parser.parse_args()
    base = configs.read(arguments.config)
    stage = TrainingStage("dense", arguments.steps, rows=16, length=64, mix=MIX)
    print("| optimizer | loss, nats a token | largest attention logit |\n|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as temporary:
        for name in NAMES:
            optimizer = dataclasses.replace(base.optimizer, name=name)
            found = [
                run(
                    dataclasses.replace(base, optimizer=optimizer, stages=(stage,), seed=seed, log_every=10),
                    arguments.config,
                    (arguments.folder or Path(temporary)) / f"{name}-{seed}",
                )
                for seed in range(arguments.seeds)
            ]
            losses, logits = ([each[i] for each in found] for i in (0, 1))
            print(f"| {name} | {spread(losses, 3)} | {spread(logits, 0)} |", flush=True)


if __name__ == "__main__":
    main()
