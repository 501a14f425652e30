# syntax=docker/dockerfile:1

# docker build -t palimpsest .
# docker build -t palimpsest:cuda --build-arg TORCH_INDEX=https://download.pytorch.org/whl/cu128 \
#     --build-arg EXTRAS=gpu .
ARG PYTHON_VERSION=3.11

FROM python:${PYTHON_VERSION}-slim AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
ARG EXTRAS=""
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
RUN python -m venv /opt/palimpsest
ENV PATH=/opt/palimpsest/bin:$PATH
WORKDIR /src

# torch first, from its own index: a layer of its own that outlives changes to our code.
COPY pyproject.toml ./
RUN sed -n 's/^ *"\(torch[<>=].*\)",.*/\1/p' pyproject.toml > torch.txt \
    && pip install --index-url "$TORCH_INDEX" --requirement torch.txt

COPY LICENSE README.md ./
COPY app app
# hadolint ignore=DL3013
RUN pip install ".${EXTRAS:+[$EXTRAS]}"

FROM python:${PYTHON_VERSION}-slim
LABEL org.opencontainers.image.title="Palimpsest" \
      org.opencontainers.image.description="A REST service that hosts one live, editable language model" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --gid 10001 palimpsest \
    && useradd --uid 10001 --gid 10001 --create-home palimpsest \
    && install --directory --owner=palimpsest --group=palimpsest /data
COPY --from=build /opt/palimpsest /opt/palimpsest
ENV PATH=/opt/palimpsest/bin:$PATH \
    PYTHONUNBUFFERED=1 \
    PALIMPSEST_HOST=0.0.0.0 \
    PALIMPSEST_PORT=8000 \
    XDG_DATA_HOME=/data \
    HF_HOME=/data/huggingface
USER 10001:10001
WORKDIR /home/palimpsest
VOLUME /data
EXPOSE 8000
HEALTHCHECK --interval=10s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-c", "import os, urllib.request as r; r.urlopen(f'http://127.0.0.1:{os.environ[\"PALIMPSEST_PORT\"]}/livez', timeout=4)"]
ENTRYPOINT ["palimpsest"]
CMD ["serve"]
