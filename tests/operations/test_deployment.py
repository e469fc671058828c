"""A real Prometheus scrapes the running service: what it is told, what rules and dashboard ask, and the logs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families

from service.worker.metrics import WorkerMetrics
from tests.operations.conftest import DOCKER, NOTHING, REQUEST_ID, SECRETS, Deployment
from tests.operations.promql import Exported, Query, exported
from tests.service.processes import metric, wait_until

DASHBOARD = DOCKER / "grafana" / "dashboards" / "tarflow.json"
DOCUMENT = DOCKER.parent / "docs" / "monitoring.md"
RARE = {
    "tarflow_batch_ceiling_rows",
    "tarflow_cohort_merges_total",
    "tarflow_device_memory_bytes",
    "tarflow_device_memory_size_bytes",
    "tarflow_device_memory_used_bytes",
    "tarflow_dropped_rows_total",
    "tarflow_redone_images_total",
}
"""What a little work on a CPU does not bring about."""
VARIABLES = {"$__rate_interval": "1m", "$model": ".*"}


def rare() -> str:
    """What a worker tells of that."""
    metrics, registry = WorkerMetrics("w"), CollectorRegistry()
    metrics.observe_memory("cuda:0", held=1, free=1, size=2)
    for counter in (metrics.dropped, metrics.ceiling):
        counter.labels(model="m", op="sample")
    metrics.merges.labels(model="m")
    metrics.redone.labels(model="m", reason="tolerance")
    registry.register(metrics)
    return generate_latest(registry).decode()


@pytest.fixture(scope="module")
def known(deployment: Deployment) -> Exported:
    """Every metric with its labels: those that were scraped, and the rare ones."""
    scraped = exported(*deployment.scraped())
    return {**{name: labels for name, labels in exported(rare()).items() if name in RARE}, **scraped}


def panels() -> list[dict[str, Any]]:
    """Of the dashboard, without its rows."""
    return [panel for panel in json.loads(DASHBOARD.read_text())["panels"] if panel["type"] != "row"]


def queries() -> list[str]:
    """All that the panels ask."""
    return [target["expr"] for panel in panels() for target in panel["targets"]]


def chosen() -> list[tuple[str, str]]:
    """The metrics, and the labels of them, that the dashboard offers to choose by."""
    variables = json.loads(DASHBOARD.read_text())["templating"]["list"]
    found = [re.fullmatch(r"label_values\((\w+), (\w+)\)", variable["query"]["query"]) for variable in variables]
    return [(match[1], match[2]) for match in found if match is not None]


def rules() -> Iterator[dict[str, Any]]:
    """All alerts."""
    for group in yaml.safe_load((DOCKER / "alerts.yml").read_text())["groups"]:
        yield from group["rules"]


def test_every_query_speaks_of_what_is_exported(known: Exported) -> None:
    asked = [*queries(), *(rule["expr"] for rule in rules())]
    assert {query: wrong for query in asked if (wrong := list(Query.of(query).unknown(known)))} == {}
    assert chosen()
    for name, label in chosen():
        assert label in known[name]
    for panel in panels():
        for target in panel["targets"]:
            shown = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert shown <= Query.of(target["expr"]).grouped, panel["title"]
    for rule in rules():
        query = Query.of(rule["expr"])
        labels = query.grouped.union({"instance", "job"}, *(known.get(name, ()) for name, _ in query.selected))
        texts = " ".join(rule["annotations"].values())
        assert set(re.findall(r"\$labels\.(\w+)", texts)) <= labels, rule["alert"]


@pytest.mark.parametrize(
    ("query", "wrong"),
    [
        ("sum(rate(tarflow_imagse_total[5m]))", ["no metric tarflow_imagse_total"]),
        ('up{job="a"} == 0 or sum(tarflow_queue_depth{model="m"})', ["tarflow_queue_depth has no label model"]),
        ("max by (op, model) (tarflow_queue_depth)", ["no label model"]),
    ],
)
def test_a_wrong_query_would_be_seen(query: str, wrong: list[str]) -> None:
    assert list(Query.of(query).unknown({"tarflow_queue_depth": frozenset({"op"})})) == wrong


def test_prometheus_answers_every_query_of_the_dashboard(deployment: Deployment) -> None:
    asked = []
    for query in queries():
        if not {name for name, _ in Query.of(query).selected} & RARE:
            for variable, value in VARIABLES.items():
                query = query.replace(variable, value)
            asked.append(query)
    assert len(asked) > 40
    empty: list[str] = []

    def all_answer() -> bool:
        empty[:] = [query for query in asked if not deployment.prometheus.value(query)]
        return not empty

    try:
        wait_until(all_answer, "every query has an answer")
    except AssertionError:
        raise AssertionError(empty) from None


def test_the_rules_are_loaded_and_evaluated(deployment: Deployment) -> None:
    def loaded() -> list[dict[str, Any]]:
        return [rule for group in deployment.prometheus.ask("rules")["groups"] for rule in group["rules"]]

    wait_until(lambda: all(rule["health"] != "unknown" for rule in loaded()), "every rule was evaluated")
    assert {rule["name"]: rule["health"] for rule in loaded()} == {rule["alert"]: "ok" for rule in rules()}
    firing = {rule["name"] for rule in loaded() if rule["state"] == "firing"}
    assert not firing & {"TarflowTargetDown", "TarflowBrokerUnreachable", "TarflowNoWorkerReady", "TarflowWedged"}


def test_each_figure_is_told_once(deployment: Deployment) -> None:
    """A worker that has a port of its own does not tell its figures to the API, too."""
    api, worker = deployment.scraped()
    assert metric(worker, "tarflow_images_total", model="tiny-cond", op="sample") == 6
    assert "tarflow_images" not in api
    assert "tarflow_jobs_total" not in worker
    names = {sample.labels["worker"] for f in text_string_to_metric_families(worker) for sample in f.samples}
    assert len(names) == 1
    assert {label["worker"] for label in by_label(api, "tarflow_worker_heartbeat_age_seconds")} == names


def by_label(text: str, name: str) -> list[dict[str, str]]:
    """The labels of every sample of a name."""
    return [s.labels for f in text_string_to_metric_families(text) for s in f.samples if s.name == name]


def test_outcomes_and_waits_are_counted_once_each(deployment: Deployment) -> None:
    api, worker = deployment.scraped()

    def requests(outcome: str) -> float:
        return metric(api, "tarflow_requests_total", op="sample", outcome=outcome)

    # Refused for its class, for a header, and for its key: the last two before their route.
    assert (requests("ok"), requests("accepted"), requests("invalid")) == (2, 1, 3)
    assert metric(api, "tarflow_request_seconds_count", op="sample") == 2
    assert metric(api, "tarflow_refused_total") == 2
    # What was answered later is among the jobs, and has waited like the others.
    assert metric(api, "tarflow_jobs_total", model="tiny-cond", op="sample", outcome="ok") == 3
    assert metric(api, "tarflow_jobs_total") == 4
    # Of what has not happened yet the first time would be no increase otherwise.
    for outcome in ("error", "oom", "timeout", "worker_lost"):
        assert metric(api, "tarflow_jobs_total", outcome=outcome) == 0
        told = by_label(api, "tarflow_jobs_total")
        assert {"model": "tiny-uncond", "op": "encode", "outcome": outcome} in told
    assert metric(worker, "tarflow_queue_wait_seconds_count", model="tiny-cond", op="sample") == 3
    assert metric(worker, "tarflow_queue_wait_seconds_count", model="tiny-uncond", op="score") == 1
    for counter in ("tarflow_jobs_reclaimed_total", "tarflow_dead_letters_total"):
        assert by_label(api, counter) == [{}]
        assert metric(api, counter) == 0


def test_no_label_tells_who_asked_or_what_for(deployment: Deployment) -> None:
    for text in deployment.scraped():
        for secret in ("acme", "secret", REQUEST_ID, "sample_", NOTHING, "wolf"):
            assert secret not in text, secret


def test_every_metric_is_documented(deployment: Deployment) -> None:
    families = {
        family.name + ("_total" if family.type == "counter" else "")
        for text in deployment.scraped()
        for family in text_string_to_metric_families(text)
    }
    documented = set(re.findall(r"^\| `(tarflow_\w+)`", DOCUMENT.read_text(), re.MULTILINE))
    assert documented == {name for name in families if not name.startswith("process_")}


def logged(path_text: str) -> list[dict[str, Any]]:
    """The lines of a log that is not a terminal: each is an object."""
    return [json.loads(line) for line in path_text.splitlines()]


def test_a_request_can_be_followed_into_the_worker(deployment: Deployment) -> None:
    def lines_of(text: str) -> list[dict[str, Any]]:
        return [line for line in logged(text) if line.get("request_id") == REQUEST_ID]

    [request] = [line for line in lines_of(deployment.api.log) if line["event"] == "request"]
    assert list(request)[:3] == ["timestamp", "level", "event"]
    expected = {
        **{"level": "info", "logger": "service.api.observing", "caller": "acme", "method": "POST"},
        **{"route": "/v1/sample", "status": 200, "outcome": "ok", "op": "sample", "model": "tiny-cond"},
    }
    assert expected.items() <= request.items()
    assert request["seconds"] > 0
    wait_until(lambda: bool(lines_of(deployment.worker.log)), "the worker says that it has done it")
    [done] = lines_of(deployment.worker.log)
    assert done["job_id"] == request["job_id"]
    assert (done["op"], done["model"], done["level"]) == ("sample", "tiny-cond", "debug")
    assert done["worker"]


def test_the_example_of_the_guide_is_such_a_line(deployment: Deployment) -> None:
    document = DOCUMENT.read_text()
    [example] = re.findall(r"^```json\n(.*)\n```$", document, re.MULTILINE)
    [line] = [line for line in logged(deployment.api.log) if line.get("op") == "score"]
    assert list(json.loads(example)) == list(line)
    explained = set(re.findall(r"`(\w+)`", "".join(re.findall(r"^\|([^|]+)\|", document, re.MULTILINE))))
    lines = logged(deployment.api.log) + logged(deployment.worker.log)
    assert {field for line in lines for field in line} <= explained


def test_requests_are_lines_and_polls_are_not(deployment: Deployment) -> None:
    requests = [line for line in logged(deployment.api.log) if line["event"] == "request"]
    said = {(line["status"], line["outcome"], line.get("code")) for line in requests if line.get("op") == "sample"}
    assert said == {
        (200, "ok", None),
        (202, "accepted", None),
        (422, "invalid", "class_not_found"),
        (422, "invalid", "invalid_value"),
        (401, "invalid", "invalid_key"),
    }
    assert {line["route"] for line in requests if "/jobs" in line.get("route", "")} == {"/v1/jobs/{job_id}"}
    [lost] = [line for line in requests if "route" not in line]
    assert lost["status"] == 404
    polls = [line for line in requests if line.get("route") in ("/metrics", "/readyz")]
    assert polls
    assert {line["level"] for line in polls} == {"debug"}


def test_logs_hold_no_secret(deployment: Deployment) -> None:
    logs = deployment.api.log + deployment.worker.log
    for secret in (*SECRETS.values(), "tarflow_wrong-secret", "in-a-query", NOTHING, "Bearer"):
        assert secret not in logs, secret


def test_uvicorn_and_our_modules_are_rendered_alike(deployment: Deployment) -> None:
    loggers = {line["logger"] for line in logged(deployment.api.log)}
    assert {"uvicorn.error", "service.api.observing"} <= loggers
    workers = logged(deployment.worker.log)
    assert {"service.supervisor", "service.worker"} <= {line["logger"] for line in workers}
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["timestamp"]) for line in workers)


def test_what_is_shipped_fits_together() -> None:
    """Where Grafana is told to look is where compose puts the dashboard; panels do not overlap."""
    provisioning = DOCKER / "grafana" / "provisioning"
    [source] = yaml.safe_load((provisioning / "datasources" / "prometheus.yml").read_text())["datasources"]
    [provider] = yaml.safe_load((provisioning / "dashboards" / "tarflow.yml").read_text())["providers"]
    assert provider["options"]["path"] == "/var/lib/grafana/dashboards"
    for panel in panels():
        assert {target["datasource"]["uid"] for target in panel["targets"]} == {source["uid"]}, panel["title"]
    places = [
        (x, y)
        for panel in json.loads(DASHBOARD.read_text())["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24
