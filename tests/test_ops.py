"""What stands in ops/: rules and dashboard speak of metrics that there are, and the files hang together."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from governor.model.errors import FailureCode
from governor.model.pools import Pool
from governor.profiles.loader import prices_in_force
from governor.service.api.app import service_of
from governor.service.api.gauges import late_s
from governor.service.config import ServiceConfig
from governor.service.store.store import BatchRow
from governor.telemetry.metrics import Metrics

OPS = Path(__file__).resolve().parent.parent / "ops"
RULES = OPS / "prometheus" / "paceline.rules.yml"
NAME = re.compile(r"\b(?:contestra|paceline)_[a-z0-9_]+")


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


@pytest.fixture(scope="module")
def names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Every name under which a service shows something."""
    config = ServiceConfig(
        pools=[Pool()],
        environment={},
        prices=prices_in_force(),
        database=str(tmp_path_factory.mktemp("ops") / "service.db"),
        today=lambda: date(2026, 1, 1),
    )
    service = service_of(config)
    try:
        metrics: Metrics = service.metrics
        metrics.observer("default")
        text = metrics.text()
    finally:
        service.store.database.closed()
    found = set()
    for family in text_string_to_metric_families(text):
        suffixes = {"counter": ("_total",), "histogram": ("_bucket", "_sum", "_count")}.get(family.type, ("",))
        found |= {family.name + suffix for suffix in suffixes}
    return found


def test_rules_speak_of_metrics_that_there_are(names: set[str]) -> None:
    for rule in rules():
        assert set(NAME.findall(rule["expr"])) <= names, rule["expr"]


def test_the_dashboard_shows_metrics_that_there_are(names: set[str]) -> None:
    board = json.loads((OPS / "grafana" / "dashboards" / "paceline.json").read_text())
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    shown = set()
    for panel in board["panels"]:
        for target in panel["targets"]:
            assert set(re.findall(r"paceline:[a-z0-9_:]+", target["expr"])) <= recorded
            shown |= set(NAME.findall(target["expr"]))
    assert shown <= names
    assert {"contestra_openai_active_concurrency", "contestra_llm_rate_limit_events_total"} <= shown
    ids = [panel["id"] for panel in board["panels"]]
    assert len(set(ids)) == len(ids)


def test_each_guideline_has_an_alert_and_each_alert_a_page() -> None:
    alerts = {rule["alert"]: rule for rule in rules() if "alert" in rule}
    assert {"PacelineThrottled", "PacelineSteadyDeferrals", "PacelineQueuingTooLong", "PacelineBatchLate"} <= set(
        alerts
    )
    assert "20-30 s" in alerts["PacelineThrottled"]["annotations"]["description"]
    headings = {
        text.removeprefix("## ").lower()
        for text in (OPS / "RUNBOOK.md").read_text().splitlines()
        if text.startswith("## ")
    }
    for alert in alerts.values():
        page, _, anchor = alert["annotations"]["runbook_url"].partition("#")
        assert (OPS / page).is_file()
        assert anchor in headings, anchor


def test_the_compose_file_hangs_together() -> None:
    compose = yaml.safe_load((OPS / "compose.yml").read_text())
    services = compose["services"]
    assert set(services) == {"paceline", "postgres", "redis", "prometheus", "grafana"}
    for service in services.values():
        for other in service.get("depends_on", {}):
            assert "healthcheck" in services[other]
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (OPS / source).exists() if source.startswith(".") else source in compose["volumes"]
    assert (OPS / services["paceline"]["build"]["dockerfile"].removeprefix("ops/")).is_file()
    for image in (service["image"] for service in services.values() if "image" in service):
        assert ":" in image, f"{image} is not pinned"
    # Compose does nothing at all, not even the making of tokens, while one of these is missing.
    said, _, rest = (OPS / "compose.yml").read_text().partition("name: paceline")
    assert {name for name in re.findall(r"\$\{(\w+):\?", rest) if name not in said} == set()


def test_late_is_what_ends_after_its_deadline() -> None:
    names = BatchRow.__dataclass_fields__
    row = dict.fromkeys(names, 0) | {"created_at": 1_000.0, "deadline_s": 600.0, "eta_s": 300.0}
    # 100 s after its beginning, 300 s to go: in time by 200 s; with 700 s to go, late by 200 s.
    assert late_s(BatchRow(**row), 1_100.0) == 0.0  # type: ignore[arg-type]
    assert late_s(BatchRow(**row | {"eta_s": 700.0}), 1_100.0) == 200.0  # type: ignore[arg-type]
    assert late_s(BatchRow(**row | {"eta_s": -1.0}), 1_700.0) == 100.0  # type: ignore[arg-type]
    assert late_s(BatchRow(**row | {"deadline_s": -1.0}), 9e9) == 0.0  # type: ignore[arg-type]
    assert FailureCode.BATCH_CANCELLED.retryable


def test_promtool_accepts_the_rules_and_their_tests_pass() -> None:
    promtool = shutil.which("promtool") or shutil.which("promtool", path=str(Path(sys.executable).parent))
    if promtool is None:
        reason = "no promtool on the path: Debian's package prometheus has it"
        pytest.fail(reason, pytrace=False) if os.environ.get("CI") else pytest.skip(reason)
    for command in (["check", "rules", str(RULES)], ["test", "rules", str(RULES.with_name("paceline.tests.yml"))]):
        ran = subprocess.run([promtool, *command], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stdout + ran.stderr
