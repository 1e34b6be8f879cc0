"""Typed settings. The only reader of the environment and of `.env`; all other modules receive values.

Names: `IB_…` for the gateway, `KTRDR_…` for the rest. The environment wins over `.env` in the current directory, and that over
the project's own `.env`. A test checks that README lists every setting. IB's pacing rules are not settings.
"""

from __future__ import annotations

import json
import os
import re
import socket
import threading
from contextlib import suppress
from datetime import date
from functools import cache
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AliasChoices, Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, NoDecode, SettingsConfigDict

from ktrdr_pipelines.domain.timeframes import TIMEFRAMES, HistoryLimits, parse_timeframe
from ktrdr_pipelines.errors import InputError

PROJECT_ROOT = Path(__file__).resolve().parents[1]

DEFAULT_PARTITION_STARTS: dict[str, date] = {
    # IB serves bars of 30 s and less for six months only (docs/ib_facts.md, 5); the others as far back as is usual.
    **{name: date(2024, 1, 1) for name, t in TIMEFRAMES.items() if t.seconds <= 30},
    **{name: date(2004, 1, 1) for name, t in TIMEFRAMES.items() if 30 < t.seconds < 86400},
    **{name: date(1980, 1, 1) for name, t in TIMEFRAMES.items() if t.seconds >= 86400},
}


def _field(name: str, default: object, description: str, **bounds: object) -> object:
    return Field(default=default, validation_alias=AliasChoices(name), description=description, **bounds)  # type: ignore[call-overload]


_CONTAINER_MARKS = (Path("/.dockerenv"), Path("/run/.containerenv"))
HOST_OF_CONTAINER = "host.docker.internal"
_LOOK_UP_S = 1.0
_SECRETS = ("KTRDR_API_TOKEN", "KTRDR_LEDGER_URL")
"""Settings whose values are never shown."""


def default_host(in_container: bool | None) -> str:
    """The default of IB_HOST: this machine, in a container the container's host if its name is known.

    The gateway usually runs on the user's desktop, outside the container.
    """
    if in_container is None:
        in_container = any(mark.exists() for mark in _CONTAINER_MARKS)
    return HOST_OF_CONTAINER if in_container and _is_known(HOST_OF_CONTAINER) else "127.0.0.1"


@cache
def _is_known(host: str) -> bool:
    """Whether ``host`` resolves within `_LOOK_UP_S`; a network without name service takes long to fail."""
    found: list[object] = []

    def look_up() -> None:
        with suppress(OSError):
            found.extend(socket.getaddrinfo(host, None))

    thread = threading.Thread(target=look_up, daemon=True, name="look-up")
    thread.start()
    thread.join(_LOOK_UP_S)
    return bool(found)


