#!/bin/sh
# Installs Defib, or another version of it, for systemd: an account, /opt/defib/VERSION, /etc/defib, units. Run it as root
# from a checkout; run it again whenever you like. What it finds in /etc/defib stays as it is, and nothing is restarted
# unless it runs already. A version before it stays in /opt/defib: `install.sh --rollback VERSION` goes back to it.
# Where no index can be reached: PIP_NO_INDEX=1 PIP_FIND_LINKS=/path/to/wheels deploy/install.sh
set -eu

usage="usage: $0 [--rollback VERSION] [--extras feishu,grpc]"
source=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}
rollback='' extras=''
while [ $# -gt 0 ]; do
    case $1 in
    --rollback) rollback=${2:?$usage}; shift 2 ;;
    --extras) extras=${2:?$usage}; shift 2 ;;
    *) echo "$usage" >&2; exit 2 ;;
    esac
done
[ "$(id -u)" = 0 ] || { echo "run it as root" >&2; exit 1; }

activate() { # version
    ln -sfn "$1" /opt/defib/next && mv -Tf /opt/defib/next /opt/defib/current
    ln -sfn /opt/defib/current/bin/defib /usr/local/bin/defib
    if [ -d /run/systemd/system ]; then
        systemctl daemon-reload
        for unit in defib-exporter defib-remediator; do
            systemctl try-restart "$unit.service"
        done
    else
        echo "systemd does not run here: the units are there, and nothing was started" >&2
    fi
    echo "defib $1 is in use; there are: $(ls /opt/defib | grep -v current | tr '\n' ' ')"
}

if [ -n "$rollback" ]; then
    [ -x "/opt/defib/$rollback/bin/defib" ] || { echo "there is no /opt/defib/$rollback" >&2; exit 1; }
    activate "$rollback"
    exit 0
fi

"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Defib needs Python 3.11 or newer; name one: PYTHON=python3.12 $0" >&2; exit 1; }
version=$("$python" -c 'import sys, tomllib; print(tomllib.load(open(sys.argv[1], "rb"))["project"]["version"])' "$source/pyproject.toml")

getent group defib >/dev/null || groupadd --system defib
getent passwd defib >/dev/null ||
    useradd --system --gid defib --home-dir /var/lib/defib --no-create-home --shell /usr/sbin/nologin defib
install -d -m 755 /opt/defib
install -d -o root -g defib -m 750 /etc/defib
install -d -o defib -g defib -m 700 /var/lib/defib

# Made beside and moved: a version that is there is whole, and one that runs is not changed under it.
if [ ! -x "/opt/defib/$version/bin/defib" ]; then
    trap 'rm -rf "/opt/defib/$version"' EXIT
    rm -rf "/opt/defib/$version"
    "$python" -m venv "/opt/defib/$version"
    "/opt/defib/$version/bin/pip" install --quiet --disable-pip-version-check --require-hashes -r "$source/requirements.lock"
    "/opt/defib/$version/bin/pip" install --quiet --disable-pip-version-check "$source${extras:+[$extras]}"
    "/opt/defib/$version/bin/defib" --version >/dev/null
    trap - EXIT
else
    echo "/opt/defib/$version is there already and stays as it is; to make it anew, remove it first"
fi

if [ -z "$(ls -A /etc/defib)" ]; then
    "/opt/defib/$version/bin/defib" init /etc/defib
    # Read by the group, written by root; the secrets are the programs' alone.
    chown -R root:defib /etc/defib
    find /etc/defib -type d -exec chmod 750 {} + && find /etc/defib -type f -exec chmod 640 {} +
fi
install -m 644 "$source/deploy/systemd/defib-exporter.service" "$source/deploy/systemd/defib-remediator.service" /etc/systemd/system/
activate "$version"
echo "next: defib check, then: systemctl enable --now defib-exporter defib-remediator"
