"""A part of a plan: equal replicas of one layout on one kind of chip, and what each of their devices holds.

A replica is `layout.devices` `Device`s, in the order replica, stage, dp rank, tp rank. Free of JAX.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import hw_profiles
from hw_profiles import Profile
from model.formats import Formats
from model.split import Layout
from runtime.deployment.kv import Offload
from runtime.deployment.ledger import Ledger

PoolRole = Literal["serve", "prefill", "decode"]


@dataclasses.dataclass(frozen=True)
class Device:
    """One device: where it is, what it holds, and its memory.

    index and node count over the whole plan. ranks: its "tp", "dp" and "ep" rank in its stage (ep: its
    expert group, see `model.split.Layout`). layers: first and one past the last; an MTP layer is on the last
    stage. kv_page_bytes: bytes of one page by cache ("latent", "index", "key", "value"), over the device's layers.
    """

    index: int
    node: int
    replica: int
    stage: int
    ranks: Mapping[str, int]
    layers: tuple[int, int]
    ledger: Ledger
    kv_pages: int
    kv_page_bytes: Mapping[str, float]


@dataclasses.dataclass(frozen=True)
class Experts:
    """Which expert is in which slot, for each MoE layer: slot s is on the device of ep rank s // slots_per_device.

    slot_expert: a row a MoE layer, in the order of the layers. max_over_mean and bound: the busiest device's load
    over the mean device's, mean over layers, and what no placement in these slots can beat; None without a
    measured load.
    """

    slots_per_device: int
    slot_expert: tuple[tuple[int, ...], ...]
    max_over_mean: float | None = None
    worst_max_over_mean: float | None = None
    bound: float | None = None


@dataclasses.dataclass(frozen=True)
class Pool:
    """Equal replicas of one layout on one kind of chip.

    profile: name or path of the chip's profile; profile_settings: figures of it that were set by hand.
    scheme: the name of the weight formats.
    engine: name; settings: its settings, per dp rank, that differ from what it derives itself.
    drafts: tokens of multi-token prediction a step. acceptance: the chance of each that it is accepted, given that
        those before it were; empty where nobody said. acceptance_ranges: what each may be; empty where nobody said.
    page_tokens: tokens a KV page. Each dp rank of a replica holds `kv_pages` pages of its own sequences; its tp
        ranks hold the same latents and index keys.
    experts: None where experts are split by tensor.
    expert_load: what is assumed of how tokens fall on experts; slot_load: measured, the share of each expert slot
        (of each expert where they are split by tensor), busiest devices first, mean over layers; empty where nothing
        was measured.
    offload: memory below the devices' that prompts are kept in.
    """

    role: PoolRole
    profile: str
    profile_settings: Mapping[str, float]
    layout: Layout
    scheme: str
    formats: Formats
    engine: str
    settings: Mapping[str, Any]
    drafts: int
    replicas: int
    page_tokens: int
    devices: tuple[Device, ...]
    experts: Experts | None
    expert_load: str
    slot_load: tuple[float, ...] = ()
    acceptance: tuple[float, ...] = ()
    acceptance_ranges: tuple[tuple[float, float], ...] = ()
    offload: Offload = Offload()

    @property
    def kv_pages(self) -> int:
        """Pages of one rank: the least of its replica's devices."""
        return min(device.kv_pages for device in self.devices)

    @property
    def pool_tokens(self) -> int:
        """Tokens of cache of one rank."""
        return self.kv_pages * self.page_tokens

    @property
    def redundant_slots(self) -> int:
        """Expert slots a device beyond an even share of the experts, in each MoE layer."""
        if self.experts is None:
            return 0
        return self.experts.slots_per_device - len(set(self.experts.slot_expert[0])) // self.layout.ep

    @property
    def name(self) -> str:
        """One line: `2 x tp4 dp1 ep4 pp1 on h200-sxm, fp8, KV bf16`."""
        return f"{self.replicas} x {self.layout.name} on {self.profile}, {self.scheme}, KV {self.formats.kv}"


def profile_of(pool: Pool) -> Profile:
    """The profile that a pool was planned for. Raises `ProfileError`."""
    return hw_profiles.load(pool.profile, dict(pool.profile_settings))
