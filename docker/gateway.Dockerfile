# The gateway as an image: non-root, at home on a read-only root file system (/tmp alone is written to), without build tools but for
# the setuptools that torch requires.
#
#   docker build -f docker/gateway.Dockerfile -t ergo-vqa-gateway .
#
# Build arguments:
#   PYTHON_IMAGE          what both stages begin with: Python 3.11 or later with venv, and ca-certificates. Pin it by its digest:
#                         PYTHON_IMAGE=python:3.11-slim-bookworm@sha256:…
#   EXTRA                 server: in front of vLLM (the default). embedded: with torch, to run a model itself
#   PIP_EXTRA_INDEX_URL   for embedded: an index that has torch's CPU builds, where pip's own offers only those for GPUs
#
# A pip.conf of one's own, for an index that wants a password, is a build secret and stays out of the image:
#   docker build --secret id=pip.conf,src=pip.conf …
#
# Versions are those of constraints.txt, which the tests ran with; so is Python's.
ARG PYTHON_IMAGE=python:3.11-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ARG EXTRA=server
ARG PIP_EXTRA_INDEX_URL
# pip only warns of an extra that it does not know, and the image would hold no server.
RUN case "$EXTRA" in server|embedded) ;; *) echo "EXTRA is server or embedded, not '$EXTRA'" >&2; exit 2 ;; esac
# pip stays in an environment of its own and fills another one, which is all that is taken over.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/ergo
WORKDIR /src
COPY . .
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    /opt/pip/bin/pip install --quiet -c constraints.txt hatchling \
    && /opt/pip/bin/pip wheel --quiet --no-deps --no-build-isolation --wheel-dir /wheel . \
    && /opt/pip/bin/pip --python /opt/ergo/bin/python install --quiet -c constraints.txt "$(echo /wheel/*.whl)[$EXTRA]"

FROM ${PYTHON_IMAGE}
ARG EXTRA=server
LABEL org.opencontainers.image.title="ergo-vqa gateway (${EXTRA})" \
      org.opencontainers.image.description="Questions about high-resolution images: look at the whole, zoom in once, answer." \
      org.opencontainers.image.licenses="Apache-2.0"
# What the base has for installing packages goes: the official image keeps it below /usr/local, Debian below /usr. The certificates,
# for remote images, tracing and an engine behind https, must be there.
RUN for lib in /usr/local/lib/python3* /usr/lib/python3*; do \
        rm -rf "$lib/ensurepip"; \
        for tool in pip setuptools wheel pkg_resources _distutils_hack distutils-precedence.pth; do \
            rm -rf "$lib/site-packages/$tool"* "$lib/dist-packages/$tool"*; \
        done; \
    done \
    && rm -rf /usr/local/bin/pip* /usr/local/bin/wheel /usr/bin/pip* /usr/share/python-wheels \
    && test -s /etc/ssl/certs/ca-certificates.crt \
    && groupadd --gid 10001 ergo \
    && useradd --uid 10001 --gid 10001 --home-dir /tmp --no-create-home --shell /usr/sbin/nologin ergo
COPY --from=build /opt/ergo /opt/ergo
ENV PATH=/opt/ergo/bin:/usr/local/bin:/usr/bin:/bin \
    HOME=/tmp \
    PYTHONDONTWRITEBYTECODE=1 \
    PYTHONUNBUFFERED=1 \
    ERGO_HOST=0.0.0.0 \
    ERGO_PORT=8000
# A number, for Kubernetes cannot tell of a name that it is not root.
USER 10001:10001
WORKDIR /tmp
EXPOSE 8000
# Alive, not ready: an engine that is away is no reason to restart the gateway.
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python3", "-c", "import os, urllib.request as r; r.build_opener(r.ProxyHandler({})).open('http://127.0.0.1:' + os.environ['ERGO_PORT'] + '/healthz', timeout=4)"]
ENTRYPOINT ["ergo-vqa"]
CMD ["serve"]
