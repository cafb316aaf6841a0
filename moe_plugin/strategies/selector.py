"""Choosing a strategy: gates first, then the ranking table, everything recorded."""

from __future__ import annotations

from dataclasses import replace

from moe_plugin.config import MoEConfig
from moe_plugin.environment import Environment
from moe_plugin.errors import NoStrategyError, StrategyUnsupportedError
from moe_plugin.modular_kernel import Experts, PrepareAndFinalize, StrategyPart
from moe_plugin.strategies.aliases import ALIASES
from moe_plugin.strategies.gates import pair_verdict
from moe_plugin.strategies.names import AUTO, PHASES, Request, parse_request
from moe_plugin.strategies.ranking import RANKING, UNRANKED, RankedStrategy
from moe_plugin.strategies.registry import experts_classes, monolithic_classes, prepare_finalize_classes
from moe_plugin.strategies.report import Entry, SelectionReport, describe_layer
from moe_plugin.verdict import Gate, Verdict


def strategy_names() -> list[str]:
    """Every registered strategy, ranked ones first."""
    pairs = [f"{p}+{e}" for p in prepare_finalize_classes.all() for e in experts_classes.all()]
    ranked = [row.strategy for row in RANKING if row.strategy in pairs or row.strategy in monolithic_classes.all()]
    return [*ranked, *(name for name in (*pairs, *monolithic_classes.all()) if name not in ranked)]


def parse_strategy(text: str) -> Request:
    """Check a `--moe_strategy` value against the registry. Raises UnknownStrategyError with the nearest match."""
    return parse_request(text, strategy_names())


def phase_config(config: MoEConfig, phase: str) -> MoEConfig:
    """The configuration one phase runs under: decode is what is captured and small, prefill is eager."""
    if phase == "prefill":
        return replace(config, cuda_graph=False)
    return replace(config, max_tokens_per_rank=min(config.max_tokens_per_rank, config.decode_max_tokens))


def explain(config: MoEConfig, strategy: str = AUTO, environment: Environment | None = None) -> SelectionReport:
    """Which strategy would run `config` in `environment` (this machine when None), and why. Never touches a GPU.

    Raises only UnknownStrategyError; a refused or missing choice is in the report.
    """
    environment = environment or Environment.probe()
    request = parse_strategy(strategy)
    if request.is_phased or (request.decode == AUTO and config.cuda_graph):
        phased = {phase: survey(phase_config(config, phase), environment) for phase in PHASES}
        report = _report(request, config, environment, phased, is_phased=True)
        if request.is_phased or _differ(report, config):
            return report
    return _report(request, config, environment, dict.fromkeys(PHASES, survey(config, environment)), is_phased=False)


def _differ(report: SelectionReport, config: MoEConfig) -> bool:
    """Whether a captured decode and an eager prefill want two layers: other classes, or the same in other modes.

    An exchange with room for every token of a prefill has work with that room in a decode, and one with less would
    overflow in a prefill.
    """
    decode, prefill = report.entry("decode"), report.entry("prefill")
    if decode is None or prefill is None:
        return decode is not prefill
    if (decode.strategy, decode.host_syncs) != (prefill.strategy, prefill.host_syncs):
        return True
    has_capacity = "+" in decode.strategy and pair_classes(decode.strategy)[0].has_capacity
    return has_capacity and (config.dispatch_capacity or config.decode_max_tokens) < config.max_tokens_per_rank


def select(config: MoEConfig, strategy: str = AUTO, environment: Environment | None = None) -> SelectionReport:
    """`explain`, insisting on a strategy that runs.

    Raises StrategyUnsupportedError when an explicit choice fails a gate (it never falls back), NoStrategyError when
    `auto` finds none; both carry the report.
    """
    report = explain(config, strategy, environment)
    for phase in PHASES:
        entry = report.entry(phase)
        if entry is None:
            refused = "; ".join(f"{e.strategy}: {e.why()}" for e in report.entries[phase])
            raise NoStrategyError(
                f"no strategy can run this layer ({report.layer}) in {report.environment}. {refused}", report
            )
        if not entry.runs:
            alias = parse_strategy(strategy).aliases.get(phase)
            asked_as = f" (asked for as {alias!r})" if alias else ""
            raise StrategyUnsupportedError(
                f"moe_strategy {entry.strategy!r}{asked_as} cannot run here: {entry.verdict.reason}. "
                f"`moe-plugin explain` shows every strategy; `auto` picks one that runs.",
                report,
            )
    return report


