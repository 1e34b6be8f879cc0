"""Create the environments of packages that are not the project's own: ``.venvs/ib_async``, ``.venvs/ibapi``, ``.venvs/polars``.

Run by ``make clients`` and ``make bench``, with the names of the wanted ones; standard library only. Each environment is
installed from a lock with hashes and is left alone while that lock is unchanged. The client libraries need environments of
their own: ib_async and ib_insync own the same package ``eventkit``, and the tests want ``ibapi`` as IBKR ships it. polars is
a rival of the benchmarks.

The environment of ib_async also sees the packages of the environment that runs this, behind its own: the tests of the gateway
client run there with ``IB_LIBRARY=ib_async`` (``make test-ib-async``).
"""

from __future__ import annotations

import hashlib
import importlib.util
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCKS = {
    "ib_async": ROOT / "ktrdr_pipelines_tests" / "clients" / "ib_async.lock",
    "ibapi": ROOT / "ktrdr_pipelines_tests" / "clients" / "ibapi.lock",
    "polars": ROOT / "benchmarks" / "polars.lock",
}
SEES_PROJECT = ("ib_async",)
STAMP = "installed.sha256"


def find_python(environment: Path) -> Path:
    """The interpreter of an environment."""
    return environment / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")


def describe_wanted(lock: Path, packages: str) -> str:
    """What an up-to-date environment was made from: the lock's hash, the Python version, the folder of packages behind it."""
    digest = hashlib.sha256(lock.read_bytes()).hexdigest()
    return f"{digest} {sys.version_info.major}.{sys.version_info.minor} {packages}".rstrip() + "\n"


def see_packages(environment: Path, packages: str) -> None:
    """Let ``environment`` see the folder ``packages`` behind its own packages."""
    (own,) = (
        environment.glob("lib/python*/site-packages")
        if sys.platform != "win32"
        else [environment / "Lib/site-packages"]
    )
    (own / "project_packages.pth").write_text(f"import site; site.addsitedir({packages!r})\n")


def install(name: str) -> bool:
    """Create or renew the environment called ``name``. False if it was up to date.

    Raises:
        subprocess.CalledProcessError: the installation failed; what was half made is removed.
    """
    lock, environment = LOCKS[name], ROOT / ".venvs" / name
    packages = sysconfig.get_path("purelib") if name in SEES_PROJECT else ""
    stamp, wanted = environment / STAMP, describe_wanted(lock, packages)
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
        if packages:
            see_packages(environment, packages)
    except BaseException:
        shutil.rmtree(environment, ignore_errors=True)
        raise
    stamp.write_text(wanted)
    return True


def main(names: list[str]) -> int:
    for name in names or LOCKS:
        try:
            made = install(name)
        except subprocess.CalledProcessError as error:
            sys.stderr.write(f"cannot install the environment {name}: the installer ended with {error.returncode}\n")
            return 1
        sys.stdout.write(f"environment {name}: {'installed' if made else 'up to date'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
