"""The exception tree. Each family says whether a retry can help, who has to act, and with which exit code a command ends.

```
KtrdrError
├── InputError            what a person typed or configured is wrong             exit 2
│   └── ConfigurationError    it stands in a file: whoever asks over REST is not to blame
├── PermanentError        IB refuses, and will again: no such contract, no permission     3
├── TransientError        IB or the way to it is in trouble; a retry may help             4
│   ├── GatewayUnreachable    nothing usable answers at the configured host and port      5
│   ├── PacingError           IB says that we ask too fast
│   └── RequestTimeout        no answer in time; a failure, never "no data"
├── DataError             IB's answer, or a file, breaks the rules for bars               6
├── StoreError            the disk refuses: read-only, full, locked                       7
└── BugError              our own request was malformed; report it, retries stop          70
```

Exit 1 is left to unforeseen exceptions (a traceback: a bug), 130 to Ctrl-C. A load of which some windows failed ends with the
code of its first failure. No messages of IB are interpreted here: see `ib/codes.py`.
"""

from __future__ import annotations

from typing import ClassVar, Self


class KtrdrError(Exception):
    """A failure with the four facts a person needs: what was being done, for what, what came back, what to do.

    ``doing`` names the activity with its series and window ("loading AAPL 5m 2024-03-11..2024-03-12"), ``observed`` what
    happened, ``advice`` what to do next. Each is kept as an attribute so that no caller parses text.
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
        """IB's error code, when the failure came from IB."""
        self.pauses_login = False
        """True if every process of the login has to wait now (pacing, another session of the same login)."""

    def while_doing(self, doing: str) -> Self:
        """Say what was being done, once: the innermost, most precise description stays."""
        if not self.doing:
            self.doing = doing
        return self

    @property
    def message(self) -> str:
        """What happened while what was being done; the advice is told apart."""
        return f"{self.doing}: {self.observed}" if self.doing else self.observed

    def __str__(self) -> str:
        tail = f" {self.advice}" if self.advice else ""
        stop = "" if self.observed.endswith((".", "?", "!")) or not tail else "."
        return f"{self.message}{stop}{tail}"


class InputError(KtrdrError):
    """What a person typed or configured cannot be meant. Nothing was asked of IB, nothing was written."""

    exit_code = 2
    family = "input"


class ConfigurationError(InputError):
    """What the program is configured with cannot be meant: a person has to mend it, and not whoever asked."""

    family = "configuration"


class PermanentError(KtrdrError):
    """IB refuses and will refuse again: unknown contract, missing permission, expired instrument."""

    exit_code = 3
    family = "permanent"


class TransientError(KtrdrError):
    """IB or the way to it is in trouble; the same request may succeed later."""

    retry_helps = True
    exit_code = 4
    family = "transient"


class GatewayUnreachable(TransientError):
    """No gateway answers at the configured host and port, or what answers is not one."""

    exit_code = 5
    family = "gateway"


class PacingError(TransientError):
    """IB answered that requests come too fast. Every process of this login has to wait."""

    family = "pacing"


class RequestTimeout(TransientError):
    """A request was not answered in time and was cancelled. Says nothing about whether there is data."""

    family = "timeout"


class DataError(KtrdrError):
    """Bars break the rules (`bars/schema.py`). ``rows`` shows them as text; what was on disk before stays there."""

    exit_code = 6
    family = "data"

    def __init__(
        self, observed: str, *, rows: str = "", doing: str = "", advice: str = "", code: int | None = None
    ) -> None:
        super().__init__(observed, doing=doing, advice=advice, code=code)
        self.rows = rows


class StoreError(KtrdrError):
    """The disk refuses: read-only, full, or locked by another process for too long. Files are as before."""

    exit_code = 7
    family = "store"


class BugError(KtrdrError):
    """Something this program made itself is wrong (a malformed request, a broken invariant). Never retried."""

    exit_code = 70
    family = "bug"


def exit_code_of(family: str) -> int:
    """The exit code of a family by its name (``transient``): for answers that tell of a failure without raising it."""
    found = [KtrdrError]
    for kind in found:
        if kind.family == family:
            return kind.exit_code
        found += kind.__subclasses__()
    return KtrdrError.exit_code
