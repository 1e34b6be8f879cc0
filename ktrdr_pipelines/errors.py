"""The exception tree. Each family has one exit code, and defines whether a retry can succeed and who has to act.

```
KtrdrError
├── InputError            invalid input or configuration                             exit 2
│   └── ConfigurationError    invalid settings or files: the server's fault, not a REST client's
├── PermanentError        IB refuses the request: no such contract, no permission         3
├── TransientError        a failure of IB or the connection; a retry may succeed          4
│   ├── GatewayUnreachable    no gateway answers at the configured host and port          5
│   ├── PacingError           IB reports a pacing violation
│   └── RequestTimeout        no answer in time; a failure, never "no data"
├── DataError             IB's answer, or a file, breaks the rules for bars               6
├── StoreError            the disk refuses: read-only, full, locked                       7
└── BugError              the program's own request is malformed; never retried          70
```

Exit 1 means an unexpected exception (a traceback: a bug), 130 Ctrl-C. A load with failed windows ends with the code of its first
failure. IB's messages are classified in `ib/codes.py`.
"""

from __future__ import annotations

from typing import ClassVar, Self


class KtrdrError(Exception):
    """A failure with the facts a user needs: what was being done and for what, what came back, what to do.

    ``doing`` is the activity with its series and window ("loading AAPL 5m 2024-03-11..2024-03-12"), ``observed`` what happened,
    ``advice`` what to do next. Each is an attribute, so that no caller parses text.
    """

    is_transient: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1
    family: ClassVar[str] = "error"

    def __init__(self, observed: str, *, doing: str = "", advice: str = "", code: int | None = None) -> None:
        super().__init__(observed)
        self.observed = observed
        self.doing = doing
        self.advice = advice
        self.code = code
        """IB's error code, when the failure came from IB."""
        self.pauses_login = False
        """True if every process of the login must wait now (pacing, another session of the same login)."""

    def while_doing(self, doing: str) -> Self:
        """Set ``doing`` if it is empty, and return the error: the innermost, most precise description stays."""
        if not self.doing:
            self.doing = doing
        return self

    @property
    def message(self) -> str:
        """What was being done and what happened, without the advice."""
        return f"{self.doing}: {self.observed}" if self.doing else self.observed

    def __str__(self) -> str:
        tail = f" {self.advice}" if self.advice else ""
        stop = "" if self.observed.endswith((".", "?", "!")) or not tail else "."
        return f"{self.message}{stop}{tail}"


class InputError(KtrdrError):
    """Invalid input or configuration. No request was sent to IB, nothing was written."""

    exit_code = 2
    family = "input"


class ConfigurationError(InputError):
    """Invalid settings or files of this installation: its operator must correct them, a REST client cannot."""

    family = "configuration"


class PermanentError(KtrdrError):
    """IB refuses the request and will refuse it again: unknown contract, missing permission, expired instrument."""

    exit_code = 3
    family = "permanent"


class TransientError(KtrdrError):
    """A failure of IB or of the connection to it; the same request may succeed later."""

    is_transient = True
    exit_code = 4
    family = "transient"


class GatewayUnreachable(TransientError):
    """No gateway answers at the configured host and port, or the peer is not a gateway."""

    exit_code = 5
    family = "gateway"


class PacingError(TransientError):
    """IB reports a pacing violation. Every process of this login must wait."""

    family = "pacing"


class RequestTimeout(TransientError):
    """A request was not answered in time and was cancelled. It is no evidence about the data."""

    family = "timeout"


class DataError(KtrdrError):
    """Bars break the rules (`bars/schema.py`). ``rows`` shows them as text; the files stay as they were."""

    exit_code = 6
    family = "data"

    def __init__(
        self, observed: str, *, rows: str = "", doing: str = "", advice: str = "", code: int | None = None
    ) -> None:
        super().__init__(observed, doing=doing, advice=advice, code=code)
        self.rows = rows


class StoreError(KtrdrError):
    """The disk refuses: read-only, full, or locked by another process for too long. Files stay as they were."""

    exit_code = 7
    family = "store"


class BugError(KtrdrError):
    """A fault of this program (a malformed request, a broken invariant). Never retried."""

    exit_code = 70
    family = "bug"


def exit_code_of(family: str) -> int:
    """The exit code of a family by its name (``transient``): for reports of a failure that is not raised."""
    found = [KtrdrError]
    for kind in found:
        if kind.family == family:
            return kind.exit_code
        found += kind.__subclasses__()
    return KtrdrError.exit_code
