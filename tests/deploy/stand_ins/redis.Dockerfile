# Stands in for the official Redis image: Debian's Redis, and the folder that belongs to the user 999.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
FROM ${PYTHON_IMAGE}
# What Debian has today
# hadolint ignore=DL3008
RUN mkdir -p /var/cache/apt/archives/partial /var/log/apt \
    && apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends redis-server redis-tools \
    && rm -rf /var/lib/apt/lists/* \
    && install -d -o 999 -g 999 /data
WORKDIR /data
CMD ["redis-server"]
