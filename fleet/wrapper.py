"""The forced command of a hardened host: it holds the scripts itself, and takes only their names and what is allowed.

`python -m fleet.wrapper` prints it; it stands in deploy/ssh/defib-shell. For controls it runs commands that root has
put into a folder of its own, each in a file that is named by the digest of its argv: nothing that it is sent is run.
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence

from fleet.host import gpu, ports, system
from fleet.host.sections import LIBRARY, Section
from fleet.managers import docker, supervisor, systemd
from fleet.shells.proof import MARK_FUNCTIONS

SCRIPTS: Mapping[str, str] = {
    **{
        each.name: each.script
        for each in (docker.SECTION, ports.SECTION, system.PROC_SECTION, system.FILESYSTEMS_SECTION)
    },
    **{
        each.name: each.script
        for each in (
            gpu.HELP_SECTION,
            gpu.INSTANCES_SECTION,
            gpu.PROCESSES_SECTION,
            gpu.XIDS_SECTION,
            systemd.FAILED_SECTION,
        )
    },
    gpu.build_query_section(()).name: gpu.QUERY_SCRIPT,
    systemd.SECTION_NAME: systemd.SECTION_SCRIPT,
    supervisor.SECTION_NAME: supervisor.SECTION_SCRIPT,
}
# Their names are of things of the host, and must be allowed one by one; the fields of a card need not.
NAMED = (systemd.SECTION_NAME, supervisor.SECTION_NAME)

_HEAD = r"""#!/bin/sh
# The only command that Defib's keys may run on this host. Made by `python -m fleet.wrapper`; do not edit.
#
# In authorized_keys:  restrict,from="EXPORTER",command="sudo -n /usr/local/sbin/defib-shell read" ssh-ed25519 …
#                      restrict,from="REMEDIATOR",command="sudo -n /usr/local/sbin/defib-shell control" ssh-ed25519 …
# In sudoers:          Defaults!/usr/local/sbin/defib-shell env_keep += "SSH_ORIGINAL_COMMAND"
#                      defib ALL=(root) NOPASSWD: /usr/local/sbin/defib-shell read
#                      defib ALL=(root) NOPASSWD: /usr/local/sbin/defib-shell control
# Further arguments, if any, are another folder than /etc/defib, and more folders for PATH.
#
# `read` takes `read MARK SECTION:SECONDS:NAME,NAME …`, and runs its own scripts for the sections and names that stand
# in the folder's file `allowed`, one on a line: `SECTION`, or `SECTION NAME`. `control` takes `run SECONDS DIGEST FIRST
# SECOND`, and runs the file of that name in the folder's `commands`, with marks around its outputs that are made of
# FIRST and SECOND; without the two, as earlier versions ask, it prints none. Nothing of what it is sent is evaluated.
set -f
cd / || exit 126
LC_ALL=C PATH=${3:+$3:}/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
export LC_ALL PATH
mode=$1 allowed=${2:-/etc/defib}/allowed commands=${2:-/etc/defib}/commands

