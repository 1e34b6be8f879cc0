"""The exception tree. A family determines whether a retry may help, who has to act, and the exit code of a command.

```
KtrdrError
├── InputError            invalid input or configuration                         exit 2
│   └── ConfigurationError    an invalid file or setting: not the fault of a REST client
├── PermanentError        IB rejects it, also next time: no such contract, no permission  3
├── TransientError        IB or the connection to it has failed; a retry may help         4
│   ├── GatewayUnreachable    nothing usable answers at the configured host and port      5
│   ├── PacingError           IB reports too many requests
│   └── RequestTimeout        no answer in time; a failure, never "no data"
├── DataError             IB's answer, or a file, breaks the rules for bars               6
├── StoreError            the disk refuses: read-only, full, locked                       7
└── BugError              our own request was malformed; report it, retries stop          70
```

Exit 1 is an unexpected exception (a traceback: a bug), 130 is Ctrl-C. A load with failed windows ends with the code of its first
failure. `ib/codes.py` classifies the messages of IB.
"""

from __future__ import annotations

from typing import ClassVar, Self


class KtrdrError(Exception):
    """A failure with what a user needs: what was being done, for which series and window, what came back, what to do.

    ``doing``: the activity with its series and window ("loading AAPL 5m 2024-03-11..2024-03-12"). ``observed``: what happened.
    ``advice``: what to do next. They are attributes, so that no caller parses text.
    """

    retry_helps: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1
    family: ClassVar[str] = "error"

    def __init__(self, observed: str, *, doing: str = "", advice: str = "", code: int | None = None) -> None:
        super().__init__(observed)
        self.observed = observed
        self.doing = doing
        self.advice = advice
        self.code = code
        """IB's error code, if IB sent one."""
        self.pauses_login = False
        """True if all processes of the login must wait now (pacing, another session of the same login)."""

    def while_doing(self, doing: str) -> Self:
        """Set ``doing`` unless it is set: the innermost description is the most precise one."""
        if not self.doing:
            self.doing = doing
        return self

    @property
    def message(self) -> str:
        """``doing`` and ``observed``, without the advice."""
        return f"{self.doing}: {self.observed}" if self.doing else self.observed

    def __str__(self) -> str:
        tail = f" {self.advice}" if self.advice else ""
        stop = "" if self.observed.endswith((".", "?", "!")) or not tail else "."
        return f"{self.message}{stop}{tail}"


class InputError(KtrdrError):
    """Invalid input or configuration. No request was sent, nothing was written."""

    exit_code = 2
    family = "input"


class ConfigurationError(InputError):
    """An invalid file or setting: the user who runs the program must correct it, not the client that sent a request."""

    family = "configuration"


class PermanentError(KtrdrError):
    """IB rejects the request and will reject it again: unknown contract, missing permission, expired instrument."""

    exit_code = 3
    family = "permanent"


class TransientError(KtrdrError):
    """IB or the connection to it has failed; the same request may succeed later."""

    retry_helps = True
    exit_code = 4
    family = "transient"


class GatewayUnreachable(TransientError):
    """No gateway answers at the configured host and port, or what answers is not one."""

    exit_code = 5
    family = "gateway"


class PacingError(TransientError):
    """IB reports a pacing violation. All processes of the login must wait."""

    family = "pacing"


class RequestTimeout(TransientError):
    """A request was not answered in time and was cancelled. No evidence about data."""

    family = "timeout"


class DataError(KtrdrError):
    """Bars break the rules (`bars/schema.py`). ``rows`` shows them as text; the files are unchanged."""

    exit_code = 6
    family = "data"

    def __init__(
        self, observed: str, *, rows: str = "", doing: str = "", advice: str = "", code: int | None = None
    ) -> None:
        super().__init__(observed, doing=doing, advice=advice, code=code)
        self.rows = rows


class StoreError(KtrdrError):
    """The disk refuses: read-only, full, or locked by another process for too long. The files are unchanged."""

    exit_code = 7
    family = "store"


class BugError(KtrdrError):
    """A defect of this program (a malformed request, a broken invariant). Never retried."""

    exit_code = 70
    family = "bug"


def exit_code_of(family: str) -> int:
    """The exit code of a family by its name (``transient``), for results that report a failure without raising it."""
    found = [KtrdrError]
    for kind in found:
        if kind.family == family:
            return kind.exit_code
        found += kind.__subclasses__()
    return KtrdrError.exit_code
