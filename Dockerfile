# This repository with its requirements, for CPU, NVIDIA GPUs (cuda) or TPUs. It needs no network at run time.
#
#   docker build --build-arg=PLATFORM=tpu -t IMAGE .
#   mkdir -p runs && docker run --rm -v "$PWD/runs:/maskdm-jax/runs" --user="$(id -u)" IMAGE --config=configs/demo.py
#   docker run --rm --gpus=all --shm-size=8g -v "$PWD/runs:/maskdm-jax/runs" --user="$(id -u)" IMAGE --config=...
#   docker run --rm --entrypoint=python IMAGE launch/sample.py --help
FROM python:3.11-slim
ARG PLATFORM=cpu
# Folders that any user can write to, and the driver that GKE mounts on nodes with GPUs.
ENV MASKDM_CACHE=/cache/maskdm_jax MPLCONFIGDIR=/cache/matplotlib HOME=/cache LD_LIBRARY_PATH=/usr/local/nvidia/lib64 \
    PIP_NO_CACHE_DIR=1 PIP_ROOT_USER_ACTION=ignore
RUN useradd --uid=1000 --home-dir=/cache maskdm && mkdir -m 1777 /cache
WORKDIR /maskdm-jax
# The requirements come before the code, so that a change of the code does not install them again.
COPY requirements.txt pyproject.toml LICENSE ./
COPY maskdm_jax/__init__.py maskdm_jax/
RUN touch README.md && pip install -r requirements.txt -e ".[$PLATFORM,gcs,s3,parquet,wandb]"
COPY . .
RUN mkdir -m 1777 runs && python -m compileall -q maskdm_jax
USER 1000
ENTRYPOINT ["python", "launch/train.py"]
