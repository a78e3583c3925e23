#!/bin/sh
# Builds the image if there is none, writes .env and a first configuration if there are none, and starts everything with
# docker compose. Run it in a checkout, as the owner of the configuration, as often as needed. Its options are those of
# `defib init`; REGISTRY, DEFIB_IMAGE and DEFIB_EXTRAS are as in .env.example.
set -eu
cd "$(dirname "$0")/.."

# Variables of the environment come before those of .env, as with docker compose.
read_setting() { # name
    printenv "$1" || { [ ! -e .env ] || sed -n "s/^$1=//p" .env | tail -n 1; }
}
image=$(read_setting DEFIB_IMAGE)
image=${image:-defib:latest}
registry=$(read_setting REGISTRY)
if ! docker image inspect "$image" >/dev/null 2>&1; then
    docker build --tag "$image" --build-arg BASE_IMAGE="${registry:-docker.io}/library/python:3.12.12-slim-bookworm" \
        --build-arg EXTRAS="$(read_setting DEFIB_EXTRAS)" .
fi
if [ ! -e .env ]; then
    terminal=''
    [ ! -t 0 ] || terminal='--interactive --tty'
    # shellcheck disable=SC2086 # no option, or two
    docker run --rm $terminal --user "$(id -u):$(id -g)" --volume "$PWD:/work" --workdir /work "$image" init --compose "$@" config
    # What was set for this run holds for later ones, too.
    for name in REGISTRY DEFIB_IMAGE DEFIB_EXTRAS; do
        value=$(printenv "$name" || :)
        [ -z "$value" ] || echo "$name=$value" >>.env
    done
fi
config=$(read_setting DEFIB_CONFIG)
if [ ! -d "${config:-config}" ]; then
    echo "$0: .env exists, but there is no configuration ${config:-config}. Move .env away, and run this again with" >&2
    echo "what it sets in the environment: REGISTRY=registry.example/docker.io $0" >&2
    exit 1
fi
docker compose up --detach
