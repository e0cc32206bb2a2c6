"""1 GiB of blobs to a device, sent, hashed and on its disk, against scp of the same bytes over the same sshd.

usage: nice -n -5 python benchmarks/transfer.py [--mib 1024] [--rounds 5] [--output DIR]

Both go over loopback to one sshd with OpenSSH's own choice of cipher, in random order, each into an empty folder. scp neither
hashes nor syncs; ours does both, so what is compared is more work with less. Wants a quiet machine: the two ends share its cores.
"""

from __future__ import annotations

import argparse
import importlib
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import monotonic

from _results import write

from deploykit import bundle, deploy
from deploykit.artifact import digest_file
from deploykit.bundle import Blob, Manifest, device_half
from deploykit.deploy import How
from deploykit.device import Device
from deploykit.progress import silent
from deploykit.remote import connect

TESTS = Path(__file__).parents[1] / "tests"
BLOBS = 8


def bundle_of(folder: Path, mib: int) -> Path:
    """A bundle, as a folder, of a device half and random bytes that nothing compresses."""
    (folder / bundle.BLOBS).mkdir(parents=True)
    half = folder / "half"
    half.write_bytes(device_half.zipapp())
    files = {bundle.DEVICE_HALF: half}
    for number in range(BLOBS):
        files[f"timing-caches/{number}"] = folder / f"{number}"
        with files[f"timing-caches/{number}"].open("wb") as file:
            for _ in range(mib // BLOBS):
                file.write(os.urandom(1 << 20))
    blobs = {name: Blob(digest_file(path), path.stat().st_size) for name, path in files.items()}
    for name, path in files.items():
        path.rename(folder / blobs[name].entry)
    portable = {bundle.DEVICE_HALF: blobs.pop(bundle.DEVICE_HALF)}
    (folder / bundle.MANIFEST).write_bytes(bundle.dump(Manifest("transfer", 1, (), portable, blobs)))
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mib", type=int, default=1024)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    asked = parser.parse_args()
    sys.path.insert(0, str(TESTS))
    sshd = importlib.import_module("sshd").sshd

    with tempfile.TemporaryDirectory() as scratch, sshd(Path(scratch, "sshd")) as server:
        path, root, copied = bundle_of(Path(scratch, "bundle"), asked.mib), Path(scratch, "device"), Path(scratch, "copied")
        big = [file for file in sorted((path / bundle.BLOBS).iterdir()) if file.stat().st_size >= 1 << 20]
        total = sum(file.stat().st_size for file in big)

        def ours() -> float:
            connection = connect(server.address, ssh_config=server.config)
            with bundle.opened(path) as opened:
                half = b"".join(bundle.pieces(opened, opened.manifest.portable[bundle.DEVICE_HALF]))
                device = Device(connection, str(root), python=sys.executable)
                device.bootstrap(
                    opened.manifest.id, opened.content, None, half, opened.manifest.portable[bundle.DEVICE_HALF].sha256
                )
                count = deploy._Count()
                steps = deploy._Steps(opened, device, How(root=str(root)), count, silent, None)
                began = monotonic()
                steps._bring()
                seconds = monotonic() - began
                assert count.sent_bytes == total
            connection.close()
            return seconds

        def scp() -> float:
            copied.mkdir()
            where = f"{server.address.removeprefix('ssh://').rpartition(':')[0]}:{copied}"
            words = ["scp", "-q", "-F", str(server.config), "-P", str(server.port), *map(str, big), where]
            began = monotonic()
            subprocess.run(words, check=True)
            return monotonic() - began

        seconds: dict[str, list[float]] = {"ours": [], "scp": []}
        order = random.Random(0)
        for number in range(asked.rounds + 1):  # the first one only fills caches
            for name, run in order.sample([("ours", ours), ("scp", scp)], 2):
                shutil.rmtree(root, ignore_errors=True)
                shutil.rmtree(copied, ignore_errors=True)
                os.sync()
                took = run()
                if number:
                    seconds[name].append(took)
        speed = {name: total / statistics.median(times) / 1e6 for name, times in seconds.items()}
        print({name: f"{value:.0f} MB/s" for name, value in speed.items()}, f"{speed['ours'] / speed['scp']:.1%} of scp")
        write("transfer", {"bytes": total, "seconds": seconds, "share_of_scp": speed["ours"] / speed["scp"]}, asked.output)


if __name__ == "__main__":
    main()
