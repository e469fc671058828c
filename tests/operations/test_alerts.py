"""The alerts that are shipped, judged by Prometheus' own tool, and each of them tested and explained."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import yaml

DOCKER = Path(__file__).parents[2] / "docker"
DOCUMENT = "docs/monitoring.md"
ALERTS = [rule for group in yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def promtool(*arguments: str) -> None:
    """Run it in the directory of the files; it must find nothing wrong."""
    done = subprocess.run(["promtool", *arguments], capture_output=True, text=True, cwd=DOCKER, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_configuration_is_valid() -> None:
    promtool("check", "config", "prometheus.yml")


def test_the_rules_are_valid() -> None:
    promtool("check", "rules", "alerts.yml")


def test_the_rules_do_what_they_say() -> None:
    promtool("test", "rules", "alerts_test.yml")


def test_every_alert_is_tested_both_ways() -> None:
    checks = [
        check
        for test in yaml.safe_load((DOCKER / "alerts_test.yml").read_text())["tests"]
        for check in test["alert_rule_test"]
    ]
    names = {rule["alert"] for rule in ALERTS}
    assert {check["alertname"] for check in checks if check["exp_alerts"]} == names
    # Of those two the tests have another model beside it that is fine.
    silent = {check["alertname"] for check in checks if not check["exp_alerts"]}
    assert silent | {"TarflowNonFinite", "TarflowCertificatesMissed"} == names


def test_every_alert_says_what_to_do() -> None:
    sections = re.findall(r"^### (\w+)$", (DOCKER.parent / DOCUMENT).read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(rule["alert"] for rule in ALERTS)
    for rule in ALERTS:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert set(rule["annotations"]) == {"summary", "description", "runbook_url"}
        assert rule["annotations"]["runbook_url"] == f"{DOCUMENT}#{rule['alert'].lower()}"
