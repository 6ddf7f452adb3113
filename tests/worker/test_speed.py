"""The speed that a worker tells of itself."""

import pytest

from worker.speed import HALF_LIFE_S, Speed


def test_speed_is_steps_by_all_of_the_time_at_work() -> None:
    speed = Speed()
    speed.note("a", 0.0, 0.1)  # text
    speed.note("a", 6.0, 1.8)
    speed.note("a", 0.0, 0.1)  # decoding
    speed.note("b", 1.0, 0.5)
    assert speed.measured() == pytest.approx({"a": 3.0, "b": 2.0}, rel=0.05)


def test_model_that_made_no_steps_has_no_speed() -> None:
    speed = Speed()
    speed.note("a", 0.0, 0.1)
    assert speed.measured() == {}


def test_speed_follows_what_was_done_lately() -> None:
    speed = Speed()
    for _ in range(100):
        speed.note("a", 1.0, HALF_LIFE_S / 10)
    for _ in range(100):
        speed.note("a", 4.0, HALF_LIFE_S / 10)
    assert speed.measured()["a"] == pytest.approx(4.0 / (HALF_LIFE_S / 10), rel=0.01)