refuse() {
    echo "defib-shell: $1" >&2
    exit 126
}
"""

_MODES = r"""if [ "$mode" = control ]; then
    case $SSH_ORIGINAL_COMMAND in
    '' | *[!a-z0-9.@\ -]*) refuse "it takes run SECONDS DIGEST FIRST SECOND" ;;
    esac
    set -- $SSH_ORIGINAL_COMMAND
    [ "$1" = run ] && { [ $# -eq 3 ] || [ $# -eq 5 ]; } || refuse "it takes run SECONDS DIGEST FIRST SECOND"
    case $2 in
    [1-9] | [1-9][0-9] | [1-9][0-9][0-9] | [1-9][0-9][0-9][0-9]) ;;
    *) refuse "$2 is not a time of less than 10000 s" ;;
    esac
    case $3 in
    *[!0-9a-f]*) refuse "$3 is not a digest" ;;
    esac
    [ -f "$commands/$3" ] || refuse "the command $3 is not in $commands (run defib host setup again)"
    first=$4 second=$5
    if [ $# -eq 3 ]; then
        bounded 5 "$2" sh "$commands/$3"
        exit
    fi
    kept marked bounded 5 "$2" sh "$commands/$3" </dev/null
    exit
fi
[ "$mode" = read ] || refuse "its first argument is read or control"
# Whatever hangs in the kernel, this ends.
if [ "$4" != bounded ] && command -v timeout >/dev/null 2>&1; then
    timeout -k 1 70 sh "$0" read "$2" "$3" bounded
    status=$?
    [ "$status" -eq 1 ] && old_timeout || exit "$status"
fi
case $SSH_ORIGINAL_COMMAND in
'' | *[!A-Za-z0-9@:._,/\ -]*) refuse "it takes read MARK SECTION:SECONDS:NAMES …" ;;
esac
set -- $SSH_ORIGINAL_COMMAND
[ "$1" = read ] && [ $# -ge 3 ] && [ $# -le 14 ] || refuse "it takes read MARK SECTION:SECONDS:NAMES …"
mark=$2
shift 2
"""

_CHECKS = r"""
# What is refused is a section, or one of its names: the others are none the worse for it.
refused() { printf '\n%s %s\n%s\n%s %s 126\n' "$mark" "$section" "defib-shell: $1" "$mark" "$section"; }
may() { grep -Fqx -e "$1" "$allowed" 2>/dev/null; }
is_a_time() { # below 60 s, and longer than none
    case $1 in
    *[!0-9.]* | *.*.* | .* | *.) return 1 ;;
    esac
    case ${1%%.*} in
    0 | [1-9] | [1-5][0-9]) ;;
    *) return 1 ;;
    esac
    case $1 in
    *[1-9]*) ;;
    *) return 1 ;;
    esac
}
# supervisorctl runs what its configuration says: as root, nobody else may have a say in that, nor in where it lies.
is_root_s_alone() {
    [ "$1" != - ] && [ "$(id -u)" -eq 0 ] || return 0
    path=$(readlink -f "$1") && [ -f "$path" ] || return 1
    while :; do
        set -- $(ls -ldn "$path" 2>/dev/null)
        case $1 in
        [-d]????-??-?*) ;;
        *) return 1 ;;
        esac
        [ "$3" = 0 ] || return 1
        [ "$path" != / ] || return 0
        path=${path%/*}
        path=${path:-/}
    done
}
why_not() { # section, name
    if ! may "$1 $2"; then echo "defib-shell: $1 $2 is not in $allowed"
    elif [ "$1" = supervisor ] && ! is_root_s_alone "$2"; then echo "defib-shell: $2 is not root's alone"; fi
}
"""

# What tells of a name that is refused, as the section's own script tells of one that it cannot read.
_TOLD = """
    more=
    case $section in
    systemd | supervisor)
        for name; do
            shift
            why=$(why_not "$section" "$name")
            case $why$section in
            systemd | supervisor) set -- "$@" "$name" ;;
            *systemd) more="$more
unit: $name
$why" ;;
            *supervisor) more="$more
config: $name
$why
failed: 126" ;;
            esac
        done ;;
    *) may "$section" || { refused "$section is not in $allowed"; return; } ;;
    esac
"""


def render_wrapper() -> str:
    """The program, POSIX sh."""
    cases = "".join(
        f"    {name}) script=$(cat <<'END_OF_SCRIPT'\n{text.strip()}\nEND_OF_SCRIPT\n) ;;\n"
        for name, text in SCRIPTS.items()
    )
    one = (
        "one() {\n    rest=${1#*:}\n    section=${1%%:*} limit=${rest%%:*} names=${rest#*:}\n"
        f'    case $section in\n{cases}    *) refused "there is no section $section"; return ;;\n    esac\n'
        '    is_a_time "$limit" || { refused "$limit is not a time below 60 s"; return; }\n'
        f'    IFS=,\n    set -- $names\n    unset IFS{_TOLD}    section "$section" "$limit" "$script" "$@"\n}}\n'
    )
    return f'{_HEAD}{MARK_FUNCTIONS}{LIBRARY}{_MODES}{_CHECKS}{one}in_order "$@"\n'


def render_command_file(argv: Sequence[str]) -> str:
    """What stands in the file of a command."""
    return f"exec {shlex.join(argv)}\n"


def render_allow_list(sections: Iterable[Section]) -> str:
    """The allow-list of a host of which these sections are read."""
    lines: set[str] = set()
    for section in sections:
        lines |= {f"{section.name} {name}" for name in section.names} if section.name in NAMED else {section.name}
    return "".join(f"{line}\n" for line in sorted(lines))


if __name__ == "__main__":
    print(render_wrapper(), end="")  # noqa: T201 - what it is for
