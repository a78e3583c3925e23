#!/bin/sh
# Installs or updates Defib with systemd: three accounts, /opt/defib/VERSION, /etc/defib and the units. Run it as root from a
# checkout, as often as needed. Files in /etc/defib are not changed, and only services that already run are restarted.
# The remediator runs as defib, the exporter as defib-exporter, the gateway, which is optional, as defib-gateway. All read
# /etc/defib through the group defib; secrets and keys of one program belong to its account.
# VERSION is the version number with a hash of the sources. Earlier versions stay in /opt/defib;
# `install.sh --rollback VERSION` activates one of them.
# Without access to a package index: PIP_NO_INDEX=1 PIP_FIND_LINKS=/path/to/wheels deploy/install.sh
set -eu
umask 022
trap 'exit 1' HUP INT TERM

usage="usage: $0 [--rollback VERSION] [--extras feishu,grpc]"
source=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
rollback='' quiet='--quiet --disable-pip-version-check'
while [ $# -gt 0 ]; do
    case $1 in
    --rollback) rollback=${2:?$usage}; shift 2 ;;
    --extras) extras=${2?$usage}; shift 2 ;;
    *) echo "$usage" >&2; exit 2 ;;
    esac
done
# Unless they are given, the extras of the active version stay.
[ "${extras+given}" ] || extras=$(cat /opt/defib/current/extras 2>/dev/null || :)
locks=requirements.lock
for extra in $(echo "$extras" | tr , ' '); do
    [ -f "$source/requirements-$extra.lock" ] || { echo "--extras: there is no extra $extra" >&2; exit 2; }
    locks="$locks requirements-$extra.lock"
done
[ "$(id -u)" = 0 ] || { echo "$0: must be run as root" >&2; exit 1; }

activate() { # version
    ln -sfn "$1" /opt/defib/next && mv -Tf /opt/defib/next /opt/defib/current
    ln -sfn /opt/defib/current/bin/defib /usr/local/bin/defib
    install -m 644 "/opt/defib/$1"/units/*.service /etc/systemd/system/
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload
        for unit in defib-exporter defib-remediator defib-deadman defib-gateway; do
            systemctl try-restart "$unit.service"
        done
    else
        echo "systemd is not running: the units are installed, but not started" >&2
    fi
    echo "defib $1 is active; installed versions: $(ls /opt/defib | grep -v current | tr '\n' ' ')"
}

if [ -n "$rollback" ]; then
    case $rollback in current | next | */*) echo "--rollback: $rollback is not a version" >&2; exit 1 ;; esac
    [ -d "/opt/defib/$rollback/units" ] || { echo "--rollback: version $rollback is not installed (no /opt/defib/$rollback)" >&2; exit 1; }
    activate "$rollback"
    exit 0
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Defib needs Python 3.11 or newer, but $python is older; use another: PYTHON=python3.12 $0" >&2; exit 1; }
version=$("$python" -c 'import sys, tomllib; print(tomllib.load(open(sys.argv[1], "rb"))["project"]["version"])' "$source/pyproject.toml")
list_sources() {
    cd "$source"
    find alerts grafana/dashboards grafana/dashboards-zh grafana/provisioning console defib exporter fleet gateway remediator runtime deploy/systemd pyproject.toml $locks requirements-build.lock -type f ! -name '*.pyc' | sort | xargs sha256sum
    echo "$extras"
    "$python" -V
}
version=$version-$(list_sources | sha256sum | cut -c1-8)

getent group defib >/dev/null || groupadd --system defib
for user in defib-exporter defib-gateway; do
    getent passwd $user >/dev/null ||
        useradd --system --user-group --groups defib --home-dir /nonexistent --no-create-home --shell /usr/sbin/nologin $user
done
getent passwd defib >/dev/null ||
    useradd --system --gid defib --home-dir /var/lib/defib --no-create-home --shell /usr/sbin/nologin defib
install -d -m 755 /opt/defib
install -d -o root -g defib -m 750 /etc/defib
install -d -o defib -g defib -m 700 /var/lib/defib
# An existing directory is left as it is: it belongs to the user that runs the program.
for user in defib-exporter defib-gateway; do
    [ -d /var/lib/$user ] || install -d -o $user -g $user -m 700 /var/lib/$user
done
# Root writes backups, since only root can read all secrets. An existing directory is left as it is.
[ -d /var/backups/defib ] || install -d -o root -g root -m 700 /var/backups/defib

