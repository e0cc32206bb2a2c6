"""A 64-bit ARM Python with ONNX Runtime in a folder, for `deploykit parity --isa cortex-a76 --arm-root DIR`.

usage: python benchmarks/arm64_root.py DIR

Wants the Debian packages mmdebstrap and qemu-user, and root for the first minute; afterwards anybody can use it. Nothing is
installed on this machine and nothing in the folder is executed while it is made: packages are unpacked, not configured
(a second stage would need binfmt_misc), and wheels are those of PyPI for ARM, in this machine's versions. About 10 seconds
and 210 MB.

qemu-user 7.2 looks for files below DIR first, so what it gets for /proc/cpuinfo can be chosen. It has to be: the library by
which ONNX Runtime learns what the CPU can do dies when it reads an x86 one there. The CPU part in it is that of a
Cortex-A78AE, which the library does not know better than the kernel's HWCAP, that is, than `-cpu`; from the part of a
Cortex-A76 it would conclude that there is a dot product, and die under `-cpu cortex-a72`, which has none.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from deploykit.machine import installed_version

SUITE, PYTHON = "bookworm", "3.11"
DEBIAN = (f"python{PYTHON}", f"libpython{PYTHON}-stdlib", "libstdc++6", "libgomp1")
WHEELS = ("onnxruntime", "numpy")
PLATFORMS = ("manylinux_2_28", "manylinux_2_27", "manylinux_2_26", "manylinux_2_17", "manylinux2014")
CPU_INFO = {
    "BogoMIPS": "62.50",
    "Features": "fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp",
    "CPU implementer": "0x41",
    "CPU architecture": "8",
    "CPU variant": "0x0",
    "CPU part": "0xd42",
    "CPU revision": "1",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    root = parser.parse_args().root
    if root.exists():
        sys.exit(f"{root} exists: choose another folder, or remove it")
    unpack = ["mmdebstrap", "--quiet", "--mode=root", "--arch=arm64", "--variant=extract", f"--include={','.join(DEBIAN)}"]
    subprocess.run([*unpack, '--aptopt=APT::Install-Recommends "false"', SUITE, str(root)], check=True)
    wheels = [f"{name}=={installed_version(name)}" for name in WHEELS]
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--target", str(root / "opt" / "site"), "--only-binary=:all:"]
    pip += ["--python-version", PYTHON, "--implementation", "cp"]
    pip += [word for abi in (f"cp{PYTHON.replace('.', '')}", "abi3", "none") for word in ("--abi", abi)]
    pip += [word for platform in PLATFORMS for word in ("--platform", f"{platform}_aarch64")]
    subprocess.run([*pip, *wheels], check=True)
    cores = [{"processor": str(number), **CPU_INFO} for number in range(2)]
    text = "\n\n".join("\n".join(f"{key}\t: {value}" for key, value in core.items()) for core in cores)
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc" / "cpuinfo").write_text(text + "\n\n")
    print(f"made {root} with {', '.join(wheels)}")


if __name__ == "__main__":
    main()
