"""The dose controller: what to write next, which kappa survives the filter, and what trains."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence

from steer_heal.records import Collected, DoseProbe, Scored, Starved, derive_seed
from steer_heal.settings import DoseCfg, FilterCfg
from steer_heal.stages.generate import Ask


class DoseController:
    """Says what to write, takes the scored result, and repeats until enough is kept. It holds no model.

        while asks := controller.next_asks():
            controller.add(score(write(asks)))
        collected = controller.collected()

    Without a `kappa` it first looks for the highest one whose completions survive at the target rate. Survivors of the
    probes are kept as well: any dose up to the chosen one trains, unless cfg.train_on is highest. With `n_keep` 0 it
    writes no more than the probes.
    """

    def __init__(
        self,
        prompts: Sequence[str],
        alphas: Sequence[float],
        cfg: DoseCfg,
        keep: FilterCfg,
        seed: tuple[int | str, ...],
        kappa: float | None = None,
        n_keep: int | None = None,
    ) -> None:
        self.prompts, self.cfg, self.keep, self.seed, self.kappa = prompts, cfg, keep, seed, kappa
        self.n_keep = keep.n_keep if n_keep is None else n_keep
        self.alphas = tuple(alphas) if cfg.train_on == "all" else (max(alphas),)
        self.scored: list[Scored] = []
        self.probes: list[DoseProbe] = []
        self._probing: list[float] = []
        self._n_asked = self._n_probings = 0

    def next_asks(self) -> list[Ask]:
        """The next completions to write; none: enough is kept, or filter.max_attempts is reached."""
        left = self.keep.max_attempts - len(self.scored)
        if self.kappa is None:
            self._probing = self._next_kappas()[: left // self.cfg.n_probes]
            if self._probing:
                return [ask for kappa in self._probing for ask in self._asks(self.cfg.n_probes, kappa)]
            low, _ = bracket(self.probes, self.cfg.target)
            self.kappa = self.cfg.floor if low is None else low
        missing = self.n_keep - len(usable(self.scored, self.kappa * max(self.alphas), self.cfg))
        if missing <= 0 or left <= 0:
            return []
        return self._asks(min(max(4, round(missing / self.cfg.target)), left), self.kappa)

    def add(self, rows: Sequence[Scored]) -> None:
        """Takes what was written for the last request, in its order."""
        self.scored.extend(rows)
        n = self.cfg.n_probes
        for i, kappa in enumerate(self._probing):
            part = rows[i * n : (i + 1) * n]
            self.probes.append(DoseProbe(kappa, len(part), sum(row.kept for row in part)))
        self._probing = []

    def collected(self) -> Collected:
        """What trains of all that was written, be it too little."""
        assert self.kappa is not None
        kept = spread(usable(self.scored, self.kappa * max(self.alphas), self.cfg), self.n_keep)
        place = {id(row): i for i, row in enumerate(self.scored)}
        return Collected(
            scored=tuple(self.scored),
            train=tuple(place[id(row)] for row in kept),
            kappa=self.kappa,
            probes=tuple(self.probes),
            dose=max((row.completion.dose for row in kept), default=0.0),
        )

    def _next_kappas(self) -> list[float]:
        """Kappas to probe: a grid, then refinements between the last that survived and the first that did not."""
        cfg = self.cfg
        self._n_probings += 1
        if self._n_probings == 1:
            return log_grid(cfg.floor, cfg.ceiling, cfg.n_kappas)
        low, high = bracket(self.probes, cfg.target)
        if self._n_probings > 1 + cfg.n_refinements or high is None or low is None or high / low < 1.05:
            return []
        return log_grid(low, high, cfg.n_kappas // 2 + 2)[1:-1]

    def _asks(self, n: int, kappa: float) -> list[Ask]:
        """Prompts and alphas evenly: every pair of them before any comes again, over probes and collection together."""
        out = []
        for _ in range(n):
            i, self._n_asked = self._n_asked, self._n_asked + 1
            prompt = i % len(self.prompts)
            cycle = i // math.lcm(len(self.prompts), len(self.alphas))
            alpha = self.alphas[(i + cycle) % len(self.alphas)]
            out.append(Ask(prompt, self.prompts[prompt], alpha, kappa, derive_seed(*self.seed, i)))
        return out


def require_enough(found: Collected, keep: FilterCfg) -> None:
    """Starved where fewer completions were kept than filter.min_train."""
    if len(found.kept) >= keep.min_train:
        return
    reasons = Counter(reason for row in found.scored for reason in row.reasons)
    steered = any(row.completion.dose for row in found.scored)
    lower = "lower --dose.floor, " if found.probes else "lower the dose, " if steered else ""
    raise Starved(
        f"the filter starved: {len(found.kept)} of {len(found.scored)} completions kept at kappa {found.kappa:.3g}, "
        f"filter.min_train is {keep.min_train} (dropped for {dict(reasons)}); {lower}raise --filter.ppl-max "
        "or --filter.max-attempts, or end at an earlier round",
        found,
    )


def usable(scored: Sequence[Scored], highest: float, cfg: DoseCfg) -> list[Scored]:
    """Survivors at the highest dose or, where lower ones train as well, up to it."""
    lowest = -math.inf if cfg.train_on == "all" else highest * (1 - 1e-9)
    return [row for row in scored if row.kept and lowest <= row.completion.dose <= highest * (1 + 1e-9)]


def log_grid(low: float, high: float, n: int) -> list[float]:
    """n values from low to high, both included, evenly spaced in the logarithm."""
    return [low * (high / low) ** (i / (n - 1)) for i in range(n)] if high > low else [low]


def bracket(probes: Sequence[DoseProbe], target: float) -> tuple[float | None, float | None]:
    """(highest kappa that survives, lowest that does not) under the decreasing fit to all probes."""
    fitted = decreasing_fit(sorted(probes, key=lambda p: p.kappa))
    good = [kappa for kappa, survival in fitted if survival >= target]
    bad = [kappa for kappa, survival in fitted if survival < target]
    return (max(good) if good else None), (min(bad) if bad else None)


def decreasing_fit(probes: Sequence[DoseProbe]) -> list[tuple[float, float]]:
    """(kappa, survival) with survival never rising in kappa: neighbours that break the order are pooled.

    Pool-adjacent-violators, weighted by probes, so that one lucky probe at a high dose does not pick it.
    """
    blocks: list[tuple[list[float], int, int]] = []
    for probe in probes:
        kappas, n_kept, n = [probe.kappa], probe.n_kept, probe.n
        while blocks and n_kept / n > blocks[-1][1] / blocks[-1][2]:
            before, kept_before, n_before = blocks.pop()
            kappas, n_kept, n = before + kappas, kept_before + n_kept, n_before + n
        blocks.append((kappas, n_kept, n))
    return [(kappa, n_kept / n) for kappas, n_kept, n in blocks for kappa in kappas]


def spread(rows: Sequence[Scored], n: int) -> list[Scored]:
    """At most n rows, as evenly over prompts as they allow, the highest dose of each prompt first."""
    by_prompt: dict[int, list[Scored]] = defaultdict(list)
    for row in sorted(rows, key=lambda row: -row.completion.dose):
        by_prompt[row.completion.prompt_index].append(row)
    out: list[Scored] = []
    depth = 0
    while len(out) < min(n, len(rows)):
        layer = [by_prompt[p][depth] for p in sorted(by_prompt) if depth < len(by_prompt[p])]
        out.extend(layer[: n - len(out)])
        depth += 1
    return out
