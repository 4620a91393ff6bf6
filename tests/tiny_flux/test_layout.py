"""Labels of image tokens against the rendered image."""

from __future__ import annotations

import random
from collections.abc import Callable

import torch

from tiny_flux import scenes
from tiny_flux.data import training_description
from tiny_flux.layout import LayoutHead, layout


def labels_of(some: list[scenes.Scene]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    geometry, shape, color = torch.zeros(len(some), 4, 3), torch.zeros(len(some), 4), torch.zeros(len(some), 4)
    for i, scene in enumerate(some):
        for j, t in enumerate(scene.things):
            geometry[i, j] = torch.tensor((t.x, t.y, t.radius))
            shape[i, j], color[i, j] = scenes.SHAPES.index(t.shape), list(scenes.COLORS).index(t.color)
    background = torch.tensor([list(scenes.BACKGROUNDS).index(scene.background) for scene in some])
    return layout(background, geometry, shape, color)


def test_tokens_of_a_scene() -> None:
    star, circle = scenes.Thing("star", "pink", 40, 200, 30), scenes.Thing("circle", "red", 200, 60, 20)
    shapes, colors, offsets = labels_of([scenes.Scene("black", (star, circle))])
    grid = shapes.view(16, 16)
    assert grid[12, 2] == scenes.SHAPES.index("star")
    assert grid[3, 12] == scenes.SHAPES.index("circle")
    assert (grid == scenes.SHAPES.index("star")).sum() == 9
    assert grid[0, 0] == len(scenes.SHAPES)
    assert colors.view(16, 16)[12, 2] == list(scenes.COLORS).index("pink")
    assert colors.view(16, 16)[0, 0] == len(scenes.COLORS) + list(scenes.BACKGROUNDS).index("black")
    assert torch.allclose(offsets.view(16, 16, 3)[12, 2] * 32, torch.tensor([0.0, 0.0, 30.0]))  # token centre (40, 200)
    assert torch.allclose(offsets.view(16, 16, 3)[3, 12] * 32, torch.tensor([0.0, 4.0, 20.0]))  # (200, 56)
    assert offsets.view(16, 16, 3)[0, 0].eq(0).all()


def test_colours_are_those_of_the_rendered_image() -> None:
    rng = random.Random(0)
    some = [scenes.realize(training_description(rng), rng) for _ in range(100)]
    shapes, colors, offsets = labels_of(some)
    image = (scenes.render(some) * 255).permute(0, 2, 3, 1)
    palette = torch.tensor(list((scenes.COLORS | scenes.BACKGROUNDS).values()))
    owned = shapes != len(scenes.SHAPES)
    x, y = (torch.arange(256) % 16) * 16 + 8, (torch.arange(256) // 16) * 16 + 8
    absent = scenes.Thing("", "", -99, -99, 0)
    reach = torch.tensor([[(t.x, t.y, t.radius) for t in (*s.things, *[absent] * 3)][:4] for s in some])
    distance = torch.hypot(x[:, None] - reach[:, None, :, 0], y[:, None] - reach[:, None, :, 1])
    far = (distance > 1.25 * reach[:, None, :, 2]).all(-1)  # a square's corners lie outside of its radius
    assert not (far & owned).any()
    assert torch.allclose(image[:, 8::16, 8::16].flatten(1, 2)[far], palette[colors[far]].float())
    # An object's centre is its colour's, whatever the shape; the offset leads there from each of its tokens.
    scene, token = owned.nonzero(as_tuple=True)
    centre = (torch.stack([token % 16, token // 16], 1) + 0.5) * 16 + offsets[scene, token, :2] * 32
    x, y = centre.floor().long().unbind(1)
    assert (image[scene, y, x] - palette[colors[scene, token]]).abs().max() < 1
    assert {o for s in some for o in [t.shape for t in s.things]} == {*scenes.SHAPES}


def test_the_head_learns_what_is_in_the_states(fitted: Callable) -> None:
    torch.manual_seed(0)
    rng = random.Random(0)
    labels = labels_of([scenes.realize(training_description(rng), rng) for _ in range(8)])
    shapes, colors, offsets = labels
    known = torch.cat([torch.eye(7)[shapes], torch.eye(12)[colors], offsets], -1)
    head = LayoutHead(known.shape[-1])
    first, last = fitted(head, known, labels, lr=0.1)
    assert last < 0.05 < 3 < first