def survey(config: MoEConfig, environment: Environment) -> tuple[Entry, ...]:
    """An Entry for every registered strategy, ranked ones first, in ranking order."""
    ranks = {row.strategy: row for row in RANKING}
    return tuple(_entry(name, ranks.get(name), config, environment) for name in strategy_names())


def _entry(name: str, row: RankedStrategy | None, config: MoEConfig, environment: Environment) -> Entry:
    extra = 0
    monolithic = monolithic_classes.all().get(name)
    parts: tuple[type[StrategyPart], ...]
    if monolithic is not None:
        parts = (monolithic,)
        verdict, memory = _verdict_of(monolithic, config, environment), monolithic.memory(config)
        host_syncs = monolithic.host_syncs(config, environment)
    else:
        prepare_finalize, experts = pair_classes(name)
        parts = (prepare_finalize, experts)
        verdict = pair_verdict(config, prepare_finalize, experts)
        for part in parts:
            verdict += _verdict_of(part, config, environment)
        memory = {f"{part.name}: {k}": size for part in parts for k, size in part.memory(config).items()}
        extra = experts.extra_weight_bytes(config)
        host_syncs = prepare_finalize.host_syncs(config, environment) + experts.host_syncs(config, environment)
    return Entry(
        strategy=name,
        rank=RANKING.index(row) + 1 if row else None,
        reason=row.reason if row else "asked for by name",
        opt_in=row.opt_in if row else UNRANKED,
        verdict=verdict,
        auto_gate=row.auto_gate(config, environment) if row and row.auto_gate else None,
        memory=memory,
        extra_weight_bytes=extra,
        host_syncs=host_syncs,
        details=_details_of(parts, config, environment) if verdict.ok else {},
    )


def _verdict_of(part: type[StrategyPart], config: MoEConfig, environment: Environment) -> Verdict:
    try:
        return part.supports(config, environment).asked_by(part.name)
    except Exception as problem:  # one broken class must not keep the others from being chosen
        return Verdict.of(Gate("supports", False, repr(problem), "an answer instead of an exception")).asked_by(
            part.name
        )


def _details_of(parts: tuple[type[StrategyPart], ...], config: MoEConfig, environment: Environment) -> dict[str, str]:
    details: dict[str, str] = {}
    for part in parts:
        try:
            found = part.details(config, environment)
        except Exception as problem:  # what only informs must not keep a layer from being built
            found = {"details": repr(problem)}
        details |= {f"{part.name}.{topic}": words for topic, words in found.items()}
    return details


def pair_classes(name: str) -> tuple[type[PrepareAndFinalize], type[Experts]]:
    """The PrepareAndFinalize and Experts classes of a pair."""
    prepare_finalize, _, experts = name.partition("+")
    return prepare_finalize_classes.all()[prepare_finalize], experts_classes.all()[experts]


def _report(
    request: Request,
    config: MoEConfig,
    environment: Environment,
    entries: dict[str, tuple[Entry, ...]],
    is_phased: bool,
) -> SelectionReport:
    wanted = {"decode": request.decode, "prefill": request.prefill}
    for phase, alias in request.aliases.items():
        asked = phase_config(config, phase) if is_phased else config
        entries[phase] = tuple(
            _under_alias(entry, alias, asked, environment) if entry.strategy == wanted[phase] else entry
            for entry in entries[phase]
        )
    chosen = {phase: _choose(wanted[phase], entries[phase]) for phase in PHASES}
    return SelectionReport(request.text, describe_layer(config), environment.describe(), chosen, entries, is_phased)


def _under_alias(entry: Entry, alias: str, config: MoEConfig, environment: Environment) -> Entry:
    verdict = ALIASES[alias].verdict(alias, entry.verdict, config, environment)
    return replace(entry, verdict=verdict, details=entry.details if verdict.ok else {})


def _choose(wanted: str, entries: tuple[Entry, ...]) -> str | None:
    if wanted != AUTO:
        return wanted
    return next((entry.strategy for entry in entries if entry.auto_may_pick), None)
