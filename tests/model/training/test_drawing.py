"""Drawings: every shape in its colour where it is, smooth edges, every style, the same at every size."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from model.training.canvas import View
from model.training.drawing import draw, pack
from model.training.palette import COLOURS, contrast
from model.training.scenes import KINDS, SHAPES, STYLES, STYLES_OF, Background, Scene, Thing, sample_scene
from model.training.shapes import PARTS

SOFT = tuple(style for style in STYLES if style != "pixel")  # pixel art has hard edges
GREY = Background("plain", "grey", "light")


def scene_of(
    shape: str, colour: str = "red", background: Background | str = "white", style: str = "flat", **place: float
) -> Scene:
    """One thing in the middle, unless placed elsewhere."""
    if isinstance(background, str):
        background = Background("plain", background)
    where = {"x": 0.0, "y": 0.0, "radius": 0.5, "turn": 0.0} | place
    thing = Thing(shape=shape, colour=colour, size="medium", jitter=(0.0, 0.0, 0.0), **where)
    return Scene(background, (thing,), "single", style, seed=7)


def drawn(scene: Scene, height: int = 64, width: int = 64) -> Tensor:
    return draw(pack([scene]), height, width)[0]


def silhouette(scene: Scene, side: int = 64) -> Tensor:
    """Where the thing is seen. shape = (side, side)."""
    return (drawn(scene, side, side) - drawn(Scene(scene.background, (), "single"), side, side)).abs().amax(0) > 0.02


def distance(shape: str, side: int = 200) -> Tensor:
    """Of all its parts, over the square from -1 to 1, y up. shape = (side, side)."""
    line = (torch.arange(side) + 0.5) / side * 2 - 1
    x, y = line[None, :].expand(side, side), -line[:, None].expand(side, side)
    return torch.stack([part(x, y) for _, part in PARTS[shape]]).amin(0)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_shape_fills_a_good_part_of_its_circle_and_stays_in_its_box(shape: str) -> None:
    inside = distance(shape) < 0
    assert 0.25 < inside.float().mean() < 0.72
    assert not (distance(shape, 240)[[0, -1]] < -0.02).any()


@pytest.mark.parametrize("shape", sorted(set(SHAPES) - {"moon", "cloud", "mountain", "boat"}))
def test_a_symmetrical_shape_is_its_own_mirror_image(shape: str) -> None:
    assert torch.allclose(distance(shape), distance(shape).flip(1), atol=1e-4)


@pytest.mark.parametrize("shape", SHAPES)
def test_distances_grow_no_faster_than_one_a_unit(shape: str) -> None:
    steps = distance(shape).diff(dim=0).abs() / (2 / 200)
    assert steps.quantile(0.99) < 1.05


@pytest.mark.parametrize("shape", SHAPES)
def test_no_two_shapes_have_the_same_silhouette(shape: str) -> None:
    own = distance(shape, 64) < 0
    for other in set(SHAPES) - {shape}:
        differing = own ^ (distance(other, 64) < 0)
        assert differing.sum() > 0.12 * own.sum(), other


@pytest.mark.parametrize("shape", SHAPES)
def test_a_thing_is_seen_where_it_is(shape: str) -> None:
    seen = silhouette(scene_of(shape))
    rows, columns = seen.nonzero().unbind(1)
    assert abs(rows.float().mean() - 31.5) < 5
    assert abs(columns.float().mean() - 31.5) < 5


@pytest.mark.parametrize("shape", SHAPES)
def test_most_of_a_thing_is_in_the_colour_of_its_caption(shape: str) -> None:
    scene = scene_of(shape, "blue", "black", radius=0.8)
    picture, seen = drawn(scene, 128, 128), silhouette(scene, 128)
    blue = torch.tensor(COLOURS["blue"])[:, None, None] * 2 - 1
    assert ((picture - blue).abs().amax(0) < 0.05)[seen].float().mean() > 0.5


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("colour", COLOURS)
def test_a_colour_keeps_its_name_in_every_style(style: str, colour: str) -> None:
    background = Background("plain", "white" if colour != "white" else "blue")
    mask = "line" if style == "line" else "flat"
    seen = silhouette(scene_of("square", colour, background, mask, radius=0.7), 96)
    inside = drawn(scene_of("square", colour, background, style, radius=0.7), 96, 96)[:, seen]
    red, green, blue = ((inside.median(1).values + 1) / 2).tolist()
    assert min(COLOURS, key=lambda name: contrast(COLOURS[name], (red, green, blue))) == colour


@pytest.mark.parametrize("kind", KINDS)
def test_every_style_of_a_background_draws_colours_in_range(kind: str) -> None:
    background = Background(kind, "blue", second="pink", horizon=0.4, seed=3)
    scenes = [scene_of(shape, "red", background, style) for style in STYLES_OF[kind] for shape in ("star", "house")]
    pictures = draw(pack(scenes), 40, 56)
    assert pictures.shape == (len(scenes), 3, 40, 56)
    assert pictures.isfinite().all()
    assert pictures.abs().max() <= 1.001
    assert (pictures.flatten(1).std(1) > 0.05).all()


def test_each_style_draws_another_picture() -> None:
    pictures = draw(pack([scene_of("heart", "red", GREY, style) for style in STYLES]), 48, 48)
    for n, picture in enumerate(pictures):
        for other in pictures[:n]:
            assert (picture - other).abs().mean() > 0.01


def test_pictures_do_not_depend_on_those_drawn_with_them() -> None:
    scenes = pack([sample_scene(seed) for seed in range(24)])
    together = draw(scenes, 32, 32)
    alone = torch.cat([draw(scenes[n : n + 1], 32, 32) for n in range(24)])
    assert torch.allclose(together, alone, atol=1e-5)


@pytest.mark.parametrize("style", SOFT)
def test_edges_are_smooth(style: str) -> None:
    picture = drawn(scene_of("circle", "black", style=style, x=0.013, y=0.021))[0]
    assert len(picture.unique()) > 20


def test_pixel_art_has_64_cells_to_the_shorter_side() -> None:
    scenes = pack([scene_of(shape, style="pixel", x=0.1, y=-0.23) for shape in SHAPES])
    picture = draw(scenes, 128, 192)
    cells = picture.unflatten(3, (96, 2)).unflatten(2, (64, 2))
    assert torch.equal(cells.amax((3, 5)), cells.amin((3, 5)))


def test_pixel_art_of_a_symmetrical_shape_is_symmetrical_wherever_it_is() -> None:
    for x in (0.0, 0.137, -0.311):
        seen = silhouette(scene_of("sun", style="pixel", x=x, radius=0.3))
        columns = seen.any(0).nonzero()[:, 0]
        sprite = seen[:, columns[0] : columns[-1] + 1]
        assert torch.equal(sprite, sprite.flip(1))


@pytest.mark.parametrize("style", SOFT)
def test_a_picture_is_the_same_at_twice_the_size(style: str) -> None:
    kinds = [Background(kind, "teal", second="pink", horizon=0.4, seed=3) for kind in KINDS]
    scenes = pack([scene_of("flower", "yellow", background, style, x=0.2, y=0.1) for background in kinds])
    small, large = draw(scenes, 64, 96), draw(scenes, 128, 192)
    differing = (torch.nn.functional.avg_pool2d(large, 2) - small).abs().amax(1)
    assert differing.mean() < 0.006
    assert (differing > 0.15).float().mean() < 0.01


def test_left_is_left_and_top_is_top_in_every_aspect() -> None:
    scene = pack([scene_of("circle", x=-0.6, y=-0.5, radius=0.3)])
    for height, width in ((64, 64), (48, 96), (96, 48)):
        picture = draw(scene, height, width)[0]
        rows, columns = ((picture[0] > 0.5) & (picture[1] < 0)).nonzero().unbind(1)
        assert rows.float().mean() / height == pytest.approx(0.25, abs=0.03)
        assert columns.float().mean() / width == pytest.approx(0.20, abs=0.03)


def test_a_window_is_the_same_as_that_part_of_the_whole() -> None:
    scenes = pack([sample_scene(seed) for seed in range(40)])
    whole = draw(scenes, 64, 64)
    full = torch.full((40,), 64.0)
    view = View(full, full, torch.full((40,), 8.0), torch.full((40,), 24.0))
    assert torch.allclose(draw(scenes, 32, 32, view=view), whole[:, :, 8:40, 24:56], atol=1e-3)


def test_drawing_a_large_batch_in_groups_changes_nothing() -> None:
    scenes = pack([sample_scene(seed) for seed in range(3)])
    side = 576  # two such pictures are more than is painted at once
    assert torch.equal(draw(scenes, side, side)[2], draw(scenes[2:], side, side)[0])
