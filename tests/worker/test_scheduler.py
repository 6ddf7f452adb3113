"""Which pending work makes the next batch."""

from dataclasses import dataclass

from worker.scheduler import pick


@dataclass
class Waiting:
    name: str
    key: str
    rows: int = 1


def names(batch: list[Waiting]) -> list[str]:
    return [one.name for one in batch]


def test_pick_takes_the_first_and_all_that_share_its_key() -> None:
    pending = [Waiting("a", "x"), Waiting("b", "y"), Waiting("c", "x")]
    assert names(pick(pending, max_rows=8)) == ["a", "c"]


def test_pick_stops_at_max_rows_but_lets_a_smaller_one_in() -> None:
    pending = [Waiting("a", "x", 2), Waiting("b", "x", 2), Waiting("c", "x", 1)]
    assert names(pick(pending, max_rows=3)) == ["a", "c"]


def test_pick_runs_a_first_that_alone_exceeds_max_rows() -> None:
    assert names(pick([Waiting("a", "x", 4)], max_rows=2)) == ["a"]


def test_pick_of_nothing_is_nothing() -> None:
    assert pick([], max_rows=2) == []
