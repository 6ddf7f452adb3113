"""Where all tests must run, what is missing is a failure."""

from __future__ import annotations

import pytest

pytest_plugins = ["pytester"]

SKIPPED = {
    "mark": "@pytest.mark.skipif(True, reason='no bread: bake some')\ndef test_toast(): ...",
    "call": "def test_toast(): pytest.skip('no bread: bake some')",
    "import": "def test_toast(): pytest.importorskip('bread', reason='no bread: bake some')",
}
EXPECTED_TO_FAIL = "@pytest.mark.xfail\ndef test_toast(): raise ValueError"


def run(pytester: pytest.Pytester, test: str) -> pytest.RunResult:
    pytester.makepyfile(f"import pytest\n{test}")
    return pytester.runpytest_inprocess("-p", "tests.conftest", "-p", "no:asyncio", "-ra")


@pytest.mark.parametrize("test", SKIPPED.values(), ids=SKIPPED)
def test_skip_is_a_failure_that_says_what_to_install_where_all_must_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, test: str
) -> None:
    monkeypatch.setenv("DARKROOM_TEST_ALL", "yes")
    ran = run(pytester, test)
    assert ran.ret == pytest.ExitCode.TESTS_FAILED
    ran.stdout.fnmatch_lines("*no bread: bake some; with DARKROOM_TEST_ALL every test must run")


@pytest.mark.parametrize("test", SKIPPED.values(), ids=SKIPPED)
def test_skip_is_a_skip_elsewhere(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, test: str) -> None:
    monkeypatch.delenv("DARKROOM_TEST_ALL", raising=False)
    run(pytester, test).assert_outcomes(skipped=1)


def test_failure_that_is_expected_is_none_where_all_must_run(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_TEST_ALL", "yes")
    run(pytester, EXPECTED_TO_FAIL).assert_outcomes(xfailed=1)
