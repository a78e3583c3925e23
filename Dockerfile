# One image for all programs; docker-compose.yml selects the command.
# BASE_IMAGE: any image with Python 3.11 or newer as `python3`, and its venv module.
ARG BASE_IMAGE=python:3.12.12-slim-bookworm

FROM ${BASE_IMAGE} AS built
# pip reads these from its environment: a mirror, or a server with wheels, for builds without internet access.
ARG PIP_INDEX_URL
ARG PIP_EXTRA_INDEX_URL
ARG PIP_TRUSTED_HOST
ARG PIP_FIND_LINKS
ARG PIP_NO_INDEX
# Extras: `feishu` (long connection).
ARG EXTRAS=
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python3 -m venv /opt/defib && python3 -m venv /opt/build
WORKDIR /source
COPY requirements*.lock ./
RUN set -- -r requirements.lock \
    && for extra in $(echo "$EXTRAS" | tr , ' '); do set -- "$@" -r "requirements-$extra.lock"; done \
    && /opt/defib/bin/pip install --require-hashes --only-binary :all: "$@" \
    && /opt/build/bin/pip install --require-hashes --only-binary :all: -r requirements-build.lock
COPY pyproject.toml README.md ./
COPY alerts alerts
COPY console console
COPY defib defib
COPY exporter exporter
COPY fleet fleet
COPY gateway gateway
COPY grafana/dashboards grafana/dashboards
COPY grafana/dashboards-zh grafana/dashboards-zh
COPY grafana/provisioning grafana/provisioning
COPY remediator remediator
COPY runtime runtime
RUN /opt/build/bin/pip wheel --no-deps --no-build-isolation --wheel-dir /dist /source \
    && /opt/defib/bin/pip install --no-deps --no-index /dist/*.whl && /opt/defib/bin/pip check \
    && /opt/defib/bin/python -m compileall -q /opt/defib

FROM ${BASE_IMAGE}
# Debian's packages for `defib host setup --apply`. Without internet access: --build-arg PACKAGES=
ARG PACKAGES=openssh-client
RUN [ -z "$PACKAGES" ] || { apt-get update && apt-get install --yes --no-install-recommends $PACKAGES && rm -rf /var/lib/apt/lists/*; }
# Any user can run the image: docker-compose.yml runs it as the owner of the configuration.
RUN printf 'defib:x:10001:10001::/var/lib/defib:/usr/sbin/nologin\n' >>/etc/passwd \
    && mkdir -p /etc/defib /var/lib/defib /var/lib/defib-exporter /var/lib/defib-deadman /var/lib/defib-gateway /var/cache/defib /var/backups/defib \
    && chmod 1777 /var/lib/defib /var/lib/defib-exporter /var/lib/defib-deadman /var/lib/defib-gateway /var/cache/defib /var/backups/defib
COPY --from=built /opt/defib /opt/defib
ENV PATH=/opt/defib/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 CACHE_DIRECTORY=/var/cache/defib
USER 10001:10001
WORKDIR /var/lib/defib
EXPOSE 9999 9998 9095 9190 9192
ENTRYPOINT ["defib"]
CMD ["--help"]
