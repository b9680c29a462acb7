"""The search: everything that fits, ranked by its steady state, the best few played by the serving simulator.

    1. options     layouts, formats and cache formats that the memory holds           (options.py)
    2. estimates   each priced from the traced op lists, over its loads               (estimate.py)
    3. refinement  prefill chunk of the best; redundant expert slots                  (redundancy.py)
    4. pairs       the best prefill and decode options, disaggregated                 (pairs.py)
    5. simulation  the best few contenders, with full tables                          (predict.py)

Nothing depends on the clock or on chance: the same question gets the same plan.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable
from typing import Any

from foundation.errors import CapacityError, UsageError, first_line
from foundation.limits import within
from hw_profiles import Profile
from model.config import ModelConfig
from model.split import MOST_DEVICES
from runtime.deployment.demand import Demand
from runtime.deployment.errors import NoPlanError
from runtime.deployment.plan import Plan, Predicted, Rejected
from runtime.deployment.pool import PoolRole
from runtime.planning.contender import Contender, Part, alternative, mark_front, plan_of, rank_key
from runtime.planning.estimate import OptionPrices, score
from runtime.planning.experts.packing import Floats
from runtime.planning.kv_tiers import plan_kv
from runtime.planning.options import Option, Question, Refused, make_option, options
from runtime.planning.pairs import matched, pairs
from runtime.planning.predict import predicted, requests_played, simulate_plan
from runtime.planning.redundancy import checked, spend
from runtime.pricing.price import PriceError
from runtime.serving import ServingError
from runtime.serving.steady import GROWTH
from runtime.simulation.apart import role_refused
from runtime.simulation.build import PriceTables, require_positions

REFINED = 6
"""Contenders whose chunk and expert slots are searched."""
PAIRED = 4
"""Decode options of each cache, and prefill options for each of them, that are paired."""
SIMULATED = 3
"""Contenders that the simulator plays."""
SHOWN = 40
"""Estimated alternatives that a plan keeps."""
_WORK, _WORK_EACH = 160_000, 130_000
"""Work of simulations at most, in all and of one contender: requests x (4 + ranks that step together), each some
60 microseconds."""
_HOPELESS = 0.3
"""By how much an estimate may miss the targets for its plan to be played after the first few: more than they err."""
Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Chips:
    """Devices of one kind."""

    profile: Profile
    count: int

    def __post_init__(self) -> None:
        within(f"{self.profile.name}: devices:", self.count, MOST_DEVICES)


def search(
    question: Question,
    chips: list[Chips],
    load: Floats | None = None,
    load_name: str = "measured",
    progress: Progress = lambda _: None,
    played: int = SIMULATED,
) -> Plan:
    """The best plan for a question on these chips (two kinds: prefill on one, decode on the other).

    load: tokens of each expert, [MoE layers, experts]. played: contenders that the simulator plays at most. Raises
    `NoPlanError` with the reasons where nothing fits, `UsageError`, `LoadError` or `ProfileError`.
    """
    demand = question.demand
    require_positions(question.cfg, *demand.longest)
    if demand.osl == 1 and demand.tpot_ms is not None:
        raise UsageError("answers of one token have no time per output token: leave out --tpot-ms, or ask for more")
    matrix = checked(question, load) if load is not None else None
    return _Search(question, chips, matrix, load_name, progress, played).plan()


class _Search:
    def __init__(
        self,
        question: Question,
        chips: list[Chips],
        load: Floats | None,
        load_name: str,
        progress: Progress,
        played: int,
    ):
        self.question, self.chips, self.load, self.load_name, self.progress = question, chips, load, load_name, progress
        self.played = played
        self.coarse, self.full = PriceTables(coarse=True), PriceTables()
        self.rejected: list[Rejected] = []
        self.refused: list[Refused] = []
        self.unpriced: list[Rejected] = []
        self.devices = sum(each.count for each in chips)

    # --- steps

    def plan(self) -> Plan:
        ranked = self.contenders()
        best = self.refined(ranked[:REFINED]) + ranked[REFINED:]
        best.sort(key=self._key)
        chosen, figures, plan, played = self.simulated(best)
        rows = [alternative(each, point, self.question) for each in best for point in each.points]
        rows = [row for row in mark_front(rows) if row.front]
        rows.sort(key=lambda row: (-row.output_tokens_per_s_per_device, row.name, row.concurrency))
        simulated = [self._simulated_row(each, found, each is chosen) for each, found in played]
        return dataclasses.replace(
            plan,
            kv=plan_kv(plan, self.question.cfg, self.full, chosen.profiles),
            predicted=figures,
            alternatives=tuple(mark_front(simulated) + rows[:SHOWN]),
            rejected=tuple(self.rejected),
        )

    def contenders(self) -> list[Contender]:
        """Everything that fits, with its estimate, best first."""
        models = [self._models(each) for each in self.chips]
        firsts, held = models, self.question.prefill_held
        if held:
            firsts = [self._models(each, dataclasses.replace(self.question, held=held)) for each in self.chips]
            if not any(firsts):
                asked = ", ".join(f"{axis} {degree}" for axis, degree in held.items())
                why = self.rejected[-1].reason if self.rejected else "nothing fits"
                raise NoPlanError(f"no prefill pool on {self.devices} devices has {asked}: {why}")
        found: list[Contender] = []
        if len(self.chips) == 1:
            for model in self._for_role(models[0], "serve") if not held else ():
                found.append(self._alone(model, self.devices // model.option.devices))
            found += self._paired(firsts[0], models[0], self.devices)
        else:
            both = self.chips[0].count, self.chips[1].count
            found += self._paired(firsts[0], models[1], both)
            found += self._paired(firsts[1], models[0], (both[1], both[0]))
        if not found:
            raise NoPlanError(self._nothing())
        return sorted(found, key=self._key)

    def refined(self, contenders: list[Contender]) -> list[Contender]:
        """Each with the chunk and expert slots that suit it best."""
        self.progress("prefill chunk, expert slots")
        found = []
        for contender in contenders:
            better = min([contender, *self._variants(contender)], key=self._key)
            if self.load is not None:
                better, lost = spend(self.question, better, self.load, self.load_name, self.coarse)
                self.rejected += lost
            found.append(better)
        return found

    def simulated(
        self, ranked: list[Contender]
    ) -> tuple[Contender, Predicted, Plan, list[tuple[Contender, Predicted]]]:
        """The best of the first few by the simulator; where the number of devices is all that counts, the first that
        meets the targets."""
        played: list[tuple[Contender, Predicted, Plan]] = []
        queue, left = _distinct(ranked), _WORK * self.played / SIMULATED
        affordable = [each for each in queue if self._work(each) <= _WORK_EACH]
        for contender in affordable or [min(queue, key=self._work)]:
            cost = self._work(contender)
            hopeless = len(played) >= SIMULATED and contender.estimate.misses(self.question.demand) > _HOPELESS
            if played and (cost > left or hopeless):
                continue
            left -= cost
            self.progress(f"simulating {contender.name}")
            try:
                found, made = self._play(contender)
                played.append((contender, found, made))
            except (ServingError, CapacityError, PriceError) as error:
                self.rejected.append(Rejected(contender.name, str(error)))
            enough = self.question.demand.objective == "min-devices" and played and played[-1][1].meets_targets
            if enough or len(played) == self.played:
                break
        if not played:
            raise NoPlanError(f"no plan could be simulated: {self.rejected[-1].reason}")
        demand = self.question.demand
        best, figures, plan = min(played, key=lambda each: (*merit(each[1], demand), each[0].name))
        return best, figures, plan, [(each, found) for each, found, _ in played]

    # --- parts of them

    def _models(self, chips: Chips, question: Question | None = None) -> list[OptionPrices]:
        """What fits, priced. question: with other degrees than the search's, for one of its pools."""
        fitting, refused, rejected = options(question or self.question, chips.profile, chips.count)
        self.refused += refused
        rejected += [Rejected(each.name, first_line(each.error)) for each in refused]
        self.rejected += rejected
        self.progress(f"{chips.profile.name}: {len(fitting)} layouts and formats fit, {len(rejected)} do not")
        found = []
        for option in fitting:
            try:
                found.append(self._priced(option))
            except (PriceError, UsageError) as error:
                self.unpriced.append(Rejected(option.name, str(error)))
        self.rejected += self.unpriced
        return found

    def _priced(self, option: Option) -> OptionPrices:
        """An option's prices, steps of either kind tried. Raises `PriceError`, e.g. for a link without a figure."""
        model = OptionPrices(option, self.question.demand, self.coarse)
        model.decode_seconds(1)
        model.prefill_seconds(0)
        return model

    def _alone(self, model: OptionPrices, replicas: int) -> Contender:
        points = model.operating_points(replicas)
        best = min(points, key=lambda point: score(point, self.question.demand))
        option = model.option.limited(best.running_limit)
        return Contender((Part("serve", option, replicas),), best, (best, *model.sweep(replicas)))

    def _paired(
        self, prefills: list[OptionPrices], decodes: list[OptionPrices], devices: tuple[int, int] | int
    ) -> list[Contender]:
        """Pairs of the best on either side: prompts, and tokens, a second and device."""
        demand = self.question.demand
        if demand.osl == 1:  # prefilling is all there is
            return []
        room = (devices, devices) if isinstance(devices, int) else devices
        prompts = sorted(
            (m for m in self._for_role(prefills, "prefill") if m.option.devices <= room[0]),
            key=lambda m: (-m.ranks / m.prefill_seconds(0)[0] / m.option.devices, m.option.name),
        )

        def decoding(m: OptionPrices) -> tuple[float, str]:
            if demand.objective == "latency" or demand.concurrency is not None:
                share = (demand.concurrency or 1) * m.option.devices / self.devices / m.ranks
            else:
                share = float(m.holds)
            b = max(1, min(m.holds, round(share)))
            while b > 1 and demand.tpot_ms is not None and m.decode_seconds(b) / m.accepted > demand.tpot_ms / 1e3:
                b //= 2
            rate = b * m.ranks / (m.decode_seconds(b) / m.accepted) / m.option.devices
            late = demand.tpot_ms is not None and m.decode_seconds(b) / m.accepted > demand.tpot_ms / 1e3
            return (1e9 if late else 0.0) - rate, m.option.name

        able = (m for m in self._for_role(decodes, "decode") if m.option.devices <= room[1])
        together = devices if isinstance(devices, int) else None
        chosen = matched(prompts, sorted(able, key=decoding), PAIRED, together)
        chunked = {id(m): self._for_prompts(m) for m in {id(m): m for m, _ in chosen}.values()}
        return list(pairs(self.question, [(chunked[id(m)], decode) for m, decode in chosen], devices))

    def _for_role(self, models: list[OptionPrices], role: PoolRole) -> list[OptionPrices]:
        """Those that the engine gives this role; why not the others is kept."""
        found = []
        for model in models:
            why = role_refused(model.option.spec, role)
            if why is None:
                found.append(model)
            else:
                self.rejected.append(Rejected(f"{model.option.name}, to {role}", why))
        return found

    def _for_prompts(self, model: OptionPrices) -> OptionPrices:
        """The same layout with the chunk that computes a prompt soonest."""
        tried = [model]
        for settings in self._chunks(model.option, (2, 4, 8)):
            try:
                tried.append(self._priced(self._resized(model.option, settings)))
            except (CapacityError, UsageError):
                continue
        return min(tried, key=lambda m: (m.prefill_seconds(0)[0], m.option.name))

    def _chunks(self, option: Option, factors: tuple[float, ...]) -> list[dict[str, Any]]:
        """Settings of other prefill chunks; none where the user set it."""
        engine = option.spec.engine
        key = "chunked_prefill_tokens" if engine.policy == "prefill-first" else "max_step_tokens"
        if key in self.question.settings:
            return []
        budget = engine.chunked_prefill_tokens or engine.max_step_tokens
        return [{key: int(budget * factor)} for factor in factors if 512 <= budget * factor <= 65536]

    def _variants(self, contender: Contender) -> Iterable[Contender]:
        """The contender with other prefill chunks."""
        if contender.transfer is not None:
            return
        part, demand = contender.parts[0], self.question.demand
        option = part.option
        for settings in self._chunks(option, (0.5, 2, 4)):
            try:
                sized = self._resized(option, settings)
            except (CapacityError, UsageError) as error:
                self.rejected.append(Rejected(f"{option.name}, {settings}", first_line(error)))
                continue
            yield self._alone(OptionPrices(sized, demand, self.coarse), part.replicas)

    def _resized(self, option: Option, settings: dict[str, Any]) -> Option:
        spec, own = option.spec, ("memory_fraction", "max_running_requests")  # found again for the new size
        kept = {k: v for k, v in option.settings.items() if k not in own or k in self.question.settings}
        sized = make_option(
            self.question, spec.profile, spec.layout, spec.formats.scheme, spec.formats.kv, {**kept, **settings},
            replicas=spec.replicas,
        )  # fmt: skip
        if sized.pool_tokens < sum(self.question.demand.longest):
            raise CapacityError(f"its cache of {sized.pool_tokens:,} tokens does not hold one request")
        return sized

    def _play(self, contender: Contender) -> tuple[Predicted, Plan]:
        """Simulates a contender; where it chose its own load and misses a target, at less load."""
        demand = self.question.demand
        free = demand.concurrency is None and demand.rate is None
        figures, plan = self._played(contender)
        for _ in range(3):
            missed, load = merit(figures, demand)[0], contender.estimate.concurrency
            if not (missed and free and load > 1):
                break
            lower = max(1, min(load - 1, int(load / (1 + min(missed, 1.0)))))
            contender = dataclasses.replace(
                contender, estimate=dataclasses.replace(contender.estimate, concurrency=lower)
            )
            figures, plan = self._played(contender)
        return figures, plan

    def _played(self, contender: Contender) -> tuple[Predicted, Plan]:
        plan = plan_of(contender, self.question, self.devices)
        report, share, shares = simulate_plan(plan, self.question.cfg, tables=self.full, profiles=contender.profiles)
        return predicted(plan, report, share, shares), plan

    def _work(self, contender: Contender) -> int:
        """What simulating a contender takes, in units of `_WORK`."""
        parts = math.gcd(*(part.replicas for part in contender.parts))
        here = math.ceil(contender.estimate.concurrency / parts)
        return requests_played(self.question.demand, here) * (
            4 + sum(part.option.layout.dp for part in contender.parts)
        )

    def _simulated_row(self, contender: Contender, found: Predicted, chosen: bool) -> Any:
        row = alternative(contender, contender.estimate, self.question)
        return dataclasses.replace(
            row,
            concurrency=found.concurrency or row.concurrency,
            simulated=True,
            chosen=chosen,
            output_tokens_per_s_per_device=found.output_tokens_per_s_per_device,
            output_tokens_per_s_per_user=found.output_tokens_per_s_per_user,
            ttft_ms=found.ttft_ms["mean"] or 0.0,
            tpot_ms=found.tpot_ms["mean"],
            meets_targets=found.meets_targets,
            evidence=found.evidence,
        )

    def _key(self, contender: Contender) -> tuple[float, float, int, str]:
        return rank_key(contender, self.question)

    def _nothing(self) -> str:
        """Why there is no plan: what came closest, with its ledger."""
        cfg: ModelConfig = self.question.cfg
        where = " and ".join(f"{each.count} x {each.profile.name}" for each in self.chips)
        if self.unpriced:
            return f"{cfg.name} fits {where}, but cannot be priced there: {self.unpriced[0].reason}"
        if len(self.chips) > 1 and self.question.demand.osl == 1:
            return "answers of one token are made by prefilling alone: give one --profile"
        if not self.refused:
            return f"{cfg.name} has no plan on {where}: {self.rejected[-1].reason}"
        closest = min(self.refused, key=lambda each: each.excess_bytes)
        narrower = next((each.reason for each in self.rejected if "narrower than" in each.reason), "")
        hint = f" ({narrower})" if narrower else ""
        lines = closest.error.splitlines()
        return "\n".join([f"{cfg.name} has no plan on {where}{hint}. Closest: {closest.name}: {lines[0]}", *lines[1:]])


def merit(figures: Predicted, demand: Demand) -> tuple[float, float]:
    """As `score`, of simulated figures."""
    missed = demand.over(figures.ttft_ms[demand.statistic], figures.tpot_ms[demand.statistic])
    if demand.rate is not None and figures.saturated_by:
        missed += max(1 - figures.requests_per_s / demand.rate, GROWTH)
    if demand.objective == "latency" or demand.rate is not None:
        return round(missed, 9), figures.e2e_ms["mean"] or 0.0
    return round(missed, 9), -figures.output_tokens_per_s


def _distinct(ranked: list[Contender]) -> list[Contender]:
    """The best of each layout first, then the rest: four versions of one layout would tell little."""
    seen: set[tuple[Any, ...]] = set()
    first, rest = [], []
    for each in ranked:
        shape = tuple((part.option.layout, part.option.spec.formats.kv) for part in each.parts)
        (rest if shape in seen else first).append(each)
        seen.add(shape)
    return first + rest