# The units are installed last: a version that has them is complete, and is not changed any more.
if [ ! -d "/opt/defib/$version/units" ]; then
    build=$(mktemp -d)
    trap 'rm -rf "$build" "/opt/defib/$version"' EXIT
    rm -rf "/opt/defib/$version"
    # Build from a copy: the checkout may hold files of earlier builds, and must not get new ones.
    mkdir "$build/source"
    (cd "$source" && cp -r alerts grafana console defib exporter fleet gateway remediator runtime pyproject.toml README.md "$build/source/")
    echo "installing defib $version into /opt/defib/$version; this downloads its Python packages"
    "$python" -m venv "/opt/defib/$version" && "$python" -m venv "$build/venv"
    # shellcheck disable=SC2046 # names of files without spaces
    (cd "$source" && "/opt/defib/$version/bin/pip" install $quiet --require-hashes --only-binary :all: $(printf -- '-r %s ' $locks))
    "$build/venv/bin/pip" install $quiet --require-hashes --only-binary :all: -r "$source/requirements-build.lock"
    "$build/venv/bin/pip" wheel $quiet --no-deps --no-build-isolation --wheel-dir "$build/dist" "$build/source"
    "/opt/defib/$version/bin/pip" install $quiet --no-deps --no-index "$build"/dist/*.whl
    "/opt/defib/$version/bin/pip" check >/dev/null
    setpriv --reuid defib --regid defib --clear-groups "/opt/defib/$version/bin/defib" --version >/dev/null
    echo "$extras" >"/opt/defib/$version/extras"
    install -d "/opt/defib/$version/units"
    install -m 644 "$source"/deploy/systemd/*.service "/opt/defib/$version/units/"
    trap - EXIT
    rm -rf "$build"
fi

if [ -z "$(ls -A /etc/defib)" ]; then
    "/opt/defib/$version/bin/defib" init --systemd /etc/defib
    # Owned by root, readable by the programs' group only.
    chown -R root:defib /etc/defib
    find /etc/defib -type d -exec chmod 750 {} + && find /etc/defib -type f -exec chmod 640 {} +
    for secret in /etc/defib/secrets/*; do
        case ${secret##*/} in
        exporter_token | metrics_token) ;; # of both programs
        *) chown defib "$secret" && chmod 400 "$secret" ;;
        esac
    done
    for key in defib-exporter:read_ed25519 defib:control_ed25519; do
        [ ! -e "/etc/defib/${key#*:}" ] || { chown "${key%%:*}" "/etc/defib/${key#*:}" && chmod 400 "/etc/defib/${key#*:}"; }
    done
    chmod 755 /etc/defib-monitoring && chmod 644 /etc/defib-monitoring/*
    (umask 077 && echo "DEFIB_REMEDIATOR_OPTIONS=--web.config.file=/etc/defib/secrets/web_config" >/etc/defib/remediator.env)
fi
# Where prometheus.yml and alertmanager.yml of /etc/defib-monitoring look for their tokens.
if getent passwd prometheus >/dev/null; then
    [ -d /etc/prometheus/secrets ] || install -d -o root -g prometheus -m 750 /etc/prometheus/secrets
    for token in metrics_token webhook_token; do
        if [ -e "/etc/defib/secrets/$token" ] && [ ! -e "/etc/prometheus/secrets/$token" ]; then
            install -o prometheus -g prometheus -m 400 "/etc/defib/secrets/$token" /etc/prometheus/secrets/
        fi
    done
fi
dropin=/etc/systemd/system/defib-exporter.service.d/user.conf
# Earlier versions ran the exporter as defib, too, which owns the keys then.
if grep -qx User=defib /etc/systemd/system/defib-exporter.service 2>/dev/null; then
    mkdir -p "${dropin%/*}"
    printf '[Service]\nUser=defib\nGroup=defib\n' >$dropin
fi
activate "$version"
if [ -f $dropin ]; then
    echo "The exporter still runs as the remediator's user, because of $dropin."
    echo "docs/upgrading.md, \"Two users\", says how to give it the user defib-exporter."
fi
echo "Next: edit /etc/defib, then run"
echo "  sudo -u defib-exporter defib check --for exporter --config /etc/defib"
echo "  sudo -u defib defib check --for remediator --config /etc/defib"
echo "  systemctl enable --now defib-exporter defib-remediator defib-deadman"
echo "With gateway.upstreams (docs/gateway.md), also: systemctl enable --now defib-gateway"
