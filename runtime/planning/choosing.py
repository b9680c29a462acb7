"""Which chips to take for a load: of each, the fewest whole nodes that meet the targets, with how sure that is.

    1. layouts    those that the memory of a few nodes holds, priced once                      (options.py, estimate.py)
    2. estimates  the fewest nodes that meet the targets in the steady state, by replicas of each
    3. simulation the best one or two of a number of nodes; more nodes where they miss, fewer where they meet

Every chip has the same budget of simulation (`_WORK`), whoever else is asked about, so that its answer is always the
same and six take at most about a minute on two cores; none simulates more than `_COUNTS` x `_EACH` plans. `glm5 plan`
then searches further for one of them: formats of the cache, chunks, and prefill apart from decode.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from foundation.errors import Failure, UsageError, first_line
from hw_profiles import Figure, Profile
from model.formats import KV, scheme
from runtime.deployment.engines import default_kv, engine_for, load, names
from runtime.deployment.errors import NoPlanError
from runtime.deployment.plan import Plan, Predicted
from runtime.planning.contender import Contender, Part, plan_of
from runtime.planning.estimate import Estimate, OptionPrices, score
from runtime.planning.options import Option, Question, Refused, make_option, options
from runtime.planning.predict import predicted, requests_played, simulate_plan
from runtime.planning.search import merit
from runtime.pricing.bands import Band
from runtime.pricing.price import PriceError
from runtime.simulation.apart import role_refused
from runtime.simulation.build import PriceTables, node_devices, require_positions
from runtime.simulation.trust import report_bands

_COUNTS, _EACH = 6, 2
"""Numbers of nodes that are simulated for a chip, and contenders of each."""
_WORK = 250_000
"""Of a chip's simulations, in requests x (4 + ranks that step together), some 60 microseconds each."""
_WORK_EACH = 60_000
"""Of one simulation beyond the first of a number of nodes."""
_LARGEST = 4
"""Nodes of one replica beyond which no layout is tried, unless the model needs more."""


@dataclasses.dataclass(frozen=True)
class ChipChoice:
    """What a chip comes to under an engine. plan: the fewest nodes that meet the targets, or the nearest where none of
    those tried does; None where there is none, and `reason` says why. bands: of "ttft", "tpot" and "throughput". tried:
    other numbers of devices, and what they missed. board_power: most that a device draws, W, where its profile says.
    at_most: no further node was allowed.
    """

    profile: str
    engine: str
    node_devices: int
    plan: Plan | None = None
    bands: dict[str, Band] = dataclasses.field(default_factory=dict)
    reason: str = ""
    board_power: Figure | None = None
    tried: tuple[tuple[int, str], ...] = ()
    at_most: bool = False

    @property
    def figures(self) -> Predicted:
        assert self.plan and self.plan.predicted
        return self.plan.predicted

    @property
    def met(self) -> bool:
        return self.plan is not None and self.figures.meets_targets

    @property
    def devices(self) -> int:
        """Devices of the whole nodes."""
        assert self.plan
        return len(self.plan.devices) + self.plan.idle_devices

    def inside(self, figure: str, value: float) -> list[float]:
        """Where nine in ten of such figures are expected."""
        return self.bands[figure].around(value)

    @property
    def devices_if_slow(self) -> int:
        """Devices where servers are at the slow end of the throughput's band, or at the point if that is above it."""
        nodes = self.devices / self.node_devices
        return math.ceil(round(nodes / min(1.0, math.exp(self.bands["throughput"].low)), 6)) * self.node_devices

    @property
    def met_if_slow(self) -> bool:
        """Whether the targets are met at the slow ends of their bands too."""
        if not self.met:
            return False
        demand = self.plan.demand if self.plan else None
        assert demand
        slow = (
            None if value is None else self.inside(name, value)[1]
            for name, value in (
                ("ttft", self.figures.ttft_ms[demand.statistic]),
                ("tpot", self.figures.tpot_ms[demand.statistic]),
            )
        )
        return demand.over(*slow) == 0


def engine_beside(profile: Profile) -> str:
    """The engine taken for a chip where nobody says: SGLang, or the first that is described beside its vendor's."""
    beside = [name for name in names() if profile.vendor in load(name).hosts]
    return "sglang" if "sglang" in beside or not beside else beside[0]


