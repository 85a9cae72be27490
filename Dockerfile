# One image for workers and Flower.
#
#   CPU only:         docker build --build-arg TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu -t penstock:cpu .
#   NVIDIA GPUs:      docker build -t penstock:cuda .
#
# Any index of https://pytorch.org/get-started/locally/ will do, such as .../whl/cu130 for one CUDA version.

FROM python:3.11-slim-trixie AS build
# What the embedding engine has in C is compiled here, and goes into the wheel.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev
WORKDIR /source
COPY pyproject.toml hatch_build.py README.md LICENSE ./
COPY producer producer
COPY workers workers
RUN pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-trixie

# A process uses one thread, as `penstock up` sets it, and many processes share a machine. Only what is read
# before torch can be told is set here; `pools.cpu.threads` then decides.
ENV PYTHONUNBUFFERED=1 \
    PYTHONSAFEPATH=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PIP_ROOT_USER_ACTION=ignore \
    OMP_NUM_THREADS=1 \
    RAYON_NUM_THREADS=1 \
    TOKENIZERS_PARALLELISM=false \
    HOME=/tmp \
    HF_HOME=/var/lib/penstock/models \
    TRITON_CACHE_DIR=/var/lib/penstock/models/triton

# The model folder belongs to the user, and a named volume takes that over. It is no VOLUME: that would give
# each Flower, and each one-off command, a writable volume of its own that nobody removes.
RUN groupadd --gid 10001 penstock \
    && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /tmp --shell /usr/sbin/nologin penstock \
    && install --directory --owner=10001 --group=10001 /var/lib/penstock/models

COPY constraints.txt /etc/penstock/constraints.txt

# torch first, in a layer of its own: by far the largest, and the same for every version of our code.
# Of equal versions pip takes the one with a local part, so `2.13.0+cpu` of the index wins over PyPI's `2.13.0`.
ARG TORCH_INDEX_URL=
RUN pip install --no-cache-dir --constraint /etc/penstock/constraints.txt \
    ${TORCH_INDEX_URL:+--extra-index-url "${TORCH_INDEX_URL}"} torch

# Triton, which comes with torch for GPUs, has a C compiler build what starts each kernel, at the first load.
RUN if python -c "import triton" 2>/dev/null; then \
    apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*; fi

RUN --mount=type=bind,from=build,source=/wheels,target=/wheels \
    pip install --no-cache-dir --constraint /etc/penstock/constraints.txt "$(echo /wheels/*.whl)[workers,remote,flower]"

# Process 1: passes signals on, and reaps what nobody waits for. `-s`, where the container has one already.
RUN apt-get update && apt-get install --yes --no-install-recommends tini && rm -rf /var/lib/apt/lists/*

USER 10001:10001
WORKDIR /tmp
ENTRYPOINT ["tini", "-s", "--", "penstock"]
CMD ["--help"]
