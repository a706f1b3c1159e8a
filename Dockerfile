# CUDA 12.8 with TransformerEngine and flash-attn. It has not been built yet: the versions are those
# that are published to work together, nobody has run this image.
#   docker build -t megatron-vl . && docker run --gpus all --shm-size 16g -it megatron-vl
FROM nvidia/cuda:12.8.1-cudnn-devel-ubuntu24.04

RUN apt-get update \
    && apt-get install -y --no-install-recommends git python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m venv /opt/venv
ENV PATH=/opt/venv/bin:$PATH PIP_NO_CACHE_DIR=1

# Both build against the torch that is there; MAX_JOBS bounds the compiler's memory.
RUN pip install torch==2.8.0 setuptools wheel ninja packaging pybind11 \
    && MAX_JOBS=8 NVTE_FRAMEWORK=pytorch pip install --no-build-isolation \
       "transformer-engine[pytorch]==2.11.0" flash-attn==2.8.3

WORKDIR /opt/megatron-vl
COPY setup.py README.md ./
COPY megatron_vl megatron_vl
RUN pip install megatron-core==0.16.1 -e ".[test]"
COPY . .
