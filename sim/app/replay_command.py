"""The command `paceline replay`: a journal or a log again under other settings, paired request by request."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from typing import Any

from governor.journal.journal import Journal
from governor.model.env_files import policy_of
from governor.model.errors import BadInput, BadSetting
from governor.model.files import write_atomically
from governor.model.policy import Policy
from sim.app.options import ReplayOptions
from sim.app.outputs import check_file
from sim.calibration.calibrate import calibrate, read_sources
from sim.calibration.observed import of_journal
from sim.model.provider_config import ProviderConfig
from sim.reporting.replay_text import replay_json, replay_text
from sim.scenario.columns import parse_columns
from sim.scenario.readers import is_journal
from sim.scenario.scenario import following
from sim.scenario.scenario_file import named_provider
from sim.validation.counterfactual import Counterfactual, counterfactual
from sim.validation.logged import lesson_of
from sim.validation.replay import Stage, closest
from sim.validation.twin import Lesson, believed, lessons

GIVEN, BELIEVED, _LEARNT = "as given", "as the settings believe", "as learnt from it"


def replayed(path: str, o: ReplayOptions, width: int) -> tuple[dict[str, Any], str]:
    """Return the replay as an object and as text. Raise PacelineError for what a user can mend."""
    check_file(o.pairs, "--pairs", (".csv",))

    def rewrite(policy: Policy) -> Policy:
        return policy_of(o.env_file, assignments=o.assignments or (), base=policy)

    rewrite(Policy())  # before anything is read: a slip in a setting should show at once
    if is_journal(path):
        if o.columns or o.arrivals:
            raise BadSetting("--columns and --arrivals are for logs of other clients: this is a journal", "--columns")
        with Journal.open(path) as journal:
            found = lessons(journal)
        name, stages = staged(path, found, o)
    else:
        name, stages = of_log(path, o)
    result = counterfactual(stages, rewrite, runs=o.replications, provider_from=name)
    if o.pairs is not None:
        _write_pairs(o.pairs, result)
    return replay_json(path, result), replay_text(path, result, width)


def staged(path: str, found: Sequence[Lesson], o: ReplayOptions) -> tuple[str, list[Stage]]:
    """Return each pool with its provider: as named, else the one that explains the run best, believed or learnt."""
    if o.provider is not None or o.tpm is not None:
        base = None if o.provider is None else named_provider(o.provider)
        given = [base or believed(lesson) for lesson in found]
        if o.tpm is not None:
            given = [provider.with_(tpm=o.tpm) for provider in given]
        return GIVEN, [Stage(lesson, provider) for lesson, provider in zip(found, given, strict=True)]
    stages = []
    for lesson in found:
        base = believed(lesson)
        stages.append(closest(lesson, [(BELIEVED, base), (_LEARNT, _learnt(path, base, lesson.pool))]))
    return ", or ".join(dict.fromkeys(name for name, _ in stages)), [stage for _, stage in stages]


def of_log(path: str, o: ReplayOptions) -> tuple[str, list[Stage]]:
    """Return a log of another client, with its arrivals where it has them, under the guardrails' settings."""
    observed = read_sources([path], parse_columns(o.columns) if o.columns else {})
    learnt = calibrate(observed).scenario
    given = None if o.provider is None else named_provider(o.provider)
    if o.tpm is not None:
        given = (given or learnt.provider).with_(tpm=o.tpm)
    policy = learnt.policy if given is None else following(Policy(), given)
    arrivals = o.arrivals or learnt.arrivals
    lesson = lesson_of(observed, policy)
    if arrivals == "trace" and not lesson.workload.has_arrivals:
        raise BadInput("the log has no arrival times: use --arrivals batch", path)
    if given is not None:
        return GIVEN, [Stage(lesson, given, arrivals=arrivals, is_log=True)]
    name, stage = closest(lesson, [(_LEARNT, learnt.provider)], arrivals=arrivals, is_log=True)
    return name, [stage]


def _learnt(path: str, base: ProviderConfig, pool: str) -> ProviderConfig:
    return calibrate(of_journal(path, pool), base=base).scenario.provider


def _write_pairs(path: str, found: Counterfactual) -> None:
    with write_atomically(path) as unfinished, open(unfinished, "w", encoding="utf-8", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["custom_id", "ended_s", "would_end_s", "later_s", "was_lost", "would_be_lost_ratio"])
        for pair in found.pairs:
            times = pair.was_s, pair.would_s, pair.would_s - pair.was_s
            rows.writerow(
                [pair.custom_id, *(f"{time:.3f}" for time in times), int(pair.was_lost), pair.would_lost_ratio]
            )
