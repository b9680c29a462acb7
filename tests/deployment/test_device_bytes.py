"""Bytes as emulated devices hold them are the memory ledger's, for every format and any layout (see `counted`)."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from backends.spmd.cluster import Cluster
from foundation.errors import UsageError
from model.config import ModelConfig
from model.formats import CacheFormats
from model.hf_config import from_hf
from model.split import Layout
from runtime.deployment.ledger import stage_kv_bytes_by_cache, stage_weight_bytes
from tests.deployment.counted import (
    DENSE_AND_EXPERTS,
    INDEXERS,
    ODD,
    QUIET,
    Leaf,
    cluster_of,
    count_leaves,
    formats,
    leaves_of,
    merged,
    mtp_leaves_of,
    placed,
    raw,
    server_of,
    token_bytes,
    weights_of,
)
from tests.engine.conftest import CONFIGS, random_weights
from tests.marks import slow_but

OVER_TP = {
    "q", "q_b", "k_up", "v_up", "o", "k", "v", "q_bias", "k_bias", "v_bias", "gate_up", "down", "shared_gate_up",
    "shared_down", "embed", "head",
}  # fmt: skip


def check_shares(cluster: Cluster, stage: int, leaves: list[Leaf], redundant: int) -> None:
    """Who holds what: heads, widths and vocabulary over tp, experts over all devices of a stage, the rest everywhere;
    the ends of the model on its ends, a tied head's embedding on both; indexers where a layer has its own."""
    cfg, layout = cluster.cfg, cluster.grid.layout
    for weight, values, _ in leaves:
        whole, parts = int(np.prod(weight.shape)), layout.tp if weight.name in OVER_TP else 1
        if weight.name.startswith("experts_"):
            parts = layout.tp * layout.dp
            whole += whole // weight.shape[0] * redundant * parts
        assert values.size * parts == whole, weight.name
    span, ends = cluster.grid.stages[stage], {"embed"} if stage == 0 else set()
    if stage == layout.pp - 1:
        ends |= {"final_norm", "embed" if cfg.tie_embeddings else "head"}
    assert set(cluster.weights[stage]["outer"]) == ends
    own_indexer = [layer for layer in span if cfg.indexer and INDEXERS[layer] == "full"]
    assert sum(weight.name == "index_k" for weight, *_ in leaves) == len(own_indexer)


def check_weights(cfg: ModelConfig, weights: dict[str, Any], name: str, layout: Layout, redundant: int) -> None:
    cluster = cluster_of(cfg, weights, name, placed(cfg, layout, redundant))
    for stage in range(layout.pp):
        ledger = stage_weight_bytes(cfg, layout, formats(name), stage, False, redundant)
        leaves = list(leaves_of(cluster, stage))
        assert count_leaves(name, leaves) == merged(ledger), (name, layout.name, stage)
        check_shares(cluster, stage, leaves, redundant)


LAYOUTS = [
    (Layout(tp=8), 0),  # cuts blocks and groups
    (Layout(tp=2, dp=2), 0),  # experts' width over both
    (Layout(tp=2, dp=2, ep=4, pp=2), 1),  # stages of three and two layers
]


# Each scheme in one of the layouts, in turn.
IN_TURN = [(name, *LAYOUTS[at % len(LAYOUTS)]) for at, name in enumerate(DENSE_AND_EXPERTS)]


@pytest.mark.parametrize(
    ("name", "layout", "redundant"),
    slow_but(IN_TURN, [(name, *each) for name in DENSE_AND_EXPERTS for each in LAYOUTS]),
    ids=lambda each: getattr(each, "name", each),
)
def test_held_bytes_are_the_ledgers(name: str, layout: Layout, redundant: int) -> None:
    """Values and scales that lie on a device, copies of experts and of what every device holds included."""
    families = list(CONFIGS)
    turn = list(DENSE_AND_EXPERTS).index(name) + LAYOUTS.index((layout, redundant))
    family = families[turn % len(families)]  # all of them in the slow suite
    check_weights(*weights_of(family), name, layout, redundant)