class Settings(BaseSettings):
    """All settings with their environment names, defaults and meanings. Build with `load_settings`."""

    model_config = SettingsConfigDict(
        env_file=(PROJECT_ROOT / ".env", ".env"), extra="ignore", frozen=True, populate_by_name=True
    )

    in_container: Annotated[
        bool | None,
        _field(
            "KTRDR_IN_CONTAINER",
            None,
            "Whether this is a container; detected if not set. Only decides the default of IB_HOST.",
        ),
    ]
    ib_host: Annotated[
        str,
        Field(
            default_factory=lambda given: default_host(given.get("in_container")),
            validation_alias=AliasChoices("IB_HOST"),
            description="Host of TWS or IB Gateway; default 127.0.0.1, in a container host.docker.internal if that exists.",
            min_length=1,
        ),
    ]
    ib_port: Annotated[
        int,
        _field(
            "IB_PORT", 4001, "Its API port: TWS 7496 live, 7497 paper; Gateway 4001 live, 4002 paper.", ge=1, le=65535
        ),
    ]
    ib_client_id: Annotated[
        int | None,
        _field(
            "IB_CLIENT_ID",
            None,
            "Client id to try first; without it the next free "
            "one of 1 to 50 (200 to 299 for sensors and daemon backfills).",
            ge=0,
            le=999,
        ),
    ]
    ib_connect_timeout_s: Annotated[
        float, _field("IB_CONNECT_TIMEOUT", 15.0, "Seconds to wait for the connection to the gateway.", gt=0)
    ]
    ib_request_timeout_s: Annotated[
        float,
        _field(
            "IB_REQUEST_TIMEOUT",
            120.0,
            "Seconds to wait for one answer before the request is cancelled and counts as failed.",
            gt=0,
            le=3600,
        ),
    ]
    ib_retry_waits_s: Annotated[
        tuple[float, ...],
        NoDecode,
        _field(
            "IB_RETRY_WAITS",
            (15.0, 30.0, 60.0),
            "Waits in seconds before each retry of a transient failure, separated by "
            "commas; their number is the number of retries.",
        ),
    ]
    ib_library: Annotated[
        Literal["ib_insync", "ib_async"],
        _field(
            "IB_LIBRARY",
            "ib_insync",
            "Client library of the connection: `ib_insync`, or `ib_async` (install the extra `ib-async`).",
        ),
    ]
    data_dir: Annotated[Path, _field("KTRDR_DATA_DIR", PROJECT_ROOT / "data", "Folder of the CSV files.")]
    universe_file: Annotated[
        Path | None, _field("KTRDR_UNIVERSE", None, "Universe file; default `universe.yaml` in the data folder.")
    ]
    dagster_home: Annotated[
        Path, _field("DAGSTER_HOME", PROJECT_ROOT / "dagster_home", "Dagster's records, and the pacing ledger.")
    ]
    ledger_url: Annotated[
        str,
        _field(
            "KTRDR_LEDGER_URL",
            "",
            "SQLAlchemy URL of a PostgreSQL pacing ledger, for runs "
            "spread over machines; default a SQLite file in DAGSTER_HOME.",
        ),
    ]
    open_requests: Annotated[
        int,
        _field(
            "KTRDR_OPEN_REQUESTS",
            6,
            "How many requests of one run may be unanswered at once. IB allows 50 for a login.",
            ge=1,
            le=50,
        ),
    ]
    history_limits: Annotated[
        HistoryLimits,
        _field(
            "KTRDR_HISTORY_LIMITS",
            HistoryLimits.CLASSIC,
            "Longest requests: `classic` (the specification's table) or `current` (IBKR's).",
        ),
    ]
    partition_starts: Annotated[
        dict[str, date],
        _field(
            "KTRDR_PARTITION_STARTS",
            {},
            'First partition by timeframe, as JSON: {"1m": "2010-01-01"}. Shared by all series.',
        ),
    ]

    api_token: Annotated[
        str,
        _field(
            "KTRDR_API_TOKEN",
            "",
            "Token that the REST API expects as `Authorization: Bearer …`; needed to serve beyond this machine.",
            repr=False,
        ),
    ]

    dagster_url: Annotated[
        str,
        _field(
            "KTRDR_DAGSTER_URL",
            "",
            "Web server of the Dagster that executes loads of the REST API, like http://webserver:3000; without it `ktrdr serve` "
            "uses that of `ktrdr ui`, or starts one.",
        ),
    ]

    tail_schedules: Annotated[
        dict[str, str],
        _field(
            "KTRDR_TAIL_SCHEDULES",
            {},
            'Timeframes whose new bars are requested at fixed times (cron, UTC), as JSON: {"1d": "30 22 * * 1-5"}. '
            "All others are requested as soon as they are due.",
        ),
    ]
    tail_sensor: Annotated[
        bool,
        _field("KTRDR_TAIL_SENSOR", True, "Whether the tail sensor is on by default; the UI can switch it."),
    ]
    gap_sensor: Annotated[
        bool,
        _field("KTRDR_GAP_SENSOR", True, "Whether the gap sensor is on by default; the UI can switch it."),
    ]
    auto_requests: Annotated[
        int,
        _field(
            "KTRDR_AUTO_REQUESTS",
            60,
            "The most requests that sensors and schedules start by themselves: for the tail of one series, and for gaps in "
            "one tick. What costs more is shown with the command that loads it.",
            ge=1,
            le=10_000,
        ),
    ]
    keep_automatic_runs_days: Annotated[
        float,
        _field(
            "KTRDR_KEEP_AUTOMATIC_RUNS",
            3.0,
            "Days that Dagster's records keep a successful run of a sensor or a schedule. Partitions keep their status.",
            ge=0.05,
            le=36500,
        ),
    ]
    keep_failed_runs_days: Annotated[
        float,
        _field(
            "KTRDR_KEEP_FAILED_RUNS",
            30.0,
            "Days that they keep a run that failed or was canceled; longer while a partition shows as failed by it.",
            ge=0.05,
            le=36500,
        ),
    ]
    keep_user_runs_days: Annotated[
        float,
        _field("KTRDR_KEEP_USER_RUNS", 365.0, "Days that they keep a run that a user started.", ge=0.05, le=36500),
    ]
    settlement_delay_min: Annotated[
        float,
        _field(
            "KTRDR_SETTLEMENT_DELAY",
            30.0,
            "Minutes after the close of its last session until a daily or longer bar without a schedule counts as due.",
            ge=0,
            le=1440,
        ),
    ]

    @field_validator("ib_retry_waits_s", mode="before")
    @classmethod
    def _split(cls, value: object) -> object:
        return [part for part in value.split(",") if part.strip()] if isinstance(value, str) else value

    @field_validator("ib_retry_waits_s")
    @classmethod
    def _waits_are_waits(cls, value: tuple[float, ...]) -> tuple[float, ...]:
        if not all(0 <= wait <= 3600 for wait in value):  # NaN is neither
            raise ValueError("waits are seconds from 0 to 3600")
        return value

    @field_validator("ib_client_id", "universe_file", "in_container", mode="before")
    @classmethod
    def _blank_is_unset(cls, value: object) -> object:
        return None if value == "" else value

    @field_validator("api_token")
    @classmethod
    def _fits_into_a_header(cls, value: str) -> str:
        if not all("!" <= c <= "~" for c in value):
            raise ValueError("a token has only printable ASCII characters and no spaces")
        return value

    @field_validator("partition_starts")
    @classmethod
    def _known_timeframes(cls, value: dict[str, date]) -> dict[str, date]:
        unknown = sorted(set(value) - set(TIMEFRAMES))
        if unknown:
            raise ValueError(f"unknown timeframe {', '.join(unknown)}; there are {', '.join(TIMEFRAMES)}")
        return {**DEFAULT_PARTITION_STARTS, **value}

    @field_validator("tail_schedules")
    @classmethod
    def _names_timeframes(cls, value: dict[str, str]) -> dict[str, str]:
        try:
            return {parse_timeframe(name).name: cron for name, cron in value.items()}
        except InputError as error:
            raise ValueError(f"{error.observed}; there are {', '.join(TIMEFRAMES)}") from None

    @property
    def universe_path(self) -> Path:
        return self.universe_file or self.data_dir / "universe.yaml"

    def partition_start(self, timeframe_name: str) -> date:
        """First day (UTC) for which partitions of this timeframe exist."""
        return self.partition_starts.get(timeframe_name, DEFAULT_PARTITION_STARTS[timeframe_name])


