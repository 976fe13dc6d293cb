"""Admission, the error table, status details and the generated code."""

import random
import subprocess
import sys
from dataclasses import replace

import grpc
import pytest
from gateway_harness import LIMITS
from hypothesis import given
from hypothesis import strategies as st

from cluster.base import errors
from router.admission import Admission
from router.error_map import ERROR_STATUS, status_of
from router.grpc.status_details import error_from_status, trailing_metadata
from router.proto.generate import drifted_files


def all_errors() -> list[type[errors.PenstockError]]:
    """The hierarchy of errors.py; other modules' subclasses share a code of it."""
    found = [errors.PenstockError]
    for cls in found:
        found += [sub for sub in cls.__subclasses__() if sub.__module__ == errors.__name__]
    return found


def admission(**limits) -> Admission:
    return Admission(replace(LIMITS, **limits), random_source=random.Random(1))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 300)), max_size=60))
def test_admission_counts_are_exact_whatever_the_order(steps):
    gate = admission(max_active_requests=5, max_prompt_tokens_waiting=500)
    held = []
    for action, tokens in steps:
        if action == 0 or not held:
            try:
                held.append(gate.reserve(tokens))
            except errors.OverloadedError as error:
                refused = error
            else:
                refused = None
            if refused is not None:
                assert 1.0 <= refused.retry_after_s <= 3.0
                assert len(held) == 5 or gate.waiting_tokens + tokens > 500
        elif action == 1:
            held[-1].set_waiting_tokens(tokens)
        else:
            gone = held.pop(0)
            gone.release()
            gone.release()
            gone.set_waiting_tokens(9)
        assert gate.active_requests == len(held) <= 5
        assert gate.waiting_tokens >= 0
    for one in held:
        one.release()
    assert (gate.active_requests, gate.waiting_tokens) == (0, 0)


def test_a_prompt_over_the_bound_runs_alone():
    gate = admission(max_prompt_tokens_waiting=100)
    with gate.reserve(1000), pytest.raises(errors.OverloadedError):
        gate.reserve(1)
    gate.reserve(1)


def test_every_error_code_has_a_status_and_no_status_is_unused():
    assert {cls.code for cls in all_errors()} == set(ERROR_STATUS)


@pytest.mark.parametrize("cls", all_errors())
def test_errors_survive_the_status_details(cls):
    error = cls("what happened: é\n", "what to do", param="stop")
    metadata = trailing_metadata(error, "req-1")
    back = error_from_status(status_of(error).grpc, str(error), metadata)
    assert type(back).code == cls.code
    assert (back.cause, back.remedy, back.param) == (error.cause, error.remedy, "stop")


def test_retry_delay_survives():
    error = errors.OverloadedError("full", retry_after_s=2.25)
    metadata = trailing_metadata(error, "req-1")
    assert ("grpc-retry-pushback-ms", "2250") in metadata
    back = error_from_status(grpc.StatusCode.RESOURCE_EXHAUSTED, "full", metadata)
    assert back.retry_after_s == 2.25


def test_a_status_without_details_keeps_its_class():
    assert isinstance(
        error_from_status(grpc.StatusCode.UNAVAILABLE, "refused", None), errors.UnavailableError
    )
    junk = (("grpc-status-details-bin", b"\xff\xff"),)
    assert isinstance(error_from_status(grpc.StatusCode.DATA_LOSS, "x", junk), errors.InternalError)


def test_generated_code_is_what_the_compiler_writes():
    assert drifted_files() == []


def test_router_imports_neither_torch_nor_ray():
    code = (
        "import sys, router.handler, router.grpc.server, router.client;"
        "sys.exit(any(name in sys.modules for name in ('torch', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
