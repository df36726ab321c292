# rora-serve on CPUs: the packages of requirements/cpu.lock, the embedded default model, a user without rights.
#
#   docker build -t rora-serve .
#   docker run --rm --shm-size 1g -p 8000:8000 -v "$PWD/store:/store:ro" rora-serve
#
# vLLM's processes talk through /dev/shm, of which a container has 64 MB by default.
# Arguments after the image's name go to rora-serve.

FROM python:3.11-slim AS build
WORKDIR /app
COPY requirements/cpu.lock requirements/cpu.lock
COPY scripts/setup scripts/setup
COPY pyproject.toml README.md LICENSE ./
COPY adapters adapters
COPY trainer trainer
COPY rora_serve rora_serve
RUN PIP_NO_CACHE_DIR=1 PYTHON=python3 scripts/setup

FROM python:3.11-slim
RUN apt-get update -qq \
    && apt-get install -y -qq --no-install-recommends libnuma1 \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 10001 rora && mkdir /store
COPY --from=build /app /app
ENV PATH=/app/.venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1
USER rora
WORKDIR /home/rora
# Built now, so that a container starts without writing 270 MB.
RUN python -c "import os; from adapters.base_model import cache_folder, default_model; \
    print(default_model(cache_folder(os.environ)))"
VOLUME /store
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/ready', timeout=2)"]
ENTRYPOINT ["rora-serve", "--host", "0.0.0.0", "--store", "/store"]
