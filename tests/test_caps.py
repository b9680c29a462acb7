"""Counts from outside: what allocates for each one is refused beyond a most, in one line with both numbers, in little
memory; and what exists, many times over, is taken."""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import hw_profiles
from foundation.errors import Failure
from model.config import ModelConfig
from model.hf_config import from_hf, load_config
from model.split import Layout
from runtime.deployment import engines
from runtime.planning.experts import place_experts
from runtime.planning.search import Chips
from runtime.pricing import load as expert_load
from runtime.serving import Uniform, bench_serving, closed_loop, mooncake_trace, open_loop
from runtime.simulation.build import spec_for, speculation
from runtime.training import config as training

ROOT = Path(__file__).parents[1]
GLM: dict[str, Any] = json.loads((ROOT / "model/configs/glm-5.json").read_text())
EIGHT = Uniform(8)
LITTLE = 1 << 30  # of memory, beside what is there before


def model(**fields: Any) -> ModelConfig:
    return from_hf({**GLM, "indexer_types": None, **fields}, "config.json")


def engine(**settings: Any) -> Any:
    return engines.load("sglang", settings)


def spec(**more: Any) -> Any:
    return spec_for(load_config("glm-5"), hw_profiles.load("h200-sxm"), Layout(tp=8, ep=8), "fp8", **more)


def trace(count: int = 1, **fields: Any) -> Any:
    row = {"timestamp": 0, "input_length": 100, "output_length": 10, **fields}
    Path("trace.jsonl").write_text((json.dumps(row) + "\n") * count)
    return mooncake_trace("trace.jsonl")


def train(old: str, new: str) -> Any:
    Path("train.toml").write_text(training.DEFAULT.read_text().replace(old, new, 1))
    return training.read("train.toml")


REFUSED: list[tuple[Callable[[], Any], str]] = [
    (lambda: model(num_hidden_layers=10**9), "`num_hidden_layers` 1,000,000,000 is more than the 1,000"),
    (lambda: model(num_hidden_layers=1001), "1,001 is more than the 1,000"),
    (lambda: model(n_routed_experts=10**8), "`n_routed_experts` 100,000,000 is more than the 10,000"),
    (lambda: model(n_shared_experts=10**7), "10,000,000 is more than the 10,000"),
    (lambda: model(num_nextn_predict_layers=10**9), "`num_nextn_predict_layers` 1,000,000,000 is more than the 1,000"),
    (lambda: model(vocab_size=10**10), "`vocab_size` 10,000,000,000 is more than the 100,000,000"),
    (lambda: model(max_position_embeddings=10**12), "is more than the 100,000,000"),
    (lambda: model(qk_rope_head_dim=2 * 10**9), "`qk_rope_head_dim` 2,000,000,000 is more than the 1,048,576"),
    (lambda: model(hidden_size=10**30), "`hidden_size` 1e+30 is more than the 1,048,576"),
    (lambda: model(num_experts_per_tok=10**9), "1,000,000,000 is more than the 1,048,576"),
    (lambda: model(rms_norm_eps=5e-324), "`rms_norm_eps` must lie between 1e-12 and 1e+12, not 5e-324"),
    (lambda: model(routed_scaling_factor=1e308), "must lie between 1e-12 and 1e+12, not 1e+308"),
    (lambda: Layout(tp=10**9), "tp x dp x pp = 1,000,000,000 is more than the 100,000"),
    (lambda: Layout(tp=1000, dp=1000), "1,000,000 is more than the 100,000"),
    (lambda: Chips(hw_profiles.load("h200-sxm"), 10**9), "devices: 1,000,000,000 is more than the 100,000"),
    (lambda: spec(drafts=10**9), "drafts a step (--mtp): 1,000,000,000 is more than the 16"),
    (lambda: spec(redundant_slots=10**9), "1,000,000,000 is more than the 10,000"),
    (lambda: spec(replicas=10**9), "devices of all replicas: 8,000,000,000 is more than the 100,000"),
    (lambda: speculation(10**9, 2.0), "drafts a step: 1,000,000,000 is more than the 16"),
    (lambda: engine(graph_batch_sizes=["1:1000000000000:1"]), "holds 10,001 is more than the 10,000"),
    (lambda: engine(graph_batch_sizes=[1, "2:200000:1"]), "is more than the 10,000"),
    (lambda: engine(graph_batch_sizes=[10**40]), "1e+40 is more than the 1e+12"),
    (lambda: engine(max_running_requests=10**40), "must be at most 1e+12"),
    (lambda: closed_loop(4, 10**9, EIGHT, EIGHT), "the number of requests 1,000,000,000 is more than the 1,000,000"),
    (lambda: closed_loop(4, 4, EIGHT, EIGHT, warmup=10**9), "1,000,000,004 is more than the 1,000,000"),
    (lambda: bench_serving(10**9, 8, 8), "concurrency 1,000,000,000 is more than the 1,000,000"),
    (lambda: open_loop(1.0, 10**9, EIGHT, EIGHT), "1,000,000,000 is more than the 1,000,000"),
    (lambda: closed_loop(4, 4, Uniform(10**12), EIGHT), "a uniform length 1,000,000,000,000 is more than"),
    (lambda: trace(input_length=10**12), "input_length 1,000,000,000,000 is more than the 100,000,000"),
    (lambda: trace(output_length=10**30), "output_length 1e+30 is more than the 100,000,000"),
    (lambda: trace(timestamp=1e300), "timestamp 1e+300 is more than the 1e+14"),
    (lambda: place_experts(np.ones((1, 20_000)), 8), "experts of a load: 20,000 is more than the 10,000"),
    (lambda: place_experts(np.ones((2000, 8)), 8), "layers of a load: 2,000 is more than the 1,000"),
    (lambda: place_experts(np.ones((2, 8)), 10**9, slots=10**9), "devices: 1,000,000,000 is more than the 100,000"),
    (lambda: place_experts(np.full((2, 8), 1e308), 8), "load adds up to more than a number can be"),
    (lambda: train("steps = ", "steps = 1000000000 # "), "at most 100,000,000 `steps`"),
    (lambda: train("length = ", "length = 1000000000 # "), "(`rows` x `length`)"),
    (lambda: train("seed = ", "seed = 99999999999999999999 # "), "`seed` must be below 2^31, not 1e+20"),
    (lambda: train("num_hidden_layers = ", "num_hidden_layers = 1000000000 # "), "is more than the 1,000"),
    (lambda: train("num_hidden_layers = ", f"num_hidden_layers = 1{'0' * 400} # "), "too many digits, more than 100"),
]


