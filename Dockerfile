# syntax=docker/dockerfile:1
# Two targets: `docker build --target cpu .` (the default) and `docker build --target cuda .`
# Run: docker run --read-only --tmpfs /tmp --cap-drop ALL --security-opt no-new-privileges \
#          -v kvasir-cache:/var/cache/kvasir -e KVASIR_API_KEYS=<32 or more characters> -p 8000:8000 kvasir

# empty unless a folder of wheels is handed in: docker build --build-context wheels=DIR .
FROM scratch AS wheels

FROM python:3.11-slim-bookworm AS build-cpu
# where torch comes from; set it to an index of CPU builds to keep the image small
ARG TORCH_INDEX_URL=""
RUN apt-get update && apt-get install --yes --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
WORKDIR /src
RUN python -m venv /opt/kvasir
ENV PATH=/opt/kvasir/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY --from=wheels / /wheels/
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY engine/version.py engine/version.py
RUN pip install --find-links /wheels ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} --constraint constraints.txt torch
COPY . .
RUN pip install --constraint constraints.txt .
# compile the kernels for every instruction set now: the running container has no compiler
ENV KVASIR_CACHE_DIR=/opt/kvasir/kernels
RUN python -m kernels.native

FROM python:3.11-slim-bookworm AS cpu
RUN apt-get update && apt-get install --yes --no-install-recommends libgomp1 && rm -rf /var/lib/apt/lists/* \
    && useradd --uid 10001 --no-create-home --home-dir /nonexistent kvasir
COPY --from=build-cpu /opt/kvasir /opt/kvasir
ENV PATH=/opt/kvasir/bin:$PATH PYTHONDONTWRITEBYTECODE=1 KVASIR_CACHE_DIR=/opt/kvasir/kernels KVASIR_HOST=0.0.0.0
USER 10001
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=120s --retries=3 \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["kvasir"]
CMD ["serve"]

FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04 AS cuda
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3 python3-venv python3-dev g++ \
    && rm -rf /var/lib/apt/lists/* && useradd --uid 10001 --create-home kvasir
WORKDIR /src
RUN python3 -m venv /opt/kvasir
ENV PATH=/opt/kvasir/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY . .
RUN pip install .
ENV KVASIR_CACHE_DIR=/var/cache/kvasir TRITON_CACHE_DIR=/var/cache/kvasir/triton KVASIR_HOST=0.0.0.0
RUN mkdir --mode 0700 /var/cache/kvasir && chown 10001 /var/cache/kvasir
USER 10001
VOLUME /var/cache/kvasir
EXPOSE 8000
HEALTHCHECK --interval=5s --timeout=3s --start-period=300s --retries=3 \
    CMD ["python3", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["kvasir"]
CMD ["serve"]

# `docker build .` without --target builds the CPU image
FROM cpu
