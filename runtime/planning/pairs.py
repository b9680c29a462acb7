"""Disaggregated plans: one layout prefills, another decodes, on the same chip or on two kinds.

X requests a second pass both. Prefill: a prompt keeps a rank P seconds, so n_p replicas of r_p ranks take
n_p r_p / P at most, and at a share rho of that a prompt waits about rho / (1 - rho) P / 2. Decode: b requests a
rank take D(b) a step, undisturbed by prompts. In between the cache moves.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from functools import cached_property

from foundation.errors import UsageError
from model.formats import CacheFormats
from runtime.deployment.plan import Transfer
from runtime.planning.contender import Contender, Part
from runtime.planning.estimate import Estimate, OptionPrices, limits, score
from runtime.planning.options import Question, nodes_refused
from runtime.simulation.apart import joint_refused
from runtime.simulation.transfer import transfer_of

RATIOS = tuple((a, b) for a in range(1, 8) for b in range(1, 8) if math.gcd(a, b) == 1 and a + b <= 8)
"""Prefill to decode replicas."""
_BUSIEST = 0.9
"""Share of the prefill pool's capacity beyond which its queue is taken to grow without end."""


@dataclasses.dataclass(frozen=True, eq=False)
class Pair:
    """n_p replicas of `prefill` feed n_d of `decode`."""

    prefill: OptionPrices
    decode: OptionPrices
    replicas: tuple[int, int]
    transfer: Transfer

    @property
    def capacity(self) -> float:
        """Prompts a second that the prefill side computes at most."""
        return self.replicas[0] * self.prefill.ranks / self.prefill.prefill_seconds(0)[0]

    @cached_property
    def limit(self) -> int:
        """Requests a decode rank takes up at a time, so that a token takes no longer than its target; 0: all it
        holds."""
        model, target = self.decode, self.decode.demand.tpot_ms
        if target is None or model.decode_seconds(model.holds) / model.accepted <= target / 1e3:
            return 0
        fitting = [n for n in limits(model.holds) if model.decode_seconds(n) / model.accepted <= target / 1e3]
        return max(fitting, default=1)

    def steady(self, decoding: float) -> Estimate:
        """With `decoding` requests a decode rank, or as many as the prefill side can feed."""
        model, places = self.decode, self.replicas[1] * self.decode.ranks
        decoding = max(min(decoding, float(model.holds)), 1.0 / places)
        tpot = model.decode_seconds(max(1, math.ceil(decoding))) / model.accepted
        rate = places * decoding / (model.output * tpot)
        if rate > _BUSIEST * self.capacity:
            rate = _BUSIEST * self.capacity
            fed = max(1, math.ceil(rate * model.output * tpot / places))
            tpot = model.decode_seconds(fed) / model.accepted
        share = rate / self.capacity
        first = self.prefill.prefill_seconds(0)[0]
        moved = self.transfer.seconds * model.prompt / model.demand.longest[0]
        wait = share / (1 - share) / 2 * first
        ttft = self.prefill.front_seconds + first + wait + moved + model.decode_seconds(1) / 2
        flying = rate * (ttft + model.output * tpot)
        return Estimate(max(1, round(flying)), rate, rate * model.output, ttft, tpot)

    def operating_points(self) -> list[Estimate]:
        """As `OptionPrices.operating_points`."""
        demand, most = self.decode.demand, float(self.limit or self.decode.holds)
        if demand.rate is None and demand.concurrency is None and demand.objective == "throughput":
            return [self.steady(float(b)) for b in sorted({*(2**i for i in range(13) if 2**i < most), int(most)})]
        if demand.rate is not None:
            wanted, at = demand.rate, lambda e: e.requests_per_s
        else:
            wanted = float(demand.concurrency or 1)
            at = lambda e: e.requests_per_s * (e.ttft_seconds + self.decode.output * e.tpot_seconds)  # noqa: E731
        low, high = 1.0 / (self.replicas[1] * self.decode.ranks), most
        full = self.steady(high)
        if at(full) < wanted:
            if demand.rate is not None:
                return [full]
            waiting = wanted / full.requests_per_s - at(full) / full.requests_per_s
            return [dataclasses.replace(full, concurrency=int(wanted), ttft_seconds=full.ttft_seconds + waiting)]
        for _ in range(20):
            middle = math.sqrt(low * high)
            low, high = (middle, high) if at(self.steady(middle)) < wanted else (low, middle)
        found = self.steady(high)
        if demand.rate is not None:
            return [dataclasses.replace(found, requests_per_s=wanted, output_tokens_per_s=wanted * self.decode.output)]
        return [dataclasses.replace(found, concurrency=int(wanted))]


def matched(
    prefills: list[OptionPrices],
    decodes: list[OptionPrices],
    most: int,
    devices: int | None = None,
) -> list[tuple[OptionPrices, OptionPrices]]:
    """The first `most` decode options of each cache format, each with the first `most` prefill options whose cache the
    engine hands on to it. Both are given best first. devices: of both together, where they share them: what leaves no
    room for the other end is no partner."""
    found: list[tuple[OptionPrices, OptionPrices]] = []
    of_cache: Counter[CacheFormats] = Counter()
    for decode in decodes:
        cache = decode.option.spec.formats.cache
        if of_cache[cache] == most:
            continue
        room = math.inf if devices is None else devices - decode.option.devices
        near = (m for m in prefills if m.option.devices <= room)
        fitting = (m for m in near if joint_refused(m.option.spec, decode.option.spec) is None)
        if partners := list(itertools.islice(fitting, most)):
            of_cache[cache] += 1
            found += [(prefill, decode) for prefill in partners]
    return found


def pairs(
    question: Question, chosen: list[tuple[OptionPrices, OptionPrices]], devices: tuple[int, int] | int
) -> Iterator[Contender]:
    """Contenders of every prefill and decode option chosen and every ratio that fits. devices: of both pools together,
    or of each where they are different chips."""
    for prefill, decode in chosen:
        a, b = prefill.option.devices, decode.option.devices
        if isinstance(devices, tuple):
            splits = [(devices[0] // a, devices[1] // b)]
        else:
            splits = [(x * g, y * g) for x, y in RATIOS if (g := devices // (x * a + y * b))]
        for split in splits:
            if not all(split) or any(map(nodes_refused, (prefill.option, decode.option), split)):
                continue
            sender, taker = (
                dataclasses.replace(model.option.spec, replicas=count)
                for model, count in zip((prefill, decode), split, strict=True)
            )
            try:
                transfer = transfer_of(sender, taker, question.demand.longest[0])
            except UsageError:
                continue
            pair = Pair(prefill, decode, split, transfer)
            points = pair.operating_points()
            best = min(points, key=lambda point: score(point, question.demand))
            limited = decode.option.limited(pair.limit)
            parts = Part("prefill", prefill.option, split[0]), Part("decode", limited, split[1])
            yield Contender(parts, best, tuple(points), transfer)
