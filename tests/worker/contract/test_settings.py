from __future__ import annotations

import pytest
from pydantic import ValidationError

from worker.contract.settings import ContractSettings, complaints


@pytest.mark.parametrize(
    ("field", "value"),
    [("redis_url", "http://127.0.0.1"), ("picture_lifetime_s", 1), ("record_lifetime_s", 0), ("queue_bound", 0)],
)
def test_wrong_setting_is_refused_by_name(field, value):
    with pytest.raises(ValidationError, match=field):
        ContractSettings(**{field: value})


def test_settings_cannot_change_after_the_start():
    with pytest.raises(ValidationError, match="frozen"):
        ContractSettings().queue_bound = 5


def test_complaints_name_the_variable_and_show_no_password():
    with pytest.raises(ValidationError) as refused:
        ContractSettings(redis_url="http://:secret@host", queue_bound=0)
    first, second = complaints(refused.value).splitlines()
    assert first.startswith("DARKROOM_REDIS_URL: ")
    assert second.startswith("DARKROOM_QUEUE_BOUND is 0: ")
    assert "secret" not in first
