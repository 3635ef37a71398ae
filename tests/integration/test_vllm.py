"""vLLM's Transformers modelling backend, off line and as a server, where the package is not installed."""

import pytest

from tests.integration.engines import Engine
from tests.integration.requests import messages


# One engine at a time in little memory; nothing is reported to anybody.
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory) -> Engine:
    return Engine("vllm", tmp_path_factory.mktemp("vllm"))


def test_offline_answers_are_those_of_transformers(vllm, repo, cases, expected):
    requests = [{"messages": messages(case), "num_visual_tokens": case["num_visual_tokens"]} for case in cases]
    bad = {**requests[0], "num_visual_tokens": 7}

    report = vllm.run("vllm_offline.py", repo, stdin=[*requests, bad], **ENVIRONMENT)

    assert report["alone"] == expected
    usual = [answer for case, answer in zip(cases, expected) if case["num_visual_tokens"] is None]
    assert report["together"] == usual
    assert "num_visual_tokens=7" in report["refused"] and "64, 16, 4, 1" in report["refused"]
    assert report["after"] == expected[0]
