"""The lines of docs/training.md that fine-tune a checkpoint, run as they stand."""

from __future__ import annotations

import re
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from model.module import IndexerParam, Model, RouterBias
from runtime.training.params import named

ROOT = Path(__file__).parents[2]


def documented() -> str:
    """The Python of the section on the module."""
    section = (ROOT / "docs" / "training.md").read_text(encoding="utf-8").split("## The Flax module\n")[1]
    return section.split("```python\n")[1].split("```")[0]


@pytest.mark.slow
def test_the_documented_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    lines = documented()
    (given,) = re.findall(r'^DIR = "(.*)"$', lines, re.M)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runtime").symlink_to(ROOT / "runtime")
    plain = jax.jit  # what follows runs for milliseconds: it is compiled without LLVM's optimisation
    monkeypatch.setattr(jax, "jit", lambda fn, **given: plain(fn, **given))
    # optax raises floats to counts, which the strict JAX of the tests refuses
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        exec(compile(lines, "docs/training.md", "exec"), {})
    losses = [float(line) for line in capsys.readouterr().out.split()]
    assert len(losses) == 20 and losses[-1] < 0.1 < 0.5 < losses[0]
    before, after = named(Model.load(ROOT / given)), named(Model.load("tuned"))
    moved = {name for name in before if not np.array_equal(before[name], after[name])}
    kept = nnx.Any(IndexerParam, RouterBias, nnx.PathContains("mtp"))
    assert moved == before.keys() - named(Model.load("tuned"), kept).keys()
