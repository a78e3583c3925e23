"""Which containers a selector is for."""

import pytest

from fleet.managers import containers, docker
from fleet.managers.containers import ContainerSelector
from remediator.execution.controls.docker import DockerControlOptions


@pytest.mark.parametrize(
    ("selector", "image", "matches"),
    [
        ("registry/web", "registry/web", True),
        ("registry/web", "registry/web:v2", True),
        ("registry/web", "registry/web@sha256:abc", True),
        ("registry/web", "registry/web:v2@sha256:abc", True),
        ("registry/web", "registry/webapp:v2", False),
        ("registry/web", "registry/web/worker:v2", False),
        ("registry", "registry:5000/web", False),
        ("registry:5000/web", "registry:5000/web:v1", True),
        ("registry/web:v1", "registry/web:v1", True),
        ("registry/web:v1", "registry/web:v1.2", False),
        ("registry/web:v1", "registry/web", False),
    ],
)
def test_an_image_without_a_tag_matches_any(selector: str, image: str, matches: bool) -> None:
    assert ContainerSelector(image=selector).matches_image(image) == matches


def test_a_script_has_one_line_without_patterns_of_sudoers() -> None:
    selector = ContainerSelector(labels=("app=web", "team=a b"))
    (_, _, script) = docker.build_action("restart", selector)
    assert not set("\n*?[]\\#!~^`") & set(script)
    assert containers.build_announcement(ContainerSelector("web")) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "must have exactly one of container, label, image"),
        ({"container": "web", "label": "app=web"}, "not container and label"),
        ({"label": "app"}, "String should match pattern"),
        ({"label": "app=$(id)"}, "String should match pattern"),
        ({"label": []}, "at least 1 item"),
        ({"image": "web web"}, "String should match pattern"),
    ],
)
def test_options_that_select_nothing_or_twice(options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DockerControlOptions.model_validate(options)
