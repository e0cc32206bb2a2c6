# A stand-in for a device: sshd, Python, numpy and ONNX Runtime, and a folder for releases. Not a Jetson: no GPU, no TensorRT.
#
#   docker build --file docker/device.Dockerfile --tag deploykit-device docker
#   docker run --rm --publish 127.0.0.1:2222:22 --volume "$HOME/.ssh/id_ed25519.pub:/home/me/.ssh/authorized_keys:ro" deploykit-device
#   ssh -p 2222 me@127.0.0.1 true                       # shows the new host key and asks; then:
#   deploykit deploy my-net-7.bundle ssh://me@127.0.0.1:2222
FROM debian:bookworm-slim

RUN apt-get update \
 && DEBIAN_FRONTEND=noninteractive apt-get install --yes --no-install-recommends \
        openssh-server openssh-client python3 python3-pip \
 && rm -rf /var/lib/apt/lists/*
# JetPack 6's numpy; Debian's Python refuses packages that are not Debian's unless it is told that this is meant.
RUN python3 -m pip install --no-cache-dir --break-system-packages "numpy<2.3" "onnxruntime>=1.23"

# Host keys are made when a container starts: those of an image would be everybody's.
RUN rm -f /etc/ssh/ssh_host_* \
 && mkdir -p /run/sshd \
 && useradd --create-home --shell /bin/sh me \
 && install -d -o me -g me -m 700 /home/me/.ssh \
 && install -d -o me -g me /opt/deploykit
COPY sshd_device.conf /etc/ssh/sshd_config.d/device.conf
COPY --chmod=755 start_device.sh /usr/local/bin/start-device

EXPOSE 22
ENTRYPOINT ["/usr/local/bin/start-device"]
