"""A throw-away PostgreSQL cluster for tests that carry the marker `postgres`; it listens on a socket file only."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ktrdr_pipelines_tests.ib.pacing.ledger_tools import poll


@contextmanager
def throw_away_cluster(*databases: str) -> Iterator[Path]:
    """Run a cluster with the superuser `ktrdr` and ``databases`` besides `postgres`; yields the folder of its socket."""
    # Debian keeps a server's programs out of PATH.
    places = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    initdb = shutil.which("initdb") or (str(places[-1]) if places else None)
    assert initdb, "this test needs PostgreSQL's programs (initdb, postgres): install postgresql 15 or newer"
    programs = Path(initdb).resolve().parent
    # Not below tmp_path: a socket's path has to be short, and readable for the user the server runs as.
    base = Path(tempfile.mkdtemp(prefix="pg"))
    user = {}
    if os.geteuid() == 0:  # the server refuses to run as root
        account = pwd.getpwnam("nobody")
        os.chown(base, account.pw_uid, account.pw_gid)
        user = {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    subprocess.run(
        [programs / "initdb", "-D", base / "data", "-U", "ktrdr", "-A", "trust", "--no-sync", "-E", "UTF8"],
        check=True, stdout=subprocess.DEVNULL, cwd=base, **user,
    )  # fmt: skip
    server = subprocess.Popen(
        [programs / "postgres", "-D", base / "data", "-k", base, "-c", "listen_addresses=", "-F"],
        cwd=base, stderr=subprocess.DEVNULL, **user,
    )  # fmt: skip
    try:
        where = ["-h", base, "-U", "ktrdr"]
        ready = [programs / "pg_isready", "-q", *where, "-d", "postgres"]
        poll(lambda: subprocess.run(ready, check=False).returncode == 0)
        for database in databases:
            subprocess.run([programs / "createdb", *where, database], check=True)
        yield base
    finally:
        server.send_signal(signal.SIGINT)  # end now, not when the last client has gone
        server.wait(20)
        shutil.rmtree(base, ignore_errors=True)
