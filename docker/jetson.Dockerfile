# The device half on a Jetson Orin with JetPack 6.1 or 6.2: installs bundles, builds their engines, proves them and switches.
# Never built and never run by this project: no container engine and no Jetson were at hand. See docs/tensorrt.md.
#
#   deploykit export resnet50 --to tensorrt --int8 --calibrate photos/ --target orin-nano    # on the host: runs/resnet50/device.pyz
#   docker build --file docker/jetson.Dockerfile --tag deploykit-jetson runs/resnet50         # on the device, or for linux/arm64
#   docker run --rm --runtime nvidia --volume "$PWD":/workspace --volume /opt/deploykit:/opt/deploykit deploykit-jetson probe
#
# The context is the folder of a run, for the device half is in it. NVIDIA's image is L4T 36 with CUDA 12.6, TensorRT 10.3 and
# Python 3.10; on JetPack 7.2 use the image of docker/tensorrt.Dockerfile for arm64.
ARG L4T_TENSORRT_TAG=r10.3.0-runtime
FROM nvcr.io/nvidia/l4t-tensorrt:${L4T_TENSORRT_TAG}

# numpy below 2: TensorRT 10.3's Python package was made for 1.x. ssh-keygen checks signatures of bundles.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends python3-pip openssh-client \
    && rm -rf /var/lib/apt/lists/* \
    && python3 -m pip install --no-cache-dir "numpy>=1.26,<2"
COPY device.pyz /usr/local/lib/deploykit/device.pyz

WORKDIR /workspace
ENTRYPOINT ["python3", "/usr/local/lib/deploykit/device.pyz"]
CMD ["probe"]
