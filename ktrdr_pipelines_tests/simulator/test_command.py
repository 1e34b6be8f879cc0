"""``ktrdr simulator``: prints one line, serves, ends cleanly, and reports each invalid option in one line."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import sys

import pytest
from click.testing import CliRunner

from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines.simulator.command import make_clock, simulator_command
from ktrdr_pipelines.simulator.wire import encode, frame

from .talk import history

RUN = "from ktrdr_pipelines.simulator.command import simulator_command; simulator_command()"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_command_serves_until_a_signal(tmp_path, number):
    """It prints where it listens, serves and logs, and ends with code 0 on Ctrl-C or SIGTERM."""
    log = tmp_path / "log.jsonl"
    command = [sys.executable, "-c", RUN, "--port", "0", "--log", str(log), "--now", "2024-03-05T19:40:30Z", "--freeze"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            line = process.stdout.readline()
            found = re.fullmatch(
                r"simulated gateway listening on 127\.0\.0\.1:(\d+), synthetic bars of .*SIM0000001\n", line
            )
            assert found, line
            with socket.create_connection(("127.0.0.1", int(found.group(1))), timeout=5) as client:
                client.sendall(b"API\0" + frame(b"v157..176") + encode(71, 2, 1, "") + encode(*history(1, end="")))
                received = b""
                while b"17\x001\x0020240305 09:30:00 America/New_York\x0020240305 14:40:30" not in received:
                    data = client.recv(1 << 16)
                    assert data, received
                    received += data
                process.send_signal(number)
                assert process.wait(timeout=10) == 0
            assert process.stderr.read() == ""
        finally:
            process.kill()
    (record,) = [json.loads(text) for text in log.read_text().splitlines()]
    assert (record["kind"], record["symbol"], record["outcome"]) == ("history", "AAPL", "bars")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        (["--replay", "no/such/folder"], "no/such/folder"),
        (["--faults", "no-such-file"], "no-such-file"),
        (["--log", "no/such/folder/log"], "no/such/folder/log"),
        (["--now", "yesterday"], "yesterday"),
        (["--freeze"], "--now"),
        (["--zone", "Mars/Olympus"], "Mars/Olympus"),
        (["--host", "256.0.0.1"], "256.0.0.1"),
        (["--host", ""], "--host"),
        (["--latency", "nan"], "--latency"),
    ],
)
def test_invalid_options_are_one_line_and_code_2(options, named):
    """The error names the invalid value in one line and has the exit code of invalid input; nothing is started."""
    result = CliRunner().invoke(simulator_command, ["--port", "0", *options])
    assert isinstance(result.exception, InputError)
    assert result.exception.exit_code == 2
    assert named in str(result.exception)
    assert len(str(result.exception).splitlines()) == 1
    assert result.output == ""


def test_help_is_quick():
    """Showing the help imports neither numpy nor pandas."""
    code = (
        "import sys; from click.testing import CliRunner; from ktrdr_pipelines.simulator.command import simulator_command;"
        "r = CliRunner().invoke(simulator_command, ['--help']); assert 'Ctrl-C' in r.output, r.output;"
        "print(*sorted({'numpy', 'pandas', 'asyncio'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_clock_starts_at_the_given_instant():
    """With ``freeze`` it stands still, otherwise it runs; a bare date is midnight UTC."""
    assert make_clock("2024-03-05", freeze=True)() == 1709596800.0
    running = make_clock("2024-03-05T00:00:00+00:00", freeze=False)
    assert 1709596800.0 <= running() < running() + 1e-9 < 1709596860.0
