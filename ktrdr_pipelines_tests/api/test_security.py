"""Promises about who may ask the REST API."""

from __future__ import annotations

import pytest

from ktrdr_pipelines.api.security import MAX_BODY_BYTES, check_binding, is_loopback
from ktrdr_pipelines.errors import InputError
from ktrdr_pipelines_tests.api.conftest import OpenApi, problem_of
from ktrdr_pipelines_tests.conftest import Ktrdr

CONFIG = "/api/v1/ib/config"
TOKEN = "correct-horse"


@pytest.mark.parametrize("host", ["127.0.0.1:8000", "localhost:8000", "LOCALHOST", "[::1]:8000"])
def test_this_machine_is_known_by_its_names(open_api: OpenApi, host: str) -> None:
    """The names under which a user reaches a server on loopback."""
    assert open_api().get(CONFIG, headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host", ["evil.example:8000", "127.0.0.1.evil.example", "localhost@evil.example", "[::1", "evil.example#localhost"]
)
def test_another_host_name_is_refused_against_dns_rebinding(open_api: OpenApi, host: str) -> None:
    """A stranger's page whose name leads to 127.0.0.1 gets nothing."""
    answer = open_api().get(CONFIG, headers={"Host": host})
    assert (answer.status_code, problem_of(answer)["kind"]) == (421, "forbidden")


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:9999"},
     {"Sec-Fetch-Site": "cross-site"}, {"Sec-Fetch-Site": "same-site"}],
)  # fmt: skip
def test_other_sites_pages_cannot_post(open_api: OpenApi, headers: dict[str, str]) -> None:
    """A form of any page can post to 127.0.0.1 without asking; it is refused before anything happens."""
    answer = open_api().post("/api/v1/ib/cleanup", headers=headers)
    assert (answer.status_code, problem_of(answer)["kind"]) == (403, "forbidden")


def test_its_own_pages_can(open_api: OpenApi) -> None:
    """/docs has a button to try each route."""
    answer = open_api().get(CONFIG, headers={"Origin": "http://127.0.0.1:8000", "Sec-Fetch-Site": "same-origin"})
    assert answer.status_code == 200


def test_no_other_site_is_ever_allowed_to_read(open_api: OpenApi) -> None:
    """No answer carries a CORS header, a preflight's neither."""
    client = open_api()
    preflight = {"Access-Control-Request-Method": "POST", "Origin": "http://127.0.0.1:8000"}
    for answer in (client.get(CONFIG), client.options("/api/v1/data/load", headers=preflight)):
        assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", [CONFIG, "/docs", "/openapi.json", "/no/such/route"])
@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
@pytest.mark.parametrize(
    "sent", [None, "", "Bearer", "Bearer ", "Bearer wrong", f"Bearer {TOKEN}x", f"Basic {TOKEN}", TOKEN, "Bearer \xe4"]
)
def test_a_token_that_is_set_is_always_required(open_api: OpenApi, path: str, host: str, sent: str | None) -> None:
    """On every path, on loopback too, and a wrong one does not show which routes exist."""
    headers = {} if sent is None else {"Authorization": sent.encode("latin-1")}
    answer = open_api(host=host, token=TOKEN).get(path, headers=headers)
    assert (answer.status_code, problem_of(answer)["kind"]) == (401, "unauthorized")
    assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_the_right_token_opens(open_api: OpenApi, host: str) -> None:
    """And beyond loopback, names of any kind lead here."""
    asked_as = "bars.example" if host == "0.0.0.0" else "127.0.0.1"
    headers = {"Authorization": f"Bearer {TOKEN}", "Host": asked_as}
    assert open_api(host=host, token=TOKEN).get(CONFIG, headers=headers).status_code == 200


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "bars.example", "", "127.0.0.1.evil.example"])
def test_other_machines_are_not_served_without_a_token(host: str) -> None:
    """Nothing but loopback, and a token changes that."""
    assert not is_loopback(host)
    with pytest.raises(InputError, match="KTRDR_API_TOKEN"):
        check_binding(host, "")
    check_binding(host, TOKEN)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.0.0.2", "::1", "localhost"])
def test_loopback_needs_no_token(host: str) -> None:
    """The default works out of the box."""
    check_binding(host, "")


@pytest.mark.slow
def test_the_command_refuses_to_serve_everybody_without_a_token(ktrdr: Ktrdr) -> None:
    """One line, exit code 2, nothing is opened."""
    done = ktrdr("serve", "--host", "0.0.0.0", "--port", "1")
    assert done.returncode == 2
    assert "KTRDR_API_TOKEN" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_token_that_fits_into_no_header_is_refused_and_not_shown(ktrdr: Ktrdr) -> None:
    """The line names the setting, never the secret."""
    done = ktrdr("serve", KTRDR_API_TOKEN="two secret words")
    assert done.returncode == 2
    assert "KTRDR_API_TOKEN" in done.stderr
    assert "secret" not in done.stderr


def test_a_body_larger_than_any_request_needs_is_refused(open_api: OpenApi) -> None:
    """By its declared size, and by its real size where that is missing or wrong."""
    client = open_api()
    whole = client.post("/api/v1/data/load", content=b" " * (MAX_BODY_BYTES + 1))
    pieces = client.post("/api/v1/data/load", content=iter([b" " * 4096] * 8))
    for answer in (whole, pieces):
        assert (answer.status_code, problem_of(answer)["kind"]) == (413, "input")


def test_an_endless_query_is_refused(open_api: OpenApi) -> None:
    """The same for what stands in the address."""
    answer = open_api().get("/api/v1/ib/ranges?symbols=" + "A," * 10_000)
    assert (answer.status_code, problem_of(answer)["kind"]) == (422, "input")
