"""Which pending work makes the next batch."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from worker.contract.job import PRIORITIES, Priority
from worker.scheduler import PATIENCE, Room, pick


@dataclass
class Waiting:
    name: str
    key: str = "x"
    rows: int = 1
    tokens: int = 1
    priority: Priority = "normal"
    opening: bool = False
    since: float = 0.0
    own_s: float = 1.0
    left_s: float = 1.0


def picked(*pending: Waiting, now: float = 0.0, rows: int = 8, tokens: int = 100) -> str:
    return "".join(one.name for one in pick(pending, now, lambda one: Room(rows, tokens)))


def test_nothing_is_picked_of_nothing() -> None:
    assert picked() == ""


def test_the_job_with_the_least_left_goes_first_and_takes_all_that_share_its_key() -> None:
    long, short, other = Waiting("l", left_s=9), Waiting("s", left_s=2), Waiting("o", "y", left_s=5)
    assert picked(long, other, short) == "sl"


def test_equal_jobs_go_in_the_order_in_which_their_work_came_up() -> None:
    assert picked(Waiting("b", since=2), Waiting("a", since=1), now=3) == "ab"


def test_a_batch_holds_no_more_rows_than_there_is_room_for_but_lets_a_smaller_one_in() -> None:
    assert picked(Waiting("a", rows=2), Waiting("b", rows=2), Waiting("c"), rows=3) == "ac"


def test_a_batch_holds_no_more_tokens_than_its_budget() -> None:
    assert picked(*(Waiting(name, tokens=40) for name in "abc"), tokens=100) == "ab"


@pytest.mark.parametrize("room", [{"rows": 2}, {"tokens": 2}])
def test_the_first_always_runs_even_if_it_exceeds_the_room(room: dict[str, int]) -> None:
    assert picked(Waiting("a", rows=4, tokens=4), **room) == "a"


def test_a_higher_class_goes_first_however_much_it_has_left() -> None:
    low, normal = Waiting("l", priority="low", left_s=1), Waiting("n", "y", left_s=5)
    assert picked(low, normal) == "n"
    assert picked(low, normal, Waiting("h", "z", priority="high", left_s=99)) == "h"


def test_work_that_opens_a_job_goes_before_steps_of_its_class() -> None:
    step, opening = Waiting("s", left_s=1), Waiting("o", "y", opening=True, left_s=99)
    assert picked(step, opening) == "o"
    assert picked(step, opening, Waiting("h", "z", priority="high", left_s=99)) == "h"


@pytest.mark.parametrize("priority", PRIORITIES)
def test_work_past_its_patience_goes_before_every_class(priority: Priority) -> None:
    due = 3.0 * PATIENCE[priority]
    old = Waiting("o", priority=priority, own_s=3.0, left_s=999)
    fresh = Waiting("f", "y", priority="high", since=due - 0.1, left_s=0.1)
    assert picked(old, fresh, now=due - 0.01) == "f"
    assert picked(old, fresh, now=due) == "o"


def test_of_the_overdue_the_longest_overdue_goes_first() -> None:
    early, late = Waiting("e", since=5, left_s=99), Waiting("l", "y", since=6, left_s=1)
    assert picked(late, early, now=100) == "e"


@dataclass
class Stream:
    """A GPU for which work keeps coming up; time passes by as much as each batch takes."""

    now: float = 0.0
    pending: list[Waiting] = field(default_factory=list)
    waited: list[tuple[float, Waiting, float]] = field(default_factory=list)

    def turn(self) -> None:
        batch = pick(self.pending, self.now, lambda one: Room(4, 100))
        for one in batch:
            self.pending.remove(one)
            self.waited.append((self.now - one.since, one, PATIENCE[one.priority] * one.own_s))
        self.now += max((one.own_s for one in batch), default=0.1)


WORK = st.builds(
    Waiting,
    name=st.just(""),
    key=st.sampled_from("wxyz"),
    rows=st.integers(1, 4),
    priority=st.sampled_from(PRIORITIES),
    opening=st.booleans(),
    own_s=st.floats(0.1, 3.0),
    left_s=st.floats(0.1, 50.0),
)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(WORK, max_size=3), min_size=10, max_size=50))
def test_no_work_waits_longer_than_its_patience_and_one_batch_for_each_that_waits_beside_it(
    arrivals: list[list[Waiting]],
) -> None:
    """At most eight pieces wait at a time, as the worker holds a bounded number of jobs."""
    most, stream = 8, Stream()
    for batch in arrivals:
        for one in batch[: most - len(stream.pending)]:
            one.since = stream.now
            stream.pending.append(one)
        stream.turn()
    while stream.pending:
        stream.turn()
    for waited, _, patience in stream.waited:
        assert waited <= patience + most * 3.0


@pytest.mark.parametrize(("priority", "rival"), [("low", "high"), ("normal", "high"), ("normal", "normal")])
def test_a_long_job_keeps_a_share_of_the_gpu_under_an_endless_stream_of_short_ones(
    priority: Priority, rival: Priority
) -> None:
    stream, steps = Stream(), 0
    long = Waiting("long", "long", priority=priority, left_s=999)
    stream.pending.append(long)
    for _ in range(400):
        if not any(one.name == "short" for one in stream.pending):
            stream.pending.append(Waiting("short", "short", priority=rival, since=stream.now, left_s=1))
        stream.turn()
        if long not in stream.pending:
            steps += 1
            long.since = stream.now
            stream.pending.append(long)
    assert steps >= 400 / (PATIENCE[priority] + 2) - 1
