"""Which devices and plans are measured, one after another, within some seconds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from .measuring import Measured
from .plan import Plan

# Measuring may take so many seconds, or this share of the run, whichever is more.
LEAST_SECONDS, SHARE = 1.0, 0.02

# Batched training has to win by this much: it is the more intricate of the two.
MARGIN = 1.1

# More clients at once are tried as long as that is faster by this much.
GAIN = 1.05

# Training at once is no more than so many times as fast as one after another: a device
# whose loop is slower by more than this than another's best cannot win.
MOST_GAIN = 10.0

# To measure clients at once takes so many times as long as training them does, for they
# are traced and trained before; and on a card so many seconds besides.
RUNS, OF_A_SIZE = 4, 0.15

# Where there are several devices, the first measurement of each may take this share of
# the seconds; and while one is looked at more closely, others are left that share.
FIRST_SHARE, RESERVE = 0.3, 0.4

# On a card, if much time is left, so many sizes are tried between those that were.
PROBES = 4

Measure = Callable[[str, Plan, float], Measured]


@dataclass
class Search:
    """Tries plans within some seconds.

    Parameters
    ----------
    measure : Callable[[str, Plan, float], Measured]
        Measures a plan on a device within so many seconds, or cuts it off.
    plans : Mapping[str, Sequence[Plan]]
        By device, the smallest plan first.
    updates : int
        How many times a client trains in the whole run.
    estimate : float
        About how many seconds that takes.

    Attributes
    ----------
    found : list of Measured
        All that was tried, or would have taken too long to try.
    spent : float
        Seconds.
    """

    measure: Measure
    plans: Mapping[str, Sequence[Plan]]
    updates: int
    estimate: float = 0.0
    found: list[Measured] = field(default_factory=list)
    spent: float = 0.0

    @property
    def allowed(self) -> float:
        """How many seconds measuring may take, as far as is known."""
        fastest = self._fastest()
        run = self.updates / fastest if fastest else self.estimate
        return max(LEAST_SECONDS, SHARE * run)

    @property
    def left(self) -> float:
        """How many seconds are left."""
        return self.allowed - self.spent

    def best(self) -> tuple[str, Plan]:
        """Measure, and return the fastest device and plan."""
        several = [device for device, plans in self.plans.items() if plans[1:]]
        alone = len(self.plans) == 1
        for number, (device, plans) in enumerate(self.plans.items()):
            share = 1 / (len(self.plans) - number)
            share = FIRST_SHARE if several and not alone else share
            self._try(device, plans[0], 1 - share)
        while several:
            device = several.pop(0)
            others = any(self._may_win(other) for other in several)
            self._grow(device, self.plans[device][1:], RESERVE if others else 0.0)
        chosen = {device: self._best_of(device) for device in self.plans}
        speeds = {device: self._speed(d) for device, d in chosen.items()}
        device = max(speeds, key=lambda one: speeds[one])
        measured = chosen[device]
        return device, self.plans[device][0] if measured is None else measured.plan

    def _grow(self, device: str, plans: Sequence[Plan], reserve: float) -> None:
        """Try more and more clients at once, as long as that is faster.

        On a CPU sizes come one after another, as time grows with them. On a card small
        sizes take as long as large ones: it goes on with the largest for which there
        is time in any case.
        """
        if not self._may_win(device):
            self._pass_over(device, plans[0], "it cannot be the fastest")
            return
        last = self._of(device)[0]
        todo = [*plans]
        while todo:
            left = self.left * (1 - reserve)
            there_is_time = [p for p in todo if self._cost(p, last) <= left]
            if not there_is_time or (device == "cpu" and there_is_time[0] != todo[0]):
                self._pass_over(device, todo[0], "there was no time left")
                return
            plan = there_is_time[0 if device == "cpu" else -1]
            measured = self._try(device, plan, reserve)
            if measured.too_many:
                # What came of halving it is what is tried next.
                fits = measured.fits or Plan()
                todo = [p for p in todo if p.chunk < fits.chunk]
                todo += [fits] if fits.chunk > max(last.plan.chunk, 1) else []
                todo = todo[-1:] if device != "cpu" else todo
                continue
            if measured.updates_per_second is None:
                return
            gain = self._speed(measured) / max(self._speed(last), 1e-9)
            if gain < (GAIN if last.plan.chunk > 1 else 1.0 if device == "cpu" else 0):
                break
            last = measured
            todo = [p for p in todo if p.chunk > plan.chunk]
        for _ in range(PROBES if device != "cpu" else 0):
            self._probe(device, plans, reserve)

    def _probe(self, device: str, plans: Sequence[Plan], reserve: float) -> None:
        """Try what lies between the fastest size and the next ones that were tried."""
        tried = [o for o in self._of(device) if o.seconds and not o.too_many]
        best = max(tried, key=self._speed)
        below = [one for one in tried if one.plan.chunk < best.plan.chunk]
        above = [one for one in tried if one.plan.chunk > best.plan.chunk]
        sides = []
        if below:
            sides.append((max(below, key=lambda one: one.plan.chunk), best))
        if above:
            sides.append((best, min(above, key=lambda one: one.plan.chunk)))
        between = [
            (low, [p for p in plans if low.plan.chunk < p.chunk < high.plan.chunk])
            for low, high in sides
        ]
        low, some = max(between, key=lambda one: len(one[1]), default=(best, []))
        if some:
            plan = some[len(some) // 2]
            if self._cost(plan, low) <= self.left * (1 - reserve) / 2:
                self._try(device, plan, reserve)

    def _cost(self, plan: Plan, last: Measured) -> float:
        """Return how long it takes at most to measure a plan, by what came before."""
        if last.updates_per_second is None:
            return LEAST_SECONDS / 2  # Nothing is known: it may have half of them.
        runs = RUNS if last.plan.chunk > 1 else RUNS / 2  # At once it is faster.
        seconds = runs * plan.chunk / last.updates_per_second
        return seconds + (0.0 if last.device == "cpu" else OF_A_SIZE)

    def _try(self, device: str, plan: Plan, reserve: float) -> Measured:
        left = self.left * (1 - reserve)
        if left <= 0:
            return self._pass_over(device, plan, "there was no time left")
        measured = self.measure(device, plan, left)
        self.spent += measured.seconds
        self.found.append(measured)
        return measured

    def _pass_over(self, device: str, plan: Plan, why: str) -> Measured:
        self.found.append(Measured(device, plan, None, 0.0, f"not tried: {why}"))
        return self.found[-1]

    def _may_win(self, device: str) -> bool:
        """Tell whether a device might yet be the fastest, by its loop."""
        loop = self._of(device)[0]
        if loop.updates_per_second is None:
            return not self._fastest()
        return loop.updates_per_second * MOST_GAIN >= self._fastest()

    def _of(self, device: str) -> list[Measured]:
        return [one for one in self.found if one.device == device]

    def _best_of(self, device: str) -> Measured | None:
        """Return a device's fastest plan; its first, unless another is clearly so."""
        first, *others = self._of(device)
        best = max(others, key=self._speed, default=first)
        clearly = self._speed(best) > MARGIN * self._speed(first)
        chosen = best if clearly else first
        return chosen if chosen.updates_per_second else None

    def _fastest(self) -> float:
        return max(map(self._speed, self.found), default=0.0)

    @staticmethod
    def _speed(measured: Measured | None) -> float:
        return 0.0 if measured is None else measured.updates_per_second or 0.0
