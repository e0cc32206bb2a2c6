"""Commands that carry a finished run to a device: pack and verify."""

from __future__ import annotations

import json
from pathlib import Path

import click

from deploykit.cli.options import json_option
from deploykit.errors import printable


@click.command("pack")
@click.argument("run", type=click.Path(path_type=Path))
@click.option("--release", type=click.IntRange(0, 2**53 - 1), required=True, help="Number that orders the releases of a network.")
@click.option("--output", type=click.Path(path_type=Path), help="The bundle's file.  [default: NAME-RELEASE.bundle]")
@click.option("--sign", "key", type=click.Path(path_type=Path), help="Sign with this OpenSSH key (ssh-keygen -Y sign).")
@click.option(
    "--timing-cache",
    "caches",
    multiple=True,
    type=click.Path(path_type=Path),
    help="A timing cache to take along; not part of the id.",
)
@click.option("--failed-gates", is_flag=True, help="Pack a run whose gates failed or cannot be decided; the bundle keeps that.")
@click.option("--folder", "as_folder", is_flag=True, help="Write a folder instead of one file.")
@json_option
def pack_command(
    run: Path, release: int, output: Path | None, key: Path | None, caches: tuple[Path, ...], as_json: bool, **words: bool
) -> None:
    """Pack a finished run into one file for devices.

    RUN is the output folder of a run. The same run gives the same identity, whenever and as whatever release it is packed.
    """
    from deploykit.bundle import pack

    to = Path(f"{run.absolute().name}-{release}{pack.SUFFIX}") if output is None else output
    packed = pack.pack(run, to, release=release, key=key, timing_caches=caches, **words)
    manifest = packed.manifest
    facts = {
        "path": printable(packed.path),
        "id": manifest.id,
        "name": manifest.name,
        "release": manifest.release,
        "verdict": manifest.verdict,
        "models": list(manifest.models),
        "bytes": packed.size,
        "files": len(manifest.files),
        "signed": packed.is_signed,
    }
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        signed = "signed" if packed.is_signed else "not signed"
        said = f"{packed.size / 1e6:.2f} MB, {_gates(manifest.verdict)}, {signed}"
        click.echo(f"{facts['path']}: {manifest.name} release {release}, {said}\nid {manifest.id}")


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--signers", type=click.Path(path_type=Path), help="Allowed signers (ssh-keygen's file); without it nobody is asked for."
)
@json_option
def verify_command(bundle: Path, signers: Path | None, as_json: bool) -> int:
    """Check every file of a bundle, and who signed it.

    Names files that are extra, missing and changed apart; exit code 1 when there are any.
    """
    from deploykit import bundle as bundles

    found = bundles.check(bundle, signers=signers)
    code = 0 if found.is_whole else 1
    if as_json:
        click.echo(json.dumps({**bundles.described(found), "exit_code": code}, indent=1))
        return code
    for kind, names in (("extra", found.extra), ("missing", found.missing), ("changed", found.changed)):
        for name in names:
            click.echo(f"{kind}: {printable(name)}")
    manifest = found.manifest
    said = f"signed by {printable(found.signer)}" if found.signer else "whether it is signed was not asked for (--signers)"
    verdict = "every file as packed" if found.is_whole else "not as packed"
    said = f"{verdict}; {_gates(manifest.verdict)}; {said}"
    click.echo(f"{printable(bundle)}: {manifest.name} release {manifest.release}, {said}\nid {manifest.id}")
    return code


def _gates(verdict: str) -> str:
    return f"its gates said: {verdict}" if verdict else "its run had no gates"
