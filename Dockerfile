# The command `study` with everything it needs, GPU or not: torch's wheel brings CUDA, the host its driver.
# Built by `docker compose build`. Pinned by version tag: this was written where no registry could be asked for digests.
FROM python:3.11.13-slim-bookworm

ENV PYTHONUNBUFFERED=1 PATH=/opt/venv/bin:$PATH

# Byte code now: the user below cannot write it later, and every worker would compile torch again.
# Dependencies before the code: a change of the code then reuses the layer with these gigabytes.
WORKDIR /opt/study
COPY pyproject.toml constraints.txt ./
RUN python3 -m venv /opt/venv \
    && /opt/venv/bin/python -m pip install --quiet --no-cache-dir --disable-pip-version-check -c constraints.txt uv \
    && /opt/venv/bin/uv pip install --quiet --no-cache --compile-bytecode --python /opt/venv/bin/python -c constraints.txt -r pyproject.toml

COPY README.md LICENSE ./
COPY study study
COPY storage storage
COPY dashboards dashboards
COPY docker/entrypoint.sh docker/
RUN /opt/venv/bin/uv pip install --quiet --no-cache --compile-bytecode --python /opt/venv/bin/python -c constraints.txt --no-deps .

# A named volume gets the owner of the folder that it is mounted on.
RUN useradd --uid 10001 --create-home study && install --directory --owner study --group study /data /reports
USER 10001:10001
WORKDIR /home/study
ENV STUDY_CACHE=/data/cache
VOLUME ["/data", "/reports"]
STOPSIGNAL SIGTERM
ENTRYPOINT ["/opt/study/docker/entrypoint.sh"]
CMD ["--help"]
