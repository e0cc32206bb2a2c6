# On a CPU: fine-tunes, exports, quantizes, builds for ONNX Runtime and OpenVINO, proves and measures.
# Never built and never run by this project: no container engine was at hand.
#
#   docker build --file docker/host.Dockerfile --tag deploykit .
#   docker run --rm --user "$(id -u):$(id -g)" --volume "$PWD":/workspace deploykit run lenet_digits
#
# Weights that are downloaded go into /workspace/.cache, so that the next container finds them.
ARG PYTHON_TAG=3.12-slim-bookworm
FROM python:${PYTHON_TAG}

# ssh for `deploykit deploy`, ssh-keygen for signatures, emulators of other CPUs for `deploykit parity --isa`.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends openssh-client qemu-user \
    && rm -rf /var/lib/apt/lists/*
# PyTorch for CPUs alone is a tenth of the download.
RUN python3 -m pip install --no-cache-dir torch torchvision --index-url https://download.pytorch.org/whl/cpu
COPY pyproject.toml README.md LICENSE /opt/deploykit/
COPY deploykit /opt/deploykit/deploykit
COPY recipes /opt/deploykit/recipes
RUN python3 -m pip install --no-cache-dir "/opt/deploykit[cpu,openvino,timm,demo]"

# Whoever runs it: a home that every user may write, which is the folder that is mounted.
ENV HOME=/workspace XDG_CACHE_HOME=/workspace/.cache TORCH_HOME=/workspace/.cache/torch
RUN useradd --no-create-home --home-dir /workspace deploykit \
    && install -d -o deploykit -g deploykit /workspace
USER deploykit
WORKDIR /workspace
ENTRYPOINT ["deploykit"]
CMD ["doctor"]
