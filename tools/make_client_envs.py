"""Create the environments of the client libraries that the simulator is proven with: ``.venvs/ib_async``, ``.venvs/ibapi``.

Run by ``make clients``; standard library only. Each environment is installed from a lock with hashes beside the client
scripts and is left alone while that lock is unchanged. Both libraries need environments of their own: ib_async and
ib_insync own the same package ``eventkit``, and the tests want ``ibapi`` as IBKR ships it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = ROOT / "ktrdr_pipelines_tests" / "clients"
CLIENTS = ("ib_async", "ibapi")
STAMP = "installed.sha256"


def find_python(environment: Path) -> Path:
    """The interpreter of an environment."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def describe_wanted(lock: Path) -> str:
    """What an up-to-date environment was made from: the lock's hash and the Python version."""
    return f"{hashlib.sha256(lock.read_bytes()).hexdigest()} {sys.version_info.major}.{sys.version_info.minor}\n"


def install_client(name: str) -> bool:
    """Create or renew the environment called ``name``. False if it was up to date.

    Raises:
        subprocess.CalledProcessError: the installation failed; what was half made is removed.
    """
    lock, environment = LOCKS / f"{name}.lock", ROOT / ".venvs" / name
    stamp, wanted = environment / STAMP, describe_wanted(lock)
    if stamp.exists() and stamp.read_text() == wanted and find_python(environment).exists():
        return False
    shutil.rmtree(environment, ignore_errors=True)
    try:
        if importlib.util.find_spec("uv") is not None:
            venv.create(environment, with_pip=False)
            installer = [
                sys.executable,
                "-m",
                "uv",
                "pip",
                "install",
                "--quiet",
                "--python",
                str(find_python(environment)),
            ]
        else:
            venv.create(environment, with_pip=True)
            installer = [
                str(find_python(environment)),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
            ]
        subprocess.run([*installer, "--require-hashes", "-r", str(lock)], check=True)
    except BaseException:
        shutil.rmtree(environment, ignore_errors=True)
        raise
    stamp.write_text(wanted)
    return True


def main() -> int:
    for name in CLIENTS:
        try:
            made = install_client(name)
        except subprocess.CalledProcessError as error:
            sys.stderr.write(f"cannot install the client {name}: the installer ended with {error.returncode}\n")
            return 1
        sys.stdout.write(f"client {name}: {'installed' if made else 'up to date'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
