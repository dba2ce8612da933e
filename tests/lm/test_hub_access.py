"""Which failures pass, and which will be the same next time."""

from __future__ import annotations

import types

import pytest

from fastsae.errors import StreamError
from fastsae.lm.hub_access import is_refused, is_transient


def answered(status: int) -> Exception:
    error = RuntimeError("the server said no")
    error.response = types.SimpleNamespace(status_code=status)  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("status", "transient", "refused"),
    [
        (400, False, True), (401, False, True), (403, False, True), (404, False, True),
        (408, True, False), (409, True, False), (429, True, False),
        (500, True, False), (501, False, False), (503, True, False),
    ],
)  # fmt: skip
def test_an_answer(status: int, transient: bool, refused: bool) -> None:
    error = answered(status)
    assert (is_transient(error), is_refused(error)) == (transient, refused)


@pytest.mark.parametrize(
    "error",
    [
        ConnectionResetError("gone"),
        TimeoutError(),
        type("RemoteProtocolError", (Exception,), {"__module__": "httpx2"})("disconnected"),
    ],
)
def test_a_connection_that_breaks_may_come_back(error: Exception) -> None:
    assert is_transient(error) and not is_refused(error)


def test_an_error_of_the_data_does_not_pass() -> None:
    for error in (StreamError("no such column"), KeyError("text"), ValueError("not JSON")):
        assert not is_transient(error) and not is_refused(error)
