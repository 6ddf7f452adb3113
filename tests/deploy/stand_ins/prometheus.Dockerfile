# Stands in for the official Prometheus image: Debian's Prometheus, and the folder that belongs to nobody.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
FROM ${PYTHON_IMAGE}
# What Debian has today
# hadolint ignore=DL3008
RUN mkdir -p /var/cache/apt/archives/partial /var/log/apt \
    && apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends prometheus \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 65534 -g 65534 /prometheus
ENTRYPOINT ["prometheus"]
