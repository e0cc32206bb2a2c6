#!/bin/sh
# Makes this container's own host keys, shows them, and serves.
set -eu
ssh-keygen -A
for key in /etc/ssh/ssh_host_*_key.pub; do ssh-keygen -l -f "$key"; done
exec /usr/sbin/sshd -D -e
