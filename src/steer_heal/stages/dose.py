"""The dose controller decides which completions to write next, which kappa is used, and which completions train."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise, zip_longest

from scipy.optimize import isotonic_regression

from steer_heal.records import Collected, DoseProbe, Scored, Starved, derive_seed
from steer_heal.settings import DoseCfg, FilterCfg
from steer_heal.stages.filter import GATES
from steer_heal.stages.generate import Ask


class DoseController:
    """Requests completions, takes their scores, and repeats until enough are kept. It holds no model.

        while asks := controller.next_asks():
            controller.add(score(write(asks)))
        collected = controller.collected()

    Without a `kappa`, it first probes for the highest one whose completions survive the filter at the target rate.
    Probes that survive train as well, at any dose up to the chosen one. With `probes_only` it stops once kappa is
    known: its texts only choose the dose.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        alphas: Sequence[float],
        *,
        cfg: DoseCfg,
        keep: FilterCfg,
        seed: tuple[int | str, ...],
        kappa: float | None = None,
        probes_only: bool = False,
    ) -> None:
        self.prompts = prompts
        self.alphas = tuple(alphas)
        self.cfg = cfg
        self.keep = keep
        self.seed = seed
        self.kappa = kappa
        self.probes_only = probes_only
        self.scored: list[Scored] = []
        self.probes: list[DoseProbe] = []
        self._probing: list[float] = []
        self._n_asked = 0
        self._n_probings = 0

    def next_asks(self) -> list[Ask]:
        """The next completions to write. Empty once enough are kept or filter.max_attempts is reached."""
        left = self.keep.max_attempts - len(self.scored)
        if self.kappa is None:
            self._probing = self._next_kappas()[: left // self.cfg.n_probes]
            if self._probing:
                return [ask for kappa in self._probing for ask in self._asks(self.cfg.n_probes, kappa)]
            low, _ = bracket(self.probes, self.cfg.target)
            self.kappa = self.cfg.floor if low is None else low
        missing = self.keep.n_keep - len(self._usable())
        if self.probes_only or missing <= 0 or left <= 0:
            return []
        return self._asks(min(max(4, round(missing / self.cfg.target)), left), self.kappa)

    def add(self, rows: Sequence[Scored]) -> None:
        """Takes the completions of the last request, in its order."""
        self.scored.extend(rows)
        n = self.cfg.n_probes
        for i, kappa in enumerate(self._probing):
            part = rows[i * n : (i + 1) * n]
            self.probes.append(DoseProbe(kappa, n=len(part), n_kept=sum(row.kept for row in part)))
        self._probing = []

    def collected(self) -> Collected:
        """All completions and those of them that train, even if they are too few."""
        assert self.kappa is not None, "kappa is known once next_asks has returned an empty list"
        kept = spread(self._usable(), self.keep.n_keep)
        place = {id(row): i for i, row in enumerate(self.scored)}
        return Collected(
            scored=tuple(self.scored),
            train=tuple(place[id(row)] for row in kept),
            kappa=self.kappa,
            probes=tuple(self.probes),
            dose=max((row.completion.dose for row in kept), default=0.0),
        )

    def _usable(self) -> list[Scored]:
        """Kept completions that can train: those up to the highest dose."""
        assert self.kappa is not None
        highest = self.kappa * max(self.alphas)
        return [row for row in self.scored if row.kept and row.completion.dose <= highest * (1 + 1e-9)]

    def _next_kappas(self) -> list[float]:
        """Kappas to probe: first a grid, then values between the last that survived and the first that did not."""
        cfg = self.cfg
        self._n_probings += 1
        if self._n_probings == 1:
            return log_grid(cfg.floor, cfg.ceiling, cfg.n_kappas)
        low, high = bracket(self.probes, cfg.target)
        if self._n_probings > 1 + cfg.n_refinements or high is None or low is None or high / low < 1.05:
            return []
        return log_grid(low, high, cfg.n_kappas // 2 + 2)[1:-1]

    def _asks(self, n: int, kappa: float) -> list[Ask]:
        """The next n requests. Over all requests, probes among them, no pair of prompt and alpha comes again before
        every other one has come."""
        out = []
        for i in range(self._n_asked, self._n_asked + n):
            prompt = i % len(self.prompts)
            cycle = i // math.lcm(len(self.prompts), len(self.alphas))
            alpha = self.alphas[(i + cycle) % len(self.alphas)]
            out.append(Ask(prompt, self.prompts[prompt], derive_seed(*self.seed, i), alpha=alpha, kappa=kappa))
        self._n_asked += n
        return out


def require_enough(found: Collected, keep: FilterCfg, *, own: bool = False) -> None:
    """Raises Starved if fewer than filter.min_train completions were kept. `own`: steered text only chose the dose."""
    if len(found.kept) >= keep.min_train:
        return
    tried = [row for row in found.scored if not (own and row.completion.dose)]
    dropped = Counter(reason for row in tried for reason in row.reasons).most_common()
    counts = ", ".join(f"{name} {n}" for name, n in dropped)
    fixes = [GATES[name].fix(name) for name, _ in dropped if name in GATES]
    at = ""
    if any(row.completion.dose for row in tried):
        at = f" at kappa {found.kappa:.3g}"
        fixes.append("lower --dose.floor" if found.probes else "lower the dose")
    if len(tried) >= keep.max_attempts:
        fixes.append("raise --filter.max-attempts")
    raise Starved(
        f"the filter starved: {len(found.kept)} of {len(tried)} completions kept{at}, filter.min_train is "
        f"{keep.min_train}; dropped by gate, worst first: {counts or 'none'}; "
        f"{', '.join(fixes) or 'lower --filter.min-train'}, or run fewer rounds",
        found,
    )


def log_grid(low: float, high: float, n: int) -> list[float]:
    """n values from low to high, both included, evenly spaced in the logarithm. [low] if high is not above it."""
    if high <= low:
        return [low]
    return [low * (high / low) ** (i / (n - 1)) for i in range(n)]


def bracket(probes: Sequence[DoseProbe], target: float) -> tuple[float | None, float | None]:
    """(highest kappa that survives at the target rate, lowest that does not) by the decreasing fit to all probes. None
    if there is no such kappa."""
    fitted = decreasing_fit(sorted(probes, key=lambda p: p.kappa))
    good = [kappa for kappa, survival in fitted if survival >= target]
    bad = [kappa for kappa, survival in fitted if survival < target]
    return max(good, default=None), min(bad, default=None)


def decreasing_fit(probes: Sequence[DoseProbe]) -> list[tuple[float, float]]:
    """(kappa, survival) of probes in the order of kappa, with a survival that never rises.

    Isotonic regression weighted by the number of completions: neighbours in the wrong order are pooled. So one lucky
    probe at a high dose does not get that dose chosen.
    """
    if not probes:
        return []
    rates = [probe.survival for probe in probes]
    pools = isotonic_regression(rates, weights=[probe.n for probe in probes], increasing=False).blocks
    fitted = []
    for start, end in pairwise(pools):
        pool = probes[start:end]
        # computed again from the counts: a survival that equals the target must do so exactly
        survival = sum(probe.n_kept for probe in pool) / sum(probe.n for probe in pool)
        fitted += [(probe.kappa, survival) for probe in pool]
    return fitted


def spread(rows: Sequence[Scored], n: int) -> list[Scored]:
    """At most n rows, spread over the prompts as evenly as possible. Each prompt gives its highest doses first."""
    by_prompt: dict[int, list[Scored]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: -row.completion.dose):
        by_prompt[row.completion.prompt_index].append(row)
    turns = zip_longest(*(by_prompt[prompt] for prompt in sorted(by_prompt)))
    return [row for turn in turns for row in turn if row is not None][:n]
