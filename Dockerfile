# Three images: gateway (no torch), worker-cpu, worker (CUDA).
#
#   docker build --target gateway -t darkroom-gateway .
#   docker build --target worker-cpu -t darkroom-worker-cpu --build-arg PIP_EXTRA_INDEX_URL=... .
#   docker build --target worker -t darkroom-worker .
#
# pip reads both arguments below by itself. PyTorch keeps its CPU-only builds on an index of its own: name it in
# PIP_EXTRA_INDEX_URL and worker-cpu is gigabytes smaller. PIP_FIND_LINKS names a folder of wheels.

FROM python:3.11-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_ROOT_USER_ACTION=ignore PATH=/opt/darkroom/bin:$PATH
RUN python -m venv /opt/darkroom
WORKDIR /src
COPY pyproject.toml constraints.txt deploy/requirements.py ./

# Dependencies come before the code: a change of the code does not install them again.
FROM build AS build-gateway
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
RUN python requirements.py gateway > gateway.txt && pip install --no-cache-dir -c constraints.txt -r gateway.txt
COPY README.md LICENSE ./
COPY app app
COPY worker worker
COPY model model
RUN rm -rf model/bundles \
    && pip install --no-cache-dir --no-deps . \
    && pip uninstall --yes pip setuptools

FROM build AS build-worker
ARG PIP_EXTRA_INDEX_URL
ARG PIP_FIND_LINKS
RUN python requirements.py worker > worker.txt && pip install --no-cache-dir -c constraints.txt -r worker.txt
COPY README.md LICENSE ./
COPY app app
COPY worker worker
COPY model model
RUN chmod -R a+rX model \
    && pip install --no-cache-dir --no-deps . \
    && pip uninstall --yes pip setuptools

FROM python:3.11-slim AS runtime
ARG VERSION=0.1.0
LABEL org.opencontainers.image.title="Darkroom" \
      org.opencontainers.image.description="A production inference server for the Stable Diffusion 3.5 family" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}"
# In production mode no Redis is started in the container: DARKROOM_REDIS_URL names one.
ENV PATH=/opt/darkroom/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1 \
    HOME=/var/lib/darkroom \
    DARKROOM_ENV=production \
    DARKROOM_STORE_DIR=/var/lib/darkroom/pictures
RUN groupadd --gid 10001 darkroom \
    && useradd --uid 10001 --gid 10001 --home-dir /var/lib/darkroom --shell /usr/sbin/nologin --no-log-init darkroom \
    && install -d -o 10001 -g 10001 /var/lib/darkroom /var/lib/darkroom/pictures \
    && install -d -o 10001 -g 10001 -m 0700 /var/lib/darkroom/secrets
WORKDIR /var/lib/darkroom
USER 10001:10001
ENTRYPOINT ["darkroom"]

FROM runtime AS gateway
COPY --from=build-gateway /opt/darkroom /opt/darkroom
ENV DARKROOM_HOST=0.0.0.0 DARKROOM_PORT=8000
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen('http://127.0.0.1:' + os.environ['DARKROOM_PORT'] + '/healthz', timeout=2)"]
CMD ["gateway"]

FROM runtime AS worker-cpu
COPY --from=build-worker /opt/darkroom /opt/darkroom
ENV HF_HUB_OFFLINE=1 DARKROOM_DEVICE=cpu DARKROOM_METRICS_HOST=0.0.0.0 DARKROOM_METRICS_PORT=9464
EXPOSE 9464
CMD ["worker"]

# PyTorch's usual build carries CUDA with it; the host brings the driver and NVIDIA's container toolkit.
FROM runtime AS worker
COPY --from=build-worker /opt/darkroom /opt/darkroom
ENV HF_HUB_OFFLINE=1 \
    DARKROOM_DEVICE=cuda \
    DARKROOM_METRICS_HOST=0.0.0.0 \
    DARKROOM_METRICS_PORT=9464 \
    NVIDIA_VISIBLE_DEVICES=all \
    NVIDIA_DRIVER_CAPABILITIES=compute,utility
EXPOSE 9464
CMD ["worker"]
