# Three images: gateway (no torch), worker-cpu, worker (CUDA).
#
#   docker build --target gateway -t darkroom-gateway .
#   docker build --target worker-cpu -t darkroom-worker-cpu --build-arg PIP_EXTRA_INDEX_URL=... .
#   docker build --target worker -t darkroom-worker .
#
# pip reads PIP_EXTRA_INDEX_URL and PIP_FIND_LINKS by itself. PyTorch keeps its CPU-only builds on an index of its own:
# name it in PIP_EXTRA_INDEX_URL and worker-cpu is gigabytes smaller. PIP_FIND_LINKS names a folder of wheels.
#
# For a base that nobody can change under you, add its digest:
#   --build-arg PYTHON_IMAGE=python:3.11.14-slim-bookworm@sha256:...
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm

FROM ${PYTHON_IMAGE} AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PATH=/opt/darkroom/bin:$PATH
RUN python -m venv /opt/darkroom
WORKDIR /src
COPY pyproject.toml constraints.txt deploy/requirements.py ./

# Dependencies and code are layers of their own: a change of the code neither installs nor sends gigabytes again.
FROM build AS gateway-packages
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
RUN python requirements.py gateway otel s3 > gateway.txt \
    && pip install --no-cache-dir -c constraints.txt -r gateway.txt

FROM gateway-packages AS gateway-code
COPY README.md LICENSE ./
COPY app app
# All that the gateway sees of the worker and of the model
COPY worker/__init__.py worker/
COPY worker/contract worker/contract
COPY model/__init__.py model/config.py model/memory.py model/params.py model/
RUN pip install --no-cache-dir --no-deps --prefix /code .

FROM gateway-packages AS gateway-venv
RUN pip uninstall --yes pip setuptools

FROM build AS worker-packages
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
RUN python requirements.py worker otel s3 safety > worker.txt \
    && pip install --no-cache-dir -c constraints.txt -r worker.txt

FROM worker-packages AS worker-code
COPY README.md LICENSE ./
COPY app app
COPY worker worker
COPY model model
RUN chmod -R a+rX model \
    && pip install --no-cache-dir --no-deps --prefix /code .

FROM worker-packages AS worker-venv
RUN pip uninstall --yes pip setuptools

# The base without what nothing of ours runs: pip, the standard library's tests and windows, manuals, package lists.
FROM ${PYTHON_IMAGE} AS pruned
RUN stdlib="$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')" \
    && rm -rf "$stdlib"/ensurepip "$stdlib"/idlelib "$stdlib"/lib2to3 "$stdlib"/pydoc_data "$stdlib"/test \
        "$stdlib"/tkinter "$stdlib"/turtledemo "$stdlib"/site-packages/* /usr/lib/python3/dist-packages/* \
        /usr/local/bin/pip* /usr/local/bin/idle* /usr/local/bin/2to3* /usr/bin/pip* \
        /usr/share/python-wheels /usr/share/doc /usr/share/info /usr/share/locale /usr/share/man \
        /var/cache/apt /var/lib/apt/lists /var/log /root/.cache /tmp/* \
    && mkdir -p /var/log

# One layer of what is left, or what was removed would still be in the image below it
FROM scratch AS runtime
# hadolint ignore=DL3067
COPY --from=pruned / /
ARG VERSION=0.1.0
ARG REVISION=unknown
LABEL org.opencontainers.image.title="Darkroom" \
      org.opencontainers.image.description="A production inference server for the Stable Diffusion 3.5 family" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}"
# In production mode no Redis is started in the container: DARKROOM_REDIS_URL names one.
ENV PATH=/opt/darkroom/bin:/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin \
    LANG=C.UTF-8 \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/lib/darkroom \
    DARKROOM_ENV=production \
    DARKROOM_STORE_DIR=/var/lib/darkroom/pictures
# A volume that Docker mounts over one of these folders, new, takes its owner from it.
RUN chmod 1777 /tmp \
    && groupadd --gid 10001 darkroom \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/darkroom --shell /usr/sbin/nologin --no-log-init darkroom \
    && install -d -o 10001 -g 10001 /var/lib/darkroom /var/lib/darkroom/pictures \
    && install -d -o 10001 -g 10001 -m 0750 /var/lib/darkroom/credentials /var/lib/darkroom/secrets
WORKDIR /var/lib/darkroom
USER 10001:10001
ENTRYPOINT ["darkroom"]

FROM runtime AS gateway
COPY --from=gateway-venv /opt/darkroom /opt/darkroom
COPY --from=gateway-code /code /opt/darkroom
ENV DARKROOM_HOST=0.0.0.0 DARKROOM_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['DARKROOM_PORT'] + '/healthz', timeout=2)"]
CMD ["gateway"]

# What both workers share. /healthz answers while models load and never means busy.
FROM runtime AS worker-runtime
COPY --from=worker-venv /opt/darkroom /opt/darkroom
COPY --from=worker-code /code /opt/darkroom
ENV HF_HUB_OFFLINE=1 DARKROOM_METRICS_HOST=0.0.0.0 DARKROOM_METRICS_PORT=9464
EXPOSE 9464
HEALTHCHECK --interval=15s --timeout=5s --start-period=60s --retries=4 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['DARKROOM_METRICS_PORT'] + '/healthz', timeout=4)"]
CMD ["worker"]

FROM worker-runtime AS worker-cpu
ENV DARKROOM_DEVICE=cpu

# Attention for Hopper GPUs, 105 MB; others do without.
FROM build AS hopper
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
RUN pip install --no-cache-dir --no-deps --prefix /hopper -c constraints.txt fa3-fwd

# PyTorch's usual build carries CUDA with it; the host brings the driver and NVIDIA's container toolkit.
FROM worker-runtime AS worker
COPY --from=hopper /hopper /opt/darkroom
# Triton compiles what launches a kernel when that is first used, and keeps it where libraries may be loaded from.
USER 0:0
# hadolint ignore=DL3008
RUN mkdir -p /var/lib/apt/lists/partial /var/cache/apt/archives/partial /var/log/apt \
    && apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists /var/cache/apt /var/log/apt
USER 10001:10001
ENV TRITON_CACHE_DIR=/tmp/triton
ENV DARKROOM_DEVICE=cuda \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
