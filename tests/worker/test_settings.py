"""The worker's settings, from the environment."""

from pathlib import Path

import pytest
from pydantic import ValidationError

from worker.settings import BUNDLES, ModelSource, WorkerSettings, bundled

DEMO = BUNDLES / "demo"


def test_without_an_environment_the_models_that_come_along_are_served() -> None:
    assert WorkerSettings().models == bundled()
    assert ModelSource("demo", DEMO) in bundled()


def test_every_folder_with_a_card_comes_along_in_order(tmp_path: Path) -> None:
    for name in ("demo-turbo", "demo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "darkroom.json").touch()
    (tmp_path / "notes").mkdir()
    assert [source.name for source in bundled(tmp_path)] == ["demo", "demo-turbo"]


def test_models_are_named_with_their_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DARKROOM_MODELS", "demo, sd3.5-large-turbo=/w/turbo, mine:medium=/w/mine.safetensors")
    assert WorkerSettings().models == (
        ModelSource("demo", DEMO),
        ModelSource("sd3.5-large-turbo", Path("/w/turbo"), "large-turbo"),
        ModelSource("mine", Path("/w/mine.safetensors"), "medium"),
    )


@pytest.mark.parametrize(
    ("variable", "value", "says"),
    [
        ("DARKROOM_MODELS", "Bad Name=/x", "not name=path"),
        ("DARKROOM_MODELS", "nopath", "not name=path"),
        ("DARKROOM_MODELS", "a:huge=/x", "known: large"),
        ("DARKROOM_MODELS", "a=/x,a=/y", "named twice"),
        ("DARKROOM_MODELS", ",", "models"),
        ("DARKROOM_DEVICE", "tpu", "device"),
        ("DARKROOM_MAX_JOBS", "0", "max_jobs"),
        ("DARKROOM_TOKEN_BUDGET", "0", "token_budget"),
        ("DARKROOM_EMBEDDING_CACHE_MB", "-1", "embedding_cache_mb"),
        ("DARKROOM_REDIS_URL", "http://x", "redis_url"),
    ],
)
def test_a_bad_value_is_refused_with_its_name(
    variable: str, value: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValidationError, match=says):
        WorkerSettings()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", (False, False)), ("fp8", (True, True)), ("b=fp8", (False, True)), ("fp8, b=bf16", (True, False))],
)
def test_the_precision_is_of_all_models_or_of_one(text: str, expected: tuple[bool, bool]) -> None:
    settings = WorkerSettings(models="a=/a,b=/b", precision=text)  # type: ignore[arg-type]
    assert (settings.fp8("a"), settings.fp8("b")) == expected


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("fp16", "'fp16' is not bf16, fp8, name=bf16 or name=fp8"),
        ("a=fp8,a=bf16", "a is said twice"),
        ("fp8,bf16", "the precision of all models is said twice"),
        ("c=fp8", "precision names 'c', expected one of a, b"),
    ],
)
def test_a_wrong_precision_is_refused(text: str, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        WorkerSettings(models="a=/a,b=/b", precision=text)  # type: ignore[arg-type]
