"""Which container a command is for: the one of an exact name, or the newest that matches labels or an image.

The host resolves that in the script of the command itself, so that an allow-list with the script permits nothing else.
"""

import re
from dataclasses import dataclass
from typing import Annotated

from pydantic import StringConstraints

from fleet.managers.guarded_scripts import ShellVariable, echo_to_stderr, quote_command

_MAX_LENGTH = 255
# https://github.com/moby/moby/blob/master/daemon/names/names.go
ContainerName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9_.-]+$", max_length=_MAX_LENGTH)]
# In both, only characters that can be written in sudoers.
_LABEL = r"^[a-zA-Z0-9][a-zA-Z0-9._/-]*=[a-zA-Z0-9._/:@+-]+( [a-zA-Z0-9._/:@+-]+)*$"
Label = Annotated[str, StringConstraints(pattern=_LABEL, max_length=_MAX_LENGTH)]
ImageName = Annotated[str, StringConstraints(pattern=r"^[a-zA-Z0-9][a-zA-Z0-9._/:@-]*$", max_length=_MAX_LENGTH)]
CONTAINER_ID = ShellVariable("id")
_LEFTOVER = ".defib-"
OLD_SUFFIX, NEW_SUFFIX = f"{_LEFTOVER}old", f"{_LEFTOVER}new"  # of the names of containers while one is recreated
_OWN_NAME = '{{join (split .Name "/") ""}}'  # docker's begin with a slash, podman's do not


@dataclass(frozen=True, slots=True)
class ContainerSelector:
    """One of: the exact name of a container; labels, of which it has all; its image, without a tag for any tag."""

    name: str = ""
    labels: tuple[str, ...] = ()
    image: str = ""

    def __str__(self) -> str:
        if self.name:
            return f"container {self.name}"
        if self.image:
            return f"container of the image {self.image}"
        return f"container with the {'labels' if len(self.labels) > 1 else 'label'} {', '.join(self.labels)}"

    @property
    def key(self) -> str:
        """What identifies the selector among those of its host."""
        return self.name or (f"image:{self.image}" if self.image else f"label:{','.join(sorted(self.labels))}")

    def matches_image(self, image: str) -> bool:
        """Whether this selects containers of an image by its name, of any tag if the selector has none."""
        if not self.image or self.image == image:
            return self.image == image != ""
        rest = image.removeprefix(self.image)
        return not _has_tag(self.image) and rest != image and rest[0] in ":@" and "/" not in rest


def is_label(text: str) -> bool:
    """Whether a selector can have a label."""
    return len(text) <= _MAX_LENGTH and re.fullmatch(_LABEL, text) is not None


def _has_tag(image: str) -> bool:
    return ":" in image.rpartition("/")[2] or "@" in image


def build_steps(selector: ContainerSelector, *, leftovers: bool = False) -> list[str]:
    """Return the steps of a script that set `id` to the ID of the selected container, or halt.

    Without a name, they also set `up` to the IDs of all running containers that match. With `leftovers`, containers of
    an interrupted `recreate` match, too.
    """
    return _find_by_name(selector.name) if selector.name else _find_newest(selector, leftovers=leftovers)


def build_announcement(selector: ContainerSelector) -> list[str]:
    """Return the step that prints which container was selected; none for a name."""
    return [] if selector.name else [_inspect(f"container {_OWN_NAME} ({{{{.Id}}}})", "$id")]


def build_running_names(selector: ContainerSelector) -> list[str]:
    """Return the step that prints `running` and the names of the running containers that match; none for a name."""
    return [] if selector.name else [f"echo running $({_name_running()})"]


def build_name_query(selector: ContainerSelector) -> list[str]:
    """Return the steps that print the name of the selected container, also of one that is left over."""
    return [*build_steps(selector, leftovers=True), f"exec {_inspect(_OWN_NAME, '$id')}"]


def if_named(container: str, template: str) -> str:
    """Return a template of `docker inspect` that is empty for other names; podman prints names without `/`."""
    return f'{{{{if eq .Name "/{container}" "{container}"}}}}{template}{{{{end}}}}'


def _find_by_name(container: str) -> list[str]:
    """Look for exactly this name: docker itself also accepts the beginning of another container's ID."""
    inspect = _inspect(if_named(container, "{{.Id}}"), container)
    return [f"id=$({inspect}) || halt", f'test -n "$id" || {{ {_gone(container)}; halt; }}']


def _find_newest(selector: ContainerSelector, *, leftovers: bool) -> list[str]:
    """Look for the newest running container, or else the newest one. `docker ps` lists the newest first.

    A container that is removed meanwhile makes `docker inspect` fail, but its output has the others.
    """
    ps = ["docker", "ps", "--all", "--no-trunc", "--quiet"]
    ps += [word for label in selector.labels for word in ("--filter", f"label={label}")]
    matching = _inspect(f"{{{{if {_condition(selector, leftovers=leftovers)}}}}}{{{{.Id}}}}{{{{end}}}}", "$ids")
    running = _inspect("{{if .State.Running}}{{.Id}}{{end}}", "$ids")
    created = _inspect("{{.Created}}", "$id $other")
    same = f"several running containers match ({selector}) and were created at the same time: $({_name_running()})"
    return [
        f"ids=$({quote_command(ps)}) || halt",
        f'ids=$(test -z "$ids" || {matching}) || test -n "$ids" || halt',
        f'test -n "$ids" || {{ {_gone(str(selector))}; halt; }}',
        f'up=$({running}) || test -n "$up" || halt',
        "id= other=",
        'for each in $up; do if test -z "$id"; then id=$each; else other=${other:-$each}; fi; done',
        f'test -z "$other" || {{ set -- $({created}); test "$1" = "$2" && {{ {echo_to_stderr(same)}; halt; }}; }}',
        'test -n "$id" || for each in $ids; do id=$each; break; done',
    ]


def _condition(selector: ContainerSelector, *, leftovers: bool) -> str:
    """Return the condition of a template of `docker inspect` for containers that match besides their labels."""
    conditions = [] if leftovers else [f'(eq (len (split .Name "{_LEFTOVER}")) 1)']
    if image := selector.image:
        alternatives = [f'(eq .Config.Image "{image}")']
        if not _has_tag(image):
            # The image's name begins with the selector's, and the rest has no further part of a path.
            parts = f'(eq (len (split .Config.Image "/")) {image.count("/") + 1})'
            starts = (f'(eq (index (split .Config.Image "{image}{mark}") 0) "")' for mark in ":@")
            alternatives += [f"(and {parts} {start})" for start in starts]
        conditions.append(f"(or {' '.join(alternatives)})")
    return f"and {' '.join(conditions)}" if conditions else "true"


def _inspect(template: str, containers: str) -> str:
    command = quote_command(["docker", "inspect", "--type", "container", "--format", template])
    return f"{command} {containers}"


def _name_running() -> str:
    return f"echo $({_inspect(_OWN_NAME, '$up')})"


def _gone(container: str) -> str:
    return echo_to_stderr(f"Error: No such container: {container}")
