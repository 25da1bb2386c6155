# What a GPU job runs in: CUDA 13.0, which torch 2.13.0's default build is made for; nvcc compiles DeepSpeed's own kernels.
#
#     docker build -t cprec .
#     enroot import -o cprec.sqsh dockerd://cprec          # for Pyxis: CONTAINER=$PWD/cprec.sqsh in launch/slurm/site.sh
#
# Holds the dependencies only: the repository is mounted, so that what is run is what you see.
FROM nvidia/cuda:13.0.2-devel-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends \
        git g++ ninja-build numactl pdsh openssh-client openmpi-bin libopenmpi-dev \
        python3 python3-dev python3-venv python-is-python3 \
    && rm -rf /var/lib/apt/lists/*
ENV VIRTUAL_ENV=/opt/cprec PATH=/opt/cprec/bin:$PATH
COPY setup.cfg pyproject.toml constraints.txt README.md LICENSE /src/
RUN python3 -m venv $VIRTUAL_ENV \
    && pip install --no-cache-dir torch==2.13.0 \
    && mkdir /src/cprec /src/data_prep && touch /src/cprec/__init__.py /src/data_prep/__init__.py \
    && pip install --no-cache-dir --prefer-binary --constraint /src/constraints.txt '/src[mpi,gguf,lora]' \
    && pip uninstall --yes cprec
ENV PYTHONPATH=.
WORKDIR /workspace