def choose(
    questions: Sequence[tuple[Question, Profile]],
    most: int,
    progress: Callable[[int, int], None] = lambda done, total: None,
    processes: int | None = None,
) -> list[ChipChoice]:
    """What each chip comes to under its question's engine, in their order. most: devices of each. processes: side by
    side, by default one a core; they import the caller's script anew, which keeps its call under `if __name__ ==
    "__main__":`, or gives 1.

    Raises `UsageError` for a load that nobody can serve, and for formats that there are not, `EngineError` for such an
    engine: what one chip alone cannot do is that chip's `reason`.
    """
    for question, _ in questions:
        load(question.engine)
        if question.scheme is not None:
            scheme(question.scheme)
        if question.kv is not None and question.kv not in KV:
            raise UsageError(f"unknown KV format {question.kv!r}; known: {', '.join(KV)}")
        demand = question.demand
        if demand.rate is None and demand.concurrency is None:
            raise UsageError("which chips depends on the load: give --rate or --concurrency")
        if demand.osl == 1 and demand.tpot_ms is not None:
            raise UsageError("answers of one token have no time per output token: leave out --tpot-ms, or ask for more")
        require_positions(question.cfg, *demand.longest)
    work = [(question, profile, most) for question, profile in questions]
    count = min(processes or os.cpu_count() or 1, len(work))
    found: list[ChipChoice] = []
    for each in _side_by_side(work, count):
        found.append(each)
        progress(len(found), len(work))
    return found


_Asked = tuple[Question, Profile, int]
"""What one chip is asked, and how many devices there are at most."""


def _side_by_side(work: Sequence[_Asked], count: int) -> Iterator[ChipChoice]:
    if count <= 1:
        yield from map(_chosen, work)
        return
    # spawned: JAX, which the tracer brings, does not live through a fork
    with multiprocessing.get_context("spawn").Pool(count, _leave_interrupts) as pool:
        yield from pool.imap(_chosen, work)