def load_settings(**overrides: object) -> Settings:
    """Settings from the environment and `.env`; ``overrides`` (by field name) win.

    Raises:
        InputError: a value is invalid; names the variable and the reason.
    """
    try:
        settings = Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else "settings"
        shown = "" if name in _SECRETS else f"={first.get('input')!r}"
        raise InputError(
            f"{name}{shown}: {first['msg']}", doing="reading settings", advice="See README, Settings."
        ) from None
    except ValueError as error:  # SettingsError: a value is not JSON
        found = re.search(r'field "(\w+)"', str(error))
        field = Settings.model_fields.get(found.group(1)) if found else None
        name = (
            str(field.validation_alias.choices[0]) if field and isinstance(field.validation_alias, AliasChoices) else ""
        )
        raise InputError(
            f"{name}: not valid JSON" if name else str(error), doing="reading settings", advice="See README, Settings."
        ) from None
    home = settings.dagster_home
    if "dagster_home" not in overrides and "DAGSTER_HOME" not in os.environ:
        # `.env` sets it for Dagster's own commands, relative to the folder they are started in. Ours use the project's home
        # wherever they are started: the pacing ledger is there, and two ledgers would be two budgets.
        home = PROJECT_ROOT / "dagster_home"
    # Dagster insists on an absolute home; relative folders count from the current directory.
    absolute: dict[str, object] = {
        "data_dir": settings.data_dir.expanduser().absolute(),
        "dagster_home": home.expanduser().absolute(),
    }
    if settings.universe_file is not None:
        absolute["universe_file"] = settings.universe_file.expanduser().absolute()
    return settings.model_copy(update=absolute)


def as_environment(settings: Settings) -> dict[str, str]:
    """``settings`` as environment variables, for child processes that are started in another folder."""
    found: dict[str, str] = {}
    for field_name, field in Settings.model_fields.items():
        value = getattr(settings, field_name)
        if not isinstance(field.validation_alias, AliasChoices) or value is None:
            continue
        name = str(field.validation_alias.choices[0])
        if isinstance(value, tuple):
            found[name] = ",".join(str(part) for part in value)
        elif isinstance(value, dict):
            found[name] = json.dumps(value, default=str)
        else:
            found[name] = str(value)
    return found
