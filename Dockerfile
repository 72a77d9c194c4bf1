# The image of every node of a GPU cluster: CUDA at run time, Slipway, and what Ray's cluster launcher needs on a node
# (an ssh server and rsync). Build it from the top of the repository:
#
#   docker build -t slipway .
#
# torch's wheels bring CUDA's libraries; g++ and Python's headers are for Triton, which compiles its launchers on the
# node. Without nvcc DeepSpeed builds no CUDA op of its own, and Slipway needs none.
FROM nvidia/cuda:12.8.1-runtime-ubuntu24.04

ENV DEBIAN_FRONTEND=noninteractive \
    PYTHONUNBUFFERED=1 \
    PIP_NO_CACHE_DIR=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    HF_HUB_DISABLE_TELEMETRY=1

RUN apt-get update \
 && apt-get install -y --no-install-recommends \
      ca-certificates g++ git libibverbs1 librdmacm1 openssh-client openssh-server python3 python3-dev python3-venv rsync \
 && rm -rf /var/lib/apt/lists/* \
 && mkdir -p /run/sshd

# On PATH for login shells too: `ray submit` runs the job in one.
RUN python3 -m venv /opt/slipway \
 && echo 'PATH=/opt/slipway/bin:$PATH' > /etc/profile.d/slipway.sh
ENV PATH=/opt/slipway/bin:$PATH

WORKDIR /src
# The dependencies first: a layer of many GB that a change of ours must not rebuild.
COPY pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY launcher/__init__.py launcher/
COPY kernels/launcher_kernels/__init__.py kernels/launcher_kernels/
RUN mkdir recipes && pip install -c constraints.txt . && pip uninstall -y slipway
COPY . .
RUN pip install --no-deps .

WORKDIR /workspace
CMD ["slipway", "--help"]
