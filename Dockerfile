# An image that trains: the environment of uv.lock, the package, its configuration and its launchers, and no root.
#
#   docker build -t opentau_train .
#   docker run --gpus all --ipc=host -v /data:/data:ro -v /runs:/runs -e DATASET_PATH=/data/droid_1.0.1 \
#     -e NPROC_PER_NODE=8 -e RUN_DIR=/runs/a opentau_train launchers/train_droid_policy.sh
#
# torch's wheel on PyPI brings CUDA's libraries: of the base only the driver's hooks are needed, so its tag's number is that
# of the CUDA release which the wheel is built with (uv.lock: nvidia-cuda-runtime).
FROM nvidia/cuda:13.0.1-base-ubuntu24.04

COPY --from=ghcr.io/astral-sh/uv:0.13.9 /uv /usr/local/bin/uv

# g++: torch.compile (trainer.compile=true) builds kernels where it runs. tini reaps what loader workers leave.
RUN apt-get update \
 && apt-get install -y --no-install-recommends ca-certificates g++ tini \
 && rm -rf /var/lib/apt/lists/* \
 && useradd --create-home --uid 10001 trainer \
 && install -d -o trainer -g trainer /opt/opentau_train /runs

USER 10001
WORKDIR /opt/opentau_train

# The Python that the project is tested with, whatever the base has.
ENV UV_PYTHON=3.11 \
    UV_LINK_MODE=copy \
    VIRTUAL_ENV=/opt/opentau_train/.venv \
    PATH=/opt/opentau_train/.venv/bin:$PATH

# Which extras: docker build --build-arg EXTRAS="--extra remote --extra vla"
ARG EXTRAS="--extra remote --extra serve --extra vla --extra diffusion"

# The dependencies are a layer of their own: a change of the code doesn't install them anew.
COPY --chown=10001:10001 pyproject.toml uv.lock setup.py README.md LICENSE ./
RUN uv sync --frozen --no-install-project --no-cache $EXTRAS

COPY --chown=10001:10001 opentau_train opentau_train
COPY --chown=10001:10001 conf conf
COPY --chown=10001:10001 launchers launchers
COPY --chown=10001:10001 docs docs
RUN uv sync --frozen --no-cache $EXTRAS

ENTRYPOINT ["tini", "--"]
CMD ["python", "-m", "opentau_train", "--help"]