def attempt(number: int) -> str:
    """What a case is refused with, where it may take little memory beside what the process had."""
    with open("/proc/self/statm") as file:
        held = int(file.read().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (held + LITTLE, limits[1]))
    try:
        REFUSED[number][0]()
    except Failure as error:
        return str(error)
    except Exception as error:  # `MemoryError` above all
        return f"raised {type(error).__name__}: {error}"
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)
    return "taken"


def test_more_than_is_taken_is_refused_in_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    attempts = "import json; from tests.test_caps import REFUSED, attempt\n"
    attempts += "print(json.dumps([attempt(number) for number in range(len(REFUSED))]))"
    child = subprocess.run(
        [sys.executable, "-c", attempts], env={"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=600
    )
    assert child.returncode == 0, child.stderr
    found = json.loads(child.stdout)
    for message, (_, said) in zip(found, REFUSED, strict=True):
        assert said in message and "\n" not in message and len(message) < 300, (said, message)


def test_what_exists_is_taken_many_times_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    large = model(num_hidden_layers=500, n_routed_experts=4096, vocab_size=1_000_000, max_position_embeddings=10**7)
    assert large.num_layers == 500 and large.max_positions == 10**7
    assert Layout(tp=8, dp=1250, ep=10_000).devices == 10_000
    assert len(closed_loop(1000, 100_000, EIGHT, EIGHT).requests) == 100_000
    assert trace(count=2000, input_length=10_000_000).requests[0].prompt_tokens == 10_000_000
    assert engine(graph_batch_sizes=["1:4096:1", 8192]).graph_batch_sizes[-1] == 8192
    assert expert_load.uniform(4096).imbalance(8) == pytest.approx(1.0)
    assert place_experts(np.ones((4, 512)), 64).slot_expert.shape == (4, 512)


@pytest.mark.parametrize("count", ["99999999999999999999", "٣", "²", "1" + "0" * 5000])
def test_a_number_of_chips_that_is_none(count: str) -> None:
    from tests.cli.cli import glm5

    result = glm5("plan", "--model", "glm-5", "--profile", f"h200-sxm:{count}")
    assert result.code == 2 and len(result.err.splitlines()) == 1 and "no profile named" in result.err
