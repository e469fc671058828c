"""What docker/Dockerfile promises can be read from it; that it builds and runs is shown by test_images.py."""

from __future__ import annotations

import re

import pytest

from service.settings import ApiSettings, ServeSettings, SharedSettings, WorkerSettings
from tests.docker import dockerfile
from tests.docker.compose import ROOT

FORMS: dict[str, type[SharedSettings]] = {"api": ApiSettings, "worker": WorkerSettings, "serve": ServeSettings}


def test_any_base_will_do() -> None:
    first = dockerfile.instructions()[0]
    assert re.fullmatch(r"BASE_IMAGE=python:3\.\d+-slim-\w+", first[1]), first
    assert first[0] == "ARG"
    seen: set[str] = set()
    for stage in dockerfile.stages().values():
        assert stage.base == "${BASE_IMAGE}" or stage.base in seen, stage
        seen.add(stage.name)


def test_a_plain_build_makes_what_answers_by_itself() -> None:
    assert list(dockerfile.stages())[-1] == "serve"


@pytest.mark.parametrize("target", dockerfile.TARGETS)
def test_each_image_runs_its_form_without_privileges(target: str) -> None:
    assert dockerfile.last(target, "USER") == "10001"
    assert "--uid 10001 " in dockerfile.lineage(target)[0].values("RUN")[0]
    assert (dockerfile.words(target, "ENTRYPOINT"), dockerfile.words(target, "CMD")[-1]) == (["tarflow"], target)


@pytest.mark.parametrize("target", dockerfile.TARGETS)
def test_variables_are_settings(target: str) -> None:
    variables = dockerfile.variables(target)
    ours = {name.removeprefix("TARFLOW_").lower() for name in variables if name.startswith("TARFLOW_")}
    assert ours
    assert ours <= FORMS[target].model_fields.keys()
    assert set(variables) - {"PATH", "PYTHONUNBUFFERED"} == {f"TARFLOW_{name.upper()}" for name in ours}


@pytest.mark.parametrize("target", dockerfile.TARGETS)
def test_health_is_asked_where_it_is_told(target: str) -> None:
    *python, script, variable, path = dockerfile.words(target, "HEALTHCHECK")[-5:]
    assert python == ["python3", "-I"]
    assert script == f"/opt/tarflow/{(ROOT / 'docker' / 'healthcheck.py').name}"
    port = dockerfile.variables(target)[variable]
    assert port in dockerfile.last(target, "EXPOSE").split()
    assert path == ("/healthz" if target == "api" else "/readyz")


def test_the_api_s_image_is_made_without_torch_and_models() -> None:
    names = list(dockerfile.stages())
    before = set(names[: names.index("api") + 1])
    # Builders without BuildKit build every stage up to the target.
    assert not [text for name in before for text in dockerfile.stages()[name].values("RUN") if text.endswith(" torch")]
    copied = [text for stage in dockerfile.lineage("api") for text in stage.values("COPY")]
    assert {match[1] for text in copied if (match := re.search(r"--from=(\S+)", text))} == {"dependencies", "api-code"}
    assert dockerfile.stages()["api-code"].values("RUN")[0].startswith("rm -r model/bundled ")


def test_the_large_dependency_has_a_layer_of_its_own_below_what_changes() -> None:
    assert [text.split()[0] for text in dockerfile.stages()["complete"].values("COPY")] == [
        "--from=torch",
        "--from=dependencies",
        "--from=code",
    ]
    assert [text.split() for text in dockerfile.stages()["torch"].values("COPY")] == [["constraints.txt", "./"]]


def test_the_context_has_what_is_copied_and_nothing_else() -> None:
    copied = {
        source
        for stage in dockerfile.stages().values()
        for text in stage.values("COPY")
        if "--from=" not in text
        for source in text.split()[:-1]
    }
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert lines[0] == "*"
    assert {line[1:] for line in lines if line.startswith("!")} == copied
    assert all((ROOT / source).exists() for source in copied)


def test_no_secret_is_asked_for() -> None:
    """What is built with a secret keeps it: arguments are in an image's history."""
    arguments = {text.partition("=")[0] for word, text in dockerfile.instructions() if word == "ARG"}
    assert arguments == {"BASE_IMAGE", "PIP_ARGS"}
