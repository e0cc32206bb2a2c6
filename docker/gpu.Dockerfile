# For an NVIDIA GPU without TensorRT: fine-tunes on CUDA, and has the build of ONNX Runtime with the CUDA provider.
# Never built and never run by this project: no container engine was at hand.
#
#   docker build --file docker/gpu.Dockerfile --tag deploykit-gpu .
#   docker run --rm --gpus all --user "$(id -u):$(id -g)" --volume "$PWD":/workspace deploykit-gpu doctor
#
# PyTorch from the package index brings the CUDA libraries that it loads; the driver comes from the host (nvidia-container-toolkit).
# With TensorRT: tensorrt.Dockerfile.
ARG PYTHON_TAG=3.12-slim-bookworm
FROM python:${PYTHON_TAG}

# ssh for `deploykit deploy`, ssh-keygen for signatures.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client \
    && rm -rf /var/lib/apt/lists/*
COPY pyproject.toml README.md LICENSE /opt/deploykit/
COPY deploykit /opt/deploykit/deploykit
COPY recipes /opt/deploykit/recipes
# Never together with the extra `cpu`: onnxruntime and onnxruntime-gpu overwrite each other's files.
RUN python3 -m pip install --no-cache-dir "/opt/deploykit[gpu,timm,demo]"

# Whoever runs it: a home that every user may write, which is the folder that is mounted.
ENV HOME=/workspace XDG_CACHE_HOME=/workspace/.cache TORCH_HOME=/workspace/.cache/torch
ENV NVIDIA_VISIBLE_DEVICES=all NVIDIA_DRIVER_CAPABILITIES=compute,utility
RUN useradd --no-create-home --home-dir /workspace deploykit \
    && install -d -o deploykit -g deploykit /workspace
USER deploykit
WORKDIR /workspace
ENTRYPOINT ["deploykit"]
CMD ["doctor"]