def _leave_interrupts() -> None:
    """Ctrl-C is the parent's, which ends its children."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _chosen(work: _Asked) -> ChipChoice:
    question, profile, most = work
    node = node_devices(profile)
    try:
        return _Choosing(question, profile, max(1, most // node)).choice()
    except Failure as error:
        return ChipChoice(profile.name, question.engine, node, reason=first_line(error))


@dataclasses.dataclass(frozen=True)
class _Played:
    plan: Plan
    figures: Predicted
    bands: dict[str, Band]


class _Choosing:
    """One chip. most: nodes. Simulations begin while some of its budget is left."""

    def __init__(self, question: Question, profile: Profile, most: int):
        if question.kv is None:
            question = dataclasses.replace(question, kv=_own_kv(question, profile))
        self.question, self.profile, self.most, self.left = question, profile, most, _WORK
        self.node = node_devices(profile)
        self.coarse, self.full = PriceTables(coarse=True), PriceTables()
        self.played: dict[int, _Played | None] = {}
        self.unplayed = ""

    def choice(self) -> ChipChoice:
        models = self._models()
        least = min((self._least(model) for model in models), default=None)
        assert least is not None
        if least <= self.most:
            self._search(models, least)
        else:
            self._near(models, *self._nearest(models))
        done = {count: found for count, found in self.played.items() if found}
        name, engine = self.profile.name, models[0].option.spec.engine.name
        if not done:
            return ChipChoice(name, engine, self.node, reason=self.unplayed or "no layout could be simulated")
        met = [count for count, found in done.items() if found.figures.meets_targets]
        demand = self.question.demand
        best = min(met) if met else min(done, key=lambda count: (merit(done[count].figures, demand)[0], count))
        chosen = done[best]
        tried = [
            (count * self.node, "; ".join(found.figures.missed(demand)) or "met")
            for count, found in sorted(done.items())
            if count != best
        ]
        plan = dataclasses.replace(chosen.plan, predicted=chosen.figures)
        power = self.profile.get("chip.board_power_w")
        at_most = best == self.most
        return ChipChoice(name, engine, self.node, plan, chosen.bands, "", power, tuple(tried), at_most)

    def _search(self, models: list[OptionPrices], start: int) -> None:
        """Simulates numbers of nodes: up until one meets the targets, then down to the fewest that is tried."""
        below, at = 0, start
        while self._goes_on and self._miss(models, at):
            if at == self.most:
                return
            below, at = at, self._more(models, at)
        while self._goes_on and at - below > 1:
            middle = at - 1 if not below else (at + below) // 2
            if not any(model.option.devices <= middle * self.node for model in models):
                return
            if self._miss(models, middle):
                below = middle
            else:
                at = middle

    def _near(self, models: list[OptionPrices], start: int, miss: float) -> None:
        """Simulates numbers of nodes up until one comes as near to the targets as `miss`, by which estimates do."""
        at = start
        while self._goes_on and self._miss(models, at) > 1.05 * miss + 0.01 and at < self.most:
            at = self._more(models, at)

    def _more(self, models: list[OptionPrices], nodes: int) -> int:
        """Nodes to try next where so many miss the targets."""
        return min(self.most, nodes + max(1, math.ceil(nodes * min(self._miss(models, nodes), 1.0) / 2)))

    @property
    def _goes_on(self) -> bool:
        return len(self.played) < _COUNTS and self.left > 0

    def _miss(self, models: list[OptionPrices], nodes: int) -> float:
        """By how much the best plan on so many nodes misses the targets; played where it has not been."""
        if nodes not in self.played:
            self.played[nodes] = self._play(models, nodes)
        found = self.played[nodes]
        if found is None:
            return 1.0
        return 0.0 if found.figures.meets_targets else max(merit(found.figures, self.question.demand)[0], 0.01)

    # --- layouts

    def _models(self) -> list[OptionPrices]:
        """What fits, priced. Raises `NoPlanError` with the reason where nothing does."""
        refused: list[Refused] = []
        others = left_out = ""
        for nodes in dict.fromkeys((min(_LARGEST, self.most), min(16, self.most), self.most)):
            fitting, refused, rejected = options(self.question, self.profile, nodes * self.node)
            found = []
            for option in filter(self._sensible, fitting):
                why = role_refused(option.spec, "serve")
                try:
                    if why is None:
                        found.append(self._priced(option))
                except (PriceError, UsageError) as error:
                    why = str(error)
                others = others or why or ""
            if found:
                return found
            left_out = next((each.reason for each in rejected), "no layout is left")
        if others or not refused:
            raise NoPlanError(others or left_out)
        closest = min(refused, key=lambda each: each.excess_bytes)
        raise NoPlanError(f"does not fit {self.most * self.node} devices: {first_line(closest.error)}")

    def _sensible(self, option: Option) -> bool:
        """Replicas that nodes are made of, or made of nodes; tensors split within one."""
        size, tp = option.devices, option.layout.tp
        return (size % self.node == 0 or self.node % size == 0) and tp <= self.node

    def _priced(self, option: Option) -> OptionPrices:
        model = OptionPrices(option, self.question.demand, self.coarse)
        model.decode_seconds(1)
        model.prefill_seconds(0)
        return model

    # --- estimates

    def _at(self, model: OptionPrices, nodes: int) -> tuple[int, Estimate] | None:
        """Replicas on so many nodes, and their best steady state under the load."""
        replicas = nodes * self.node // model.option.devices
        if not replicas:
            return None
        points = model.operating_points(replicas)
        return replicas, min(points, key=lambda point: score(point, self.question.demand))

    def _least(self, model: OptionPrices) -> int:
        """The fewest nodes whose estimate meets the targets; more than there are where none does."""

        def meets(nodes: int) -> bool:
            found = self._at(model, nodes)
            return found is not None and not found[1].misses(self.question.demand)

        if not meets(self.most):
            return self.most + 1
        low, high = 0, self.most
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if meets(middle) else (middle, high)
        return high

    def _nearest(self, models: list[OptionPrices]) -> tuple[int, float]:
        """Of doubled numbers of nodes the first that comes about as near to the targets as any, and by how much that
        one misses them."""
        counts = sorted({min(2**i, self.most) for i in range(self.most.bit_length() + 1)})
        missed = {}
        for count in counts:
            if found := [each for model in models if (each := self._at(model, count))]:
                missed[count] = min(estimate.misses(self.question.demand) for _, estimate in found)
        least = min(missed.values())
        return next((count, miss) for count, miss in missed.items() if miss <= 1.05 * least + 0.01)

    # --- simulation

    def _play(self, models: list[OptionPrices], nodes: int) -> _Played | None:
        """The best of the first contenders on so many nodes, simulated; None where none could be."""
        demand = self.question.demand
        held = [(model.option, *each) for model in models if (each := self._at(model, nodes))]
        held.sort(key=lambda each: (round(each[2].misses(demand), 6), score(each[2], demand), each[0].name))
        done: list[_Played] = []
        for option, replicas, estimate in held:
            if len(done) == _EACH:
                break
            work = self._work(option, replicas, estimate)
            if done and (work > min(_WORK_EACH, self.left) or estimate.misses(demand) > 0.3):
                continue
            self.left -= work
            try:
                done.append(self._simulated(option, replicas, estimate, nodes))
            except Failure as error:
                self.unplayed = first_line(error)
                continue
            if done[-1].figures.meets_targets:
                break
        return min(done, key=lambda each: merit(each.figures, demand), default=None)

    def _work(self, option: Option, replicas: int, estimate: Estimate) -> int:
        here = math.ceil(estimate.concurrency / replicas)
        return requests_played(self.question.demand, here) * (4 + option.layout.dp)

    def _simulated(self, option: Option, replicas: int, estimate: Estimate, nodes: int) -> _Played:
        spec, question = option.spec, self.question
        sized = make_option(
            question, self.profile, spec.layout, spec.formats.scheme, spec.formats.kv, {}, replicas=replicas
        ).limited(estimate.running_limit)
        contender = Contender((Part("serve", sized, replicas),), estimate)
        plan = plan_of(contender, question, nodes * self.node)
        report, share, shares = simulate_plan(plan, question.cfg, tables=self.full, profiles=contender.profiles)
        bands = report_bands(share.serving, report, share.serving.deployment.replicas)
        return _Played(plan, predicted(plan, report, share, shares), bands)


def _own_kv(question: Question, profile: Profile) -> str | None:
    """What the engine keeps the cache in on a chip, where the chip has it."""
    from model.split import Layout

    kv = default_kv(engine_for(question.engine, question.cfg, profile, Layout()), question.cfg, profile)
    return kv if kv in profile.formats.kv else None


def row_of(choice: ChipChoice, price: float | None) -> dict[str, Any]:
    """A choice as JSON. price: of a device-hour.

    Ranges are those of the bands: of tokens and cost, that of throughput, at whose slow end more devices are needed
    (`devices_if_slow`). Power is the most that the devices draw, hosts and switches left out.
    """
    row: dict[str, Any] = {"profile": choice.profile, "engine": choice.engine, "meets_targets": choice.met}
    if choice.plan is None:
        return {**row, "reason": choice.reason}
    plan, got, pool = choice.plan, choice.figures, choice.plan.serving
    tokens = got.output_tokens_per_s
    made = choice.inside("throughput", tokens)
    stat = plan.demand.statistic
    cost = None if price is None else price * choice.devices / 3600 * 1e6
    missed = got.missed(plan.demand)
    if missed and choice.at_most:
        missed = [*missed, f"{choice.devices} devices are all that --max-devices allows"]
    board = choice.board_power
    power = None if board is None else board.value * choice.devices
    return {
        **row,
        "reason": "; ".join(missed),
        "meets_targets_if_slow": choice.met_if_slow,
        "devices": choice.devices,
        "devices_if_slow": choice.devices_if_slow,
        "nodes": choice.devices // choice.node_devices,
        "replicas": pool.replicas,
        "layout": dataclasses.asdict(pool.layout),
        "plan": f"{pool.replicas} x {pool.layout.name}",
        "formats": {"weights": pool.formats.scheme.name, "kv": pool.formats.kv},
        "settings": dict(pool.settings),
        "output_tokens_per_s_per_device": tokens / choice.devices,
        "output_tokens_per_s_per_device_range": [value / choice.devices for value in made],
        **{
            key: value
            for name in ("ttft", "tpot")
            if (at := getattr(got, f"{name}_ms")[stat]) is not None
            for key, value in ((f"{name}_ms", at), (f"{name}_ms_range", choice.inside(name, at)))
        },
        "statistic": stat,
        "cost_per_million_output_tokens": None if cost is None else cost / tokens,
        "cost_per_million_output_tokens_range": None if cost is None else [cost / value for value in made[::-1]],
        "power_w": power,
        "power_evidence": board.evidence if board else None,
        "joules_per_output_token": None if power is None else power / tokens,
        "joules_per_output_token_range": None if power is None else [power / value for value in made[::-1]],
        "prefix_hit_rate": got.prefix_hit_rate,
        "evidence": got.evidence,
        "band_basis": {name: band.basis for name, band in choice.bands.items()},
        "assumed": list(got.assumed),
        "tried": [{"devices": devices, "missed": why} for devices, why in choice.tried],
    }