@pytest.mark.parametrize(
    ("family", "name", "layout"), [("dsa", "w4a8", Layout(tp=2, dp=2, ep=4)), ("mla", "fp8", Layout(tp=2, pp=2))]
)
def test_an_mtp_layers_held_bytes_are_the_ledgers(family: str, name: str, layout: Layout) -> None:
    cfg, weights = weights_of(family)
    cluster = cluster_of(cfg, weights, name, placed(cfg, layout, 0), drafts=1)
    ledger = merged(stage_weight_bytes(cfg, layout, formats(name), layout.pp - 1, True))
    assert sum(count_leaves(name, mtp_leaves_of(cluster)).values()) == ledger["mtp"]


MORE = [
    (Layout(), 0),
    (Layout(dp=4, ep=4, pp=3), 0),
    (Layout(tp=4, pp=5), 0),
    (Layout(tp=4, dp=2, ep=8), 2),
    (Layout(dp=8), 0),
    (Layout(tp=8, ep=8, pp=2), 1),
]


@pytest.mark.slow
@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("name", DENSE_AND_EXPERTS)
def test_held_bytes_of_every_family_and_layout(name: str, family: str) -> None:
    for layout, redundant in (*LAYOUTS, *MORE):
        check_weights(*weights_of(family), name, layout, redundant)


def check_random(data: st.DataObject) -> None:
    eights = st.integers(1, 24).map(lambda n: 8 * n)
    tp, dp = data.draw(st.sampled_from([(1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (2, 4), (1, 4)]), "tp, dp")
    split, family = data.draw(st.booleans(), "by expert"), data.draw(st.sampled_from(sorted(CONFIGS)), "family")
    layout = Layout(tp, dp, tp * dp if split else 1, data.draw(st.integers(1, 2), "pp"))
    names = ("hidden_size", "intermediate_size", "moe_intermediate_size", "q_lora_rank", "kv_lora_rank")
    sizes = {**ODD, "num_hidden_layers": 2, "v_head_dim": data.draw(st.sampled_from([8, 24, 32]), "v")}
    cfg = from_hf(raw(family, **{**sizes, **{name: data.draw(eights, name) for name in names}}))
    name = data.draw(st.sampled_from(sorted(DENSE_AND_EXPERTS)), "scheme")
    redundant = data.draw(st.integers(0, 2), "redundant") if layout.by_expert else 0
    try:
        check_weights(cfg, random_weights(cfg), name, layout, redundant)
    except UsageError:  # a width that does not divide into the format's groups
        assume(False)


@settings(max_examples=10, **QUIET)
@given(data=st.data())
def test_held_bytes_of_random_shapes(data: st.DataObject) -> None:
    check_random(data)


@pytest.mark.slow
@settings(**QUIET)
@given(data=st.data())
def test_held_bytes_of_many_random_shapes(data: st.DataObject) -> None:
    check_random(data)


@pytest.mark.slow
def test_host_devices_hold_the_ledgers_bytes() -> None:
    """XLA host devices, one a device of the layout: what each of them has, by itself."""
    words = [sys.executable, "-c", "from tests.deployment.test_device_bytes import check_hosts; check_hosts()"]
    environment = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=16"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr


def check_hosts() -> None:
    for family, name in (("dsa", "fp8"), ("mla", "w4a8"), ("gqa", "nvfp4")):
        cfg, weights = weights_of(family)
        for layout, redundant in ((Layout(tp=2, dp=2, ep=4, pp=3), 1), (Layout(tp=4, dp=2, pp=2), 0)):
            cluster = cluster_of(cfg, weights, name, placed(cfg, layout, redundant), mapped=False)
            server = server_of(cluster)
            for stage in range(layout.pp):
                ledger = merged(stage_weight_bytes(cfg, layout, formats(name), stage, False, redundant))
                rows = stage_kv_bytes_by_cache(cfg, layout, CacheFormats(), stage, False)
                for device in cluster.stages[stage].mesh.devices.flat:  # type: ignore[attr-defined]

                    def part(array: Any, device: Any = device) -> np.ndarray:
                        (found,) = [s.data for s in array.addressable_shards if s.device == device]
                        return np.asarray(found)

                    assert count_leaves(name, leaves_of(cluster, stage, part)) == ledger
                    assert token_bytes(server, stage, part) == rows
