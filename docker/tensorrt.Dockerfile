# For a data-centre or desktop GPU: exports networks, builds TensorRT engines, proves and measures them.
# Never built and never run by this project: no container engine and no GPU were at hand. See docs/tensorrt.md.
#
#   docker build --file docker/tensorrt.Dockerfile --tag deploykit-tensorrt .
#   docker run --rm --gpus all --volume "$PWD":/workspace deploykit-tensorrt doctor
#
# NVIDIA's image brings CUDA, TensorRT, its Python package and trtexec; 25.05 has TensorRT 10.10 and Python 3.12.
ARG TENSORRT_TAG=25.05-py3
FROM nvcr.io/nvidia/tensorrt:${TENSORRT_TAG}

# The site packages of the system hold NVIDIA's `tensorrt`: no other one is installed from the package index.
RUN python3 -m pip install --no-cache-dir --upgrade pip
COPY pyproject.toml README.md LICENSE /opt/deploykit/
COPY deploykit /opt/deploykit/deploykit
COPY recipes /opt/deploykit/recipes
RUN python3 -m pip install --no-cache-dir "/opt/deploykit[cpu]"

WORKDIR /workspace
ENTRYPOINT ["deploykit"]
CMD ["doctor"]
