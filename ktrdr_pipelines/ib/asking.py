"""One call to IB from the first try to its end: paced, waiting for the end of outages, retried, interrupted.

Runs in the caller's thread; several calls of one history run side by side in threads of their own. Retries are tenacity's, for
transient errors only, after the waits of the address (the setting IB_RETRY_WAITS). What all calls share: `history.py`.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, TypeVar

import tenacity

from ktrdr_pipelines.domain.calls import Call, Interrupted, Waiting
from ktrdr_pipelines.errors import GatewayUnreachable, KtrdrError, RequestTimeout, TransientError
from ktrdr_pipelines.ib.client import GatewayClient, Sending
from ktrdr_pipelines.ib.codes import Outage, RequestLost
from ktrdr_pipelines.ib.pacing.backends import LOCK_TIMEOUT_S
from ktrdr_pipelines.ib.pacing.ledger import GrantExpired
from ktrdr_pipelines.ib.pacing.rules import Ask, Rule

if TYPE_CHECKING:
    from ktrdr_pipelines.ib.history import IBHistory

log = logging.getLogger(__name__)
T = TypeVar("T")


class Asking:
    """One call of ``history``. Not to be shared between threads. ``interrupted`` is set when the program ends: then its waits
    raise `Interrupted`."""

    def __init__(self, history: IBHistory, call: Call, interrupted: threading.Event) -> None:
        self._history, self._call, self._interrupted = history, call, interrupted

    @property
    def is_interrupted(self) -> bool:
        """Whether the program ends."""
        return self._interrupted.is_set()

    # -- one try ----------------------------------------------------------------------------------------------------

    def connect(self) -> GatewayClient:
        """The connection, checked; see `Connection.get`."""
        address = self._history.address
        # At most one round of connecting, and a probe before it.
        self._call.on_step(
            f"the gateway at {address.host}:{address.port}", 2 * address.connect_timeout_s + address.probe_timeout_s
        )
        return self._history.connection.get(self.report_wait, self.wait)

    def paced(self, ask: Ask, send: Callable[[GatewayClient, Sending], T]) -> T:
        """Send one history request once the ledger grants it; connected before, so that nothing comes between grant and send."""
        history, costs = self._history, self._call.costs
        client = self.connect()
        self.wait_for_outages(client, frozenset((Outage.LINK, Outage.HISTORY)))
        reported_until_s = 0.0

        def waiting(seconds: float, rule: Rule, until_s: float) -> None:
            nonlocal reported_until_s
            if seconds >= 1 and until_s - reported_until_s >= 1:
                reported_until_s = until_s
                reason = f"pacing: {rule}{self._explain_pause(rule)}"
                self.report_wait(reason, seconds, datetime.fromtimestamp(until_s, UTC))

        self._call.on_step(
            "the pacing ledger: another process keeps it locked, or its database does not answer", LOCK_TIMEOUT_S
        )
        grant = history.ledger.acquire(ask, work=self._call.work, sleep=self._pause, on_wait=waiting)
        with grant, self.watch(client):
            costs.pacing_wait_s += grant.waited_s
            costs.paced.append((grant.granted_at_s - grant.waited_s, grant.granted_at_s))
            try:
                history.connection.check(client)
            except GatewayUnreachable as error:
                raise RequestLost(
                    f"the connection was lost during the pacing wait ({error.observed})",
                    advice="It is made again; nothing was sent.",
                ) from None

            @contextmanager
            def sending() -> Iterator[None]:
                with grant.sending():
                    costs.requests += 1
                    yield
                self._call.on_sent(client.request_timeout_s)

            return send(client, sending)

    def expect_answer(self, what: str, seconds: float) -> None:
        """Before a request that is no history request: ``what`` it asks for has to come within ``seconds``."""
        self._call.on_step(what, seconds)

    @contextmanager
    def watch(self, client: GatewayClient) -> Iterator[None]:
        """A block around one request: what its failure means for the next one on this connection, and for other processes."""
        connection = self._history.connection
        connection.note_use(client)
        try:
            yield
        except KtrdrError as error:
            if error.pauses_login:
                self._history.ledger.penalise(error.observed)
            connection.note_use(client, error)
            raise
        connection.note_use(client)

    def _explain_pause(self, rule: Rule) -> str:
        """Why all processes pause: pacing, or the same login in use elsewhere, which the user can end."""
        pauses = self._history.ledger.snapshot().pauses if rule is Rule.PAUSE else ()
        return f" ({pauses[-1].reason})" if pauses else ""

    # -- waits ------------------------------------------------------------------------------------------------------

    def report_wait(self, reason: str, seconds: float, until: datetime | None = None) -> None:
        """Report a wait of ``seconds`` at most, to the caller and to the log."""
        log.info("waiting up to %.0f s: %s", seconds, reason)
        waiting = Waiting(reason, seconds, until or self._history.now() + timedelta(seconds=seconds))
        self._call.on_wait(waiting)

    def wait(self, seconds: float) -> None:
        """Wait before a retry or for the gateway.

        Raises:
            Interrupted: the program ends.
        """
        costs, begun_s = self._call.costs, self._history.clock_now_s()
        costs.retry_wait_s += seconds
        costs.retried.append((begun_s, begun_s + seconds))
        self._pause(seconds)

    def _pause(self, seconds: float) -> None:
        if self._history.sleep is not None:
            self._history.sleep(seconds)
        else:
            self._interrupted.wait(seconds)
        if self.is_interrupted:
            raise Interrupted

    def wait_for_outages(self, client: GatewayClient, needed: frozenset[Outage]) -> None:
        """Wait for the end of outages of what is ``needed``, at most as long as patience lasts.

        Raises:
            TransientError: there is an outage, and the address has no patience at all.
        """
        address, patience = self._history.address, self._history.outage_patience
        is_reported = False
        while client.outages.kinds & needed:
            if address.outage_patience_s <= 0:
                raise TransientError(
                    f"the gateway reports an outage: {client.outages.describe(needed)}",
                    advice="Ask again later. It is IB's to end; loads wait for it.",
                )
            if patience.left_s <= 0 or not client.is_connected:
                return
            if not is_reported:
                is_reported = True
                reason = f"the gateway reports an outage: {client.outages.describe(needed)}"
                self.report_wait(reason, patience.left_s)
            with patience.spending(1.0):
                self.wait(1.0)
        if not client.outages.kinds:
            patience.renew()

    # -- retries ----------------------------------------------------------------------------------------------------

    def retry(self, doing: str, attempt: Callable[[], T]) -> T:
        """The result of ``attempt``, tried again after transient errors.

        Raises:
            KtrdrError: the last error, with the earlier ones named. Interrupted: the program ends.
        """
        retries = _Retries(self, self._history, self._call, doing)
        retrying = tenacity.Retrying(
            retry=retries.should_retry,
            wait=retries.choose_wait,
            stop=tenacity.stop_after_attempt(len(retries.waits) + 1),
            sleep=self.wait,
            before_sleep=retries.announce,
            reraise=True,
        )
        try:
            return retrying(attempt)
        except KtrdrError as error:
            tried = retries.tried
            if tried:
                error.observed += f" (given up after {len(tried) + 1} tries: {'; '.join(dict.fromkeys(tried))})"
            raise error.while_doing(doing) from None


class _Retries:
    """When and after which wait one call is tried again."""

    def __init__(self, asking: Asking, history: IBHistory, call: Call, doing: str) -> None:
        self._asking, self._history, self._call, self._doing = asking, history, call, doing
        self.waits = history.address.retry_waits_s
        self.tried: list[str] = []
        """Why each try but the last failed."""
        self._was_asked_at_once = False

    def should_retry(self, state: tenacity.RetryCallState) -> bool:
        error = _error_of(state)
        if error is None or not error.is_transient:
            return False
        if self._asking.is_interrupted:
            raise Interrupted
        if self._call.raises_time_out and isinstance(error, RequestTimeout):
            return False
        # No gateway at the start, or for longer than any restart: raised at once instead of after two minutes.
        return not (isinstance(error, GatewayUnreachable) and self._history.connection.has_given_up)

    def choose_wait(self, state: tenacity.RetryCallState) -> float:
        if isinstance(_error_of(state), RequestLost | GrantExpired) and not self._was_asked_at_once:
            self._was_asked_at_once = True
            return 0.0
        return self.waits[min(state.attempt_number, len(self.waits)) - 1] if self.waits else 0.0

    def announce(self, state: tenacity.RetryCallState) -> None:
        """Before the wait: count it, report it."""
        error, number, most = _error_of(state), state.attempt_number, len(self.waits)
        assert error is not None
        wait_s = state.next_action.sleep if state.next_action else 0.0
        self._call.costs.retries += 1
        self.tried.append(error.observed)
        log.warning("%s: %s; try %d of %d in %g s", self._doing, error.observed, number + 1, most + 1, wait_s)
        # Only the user can end some of these (the same login elsewhere): show how.
        advice = f". {error.advice}" if error.pauses_login else ""
        self._asking.report_wait(f"retry {number} of {most} after: {error.observed}{advice}", wait_s)


def _error_of(state: tenacity.RetryCallState) -> KtrdrError | None:
    error = state.outcome.exception() if state.outcome else None
    return error if isinstance(error, KtrdrError) else None
