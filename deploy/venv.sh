#!/bin/sh
# Creates a virtual environment with pip, also if the system's Python has no ensurepip (Debian's python3-venv).
# Usage: deploy/venv.sh PYTHON VENV PARTS
set -eu

python=$1 venv=$2 parts=$3
if "$python" -c 'import ensurepip' 2>/dev/null && "$python" -m venv "$venv"; then
    exit 0
fi
if ! command -v apt-get >/dev/null 2>&1; then
    echo "$python cannot create virtual environments: install its venv module (python3-venv)." >&2
    exit 1
fi
rm -rf "$venv"
"$python" -m venv --without-pip "$venv"
mkdir -p "$parts/pip/lists/partial" "$parts/pip/cache/archives/partial"
(
    cd "$parts/pip"
    apt() {
        apt-get -o Dir::State::Lists="$PWD/lists" -o Dir::Cache="$PWD/cache" -o APT::Sandbox::User=root "$@"
    }
    apt -qq update >&2
    apt -qq download python3-pip-whl >&2
    for package in ./*.deb; do dpkg-deb -x "$package" .; done
)
wheel=$(ls "$parts"/pip/usr/share/python-wheels/pip-*.whl | head -n 1)
"$venv/bin/python" "$wheel/pip" install -q --disable-pip-version-check pip
