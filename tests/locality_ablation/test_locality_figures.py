"""The commands that draw: permutations, accuracies, positions, segments."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from common.command import run_command
from common.errors import InputError
from common.runs import find_runs, group_runs
from locality_ablation import accuracy, picture, positions, segments
from locality_ablation.permutation import Permutation


def error(main, arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    monkeypatch.setattr("sys.argv", ["command", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        run_command(main)
    assert leaving.value.code == 2
    return capsys.readouterr().err


# Figure 4


def test_the_toy_image_has_a_colour_for_each_pixel():
    colours = picture.toy(8).flatten(1).T
    assert len({tuple(colour.tolist()) for colour in colours}) == 64


def test_each_delta_is_a_panel_of_the_permuted_image(tmp_path, monkeypatch):
    shown = []
    monkeypatch.setattr(picture, "show", lambda axis, image, patch_size, title: shown.append((title, image)))
    assert picture.main(["--figure", str(tmp_path / "new" / "f4.png")]) == 0
    assert Image.open(tmp_path / "new" / "f4.png").width > 1000
    assert [title for title, _ in shown] == ["intact", "δ = 2", "δ = 4", "δ = 8", "δ = ∞"]
    intact = shown[0][1]
    for (_, image), delta in zip(shown[1:], (2, 4, 8, "inf"), strict=True):
        order = Permutation(4, delta=delta).order((8, 8), 2, 0)
        assert torch.equal(image.flatten(1), intact.flatten(1)[:, order])
        assert (image != intact).any(0).sum() == 8


def test_a_picture_is_cut_to_its_central_square(tmp_path):
    pixels = np.zeros((20, 60, 3), np.uint8)
    pixels[:, 20:40] = 200
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    assert (picture.image_of(tmp_path / "wide.png", 20) == 200).all()
    assert picture.main(["--figure", str(tmp_path / "p.png"), "--image", str(tmp_path / "wide.png"), "--size", "32",
                         "--swaps", "100", "--delta", "inf"]) == 0  # fmt: skip


@pytest.mark.parametrize("arguments, message", [
    (["--figure", "f.txt"], "--figure f.txt: name a file that ends in .png, .pdf or .svg"),
    (["--figure", "f.png", "--swaps", "33"], "33 are more than the 32 pairs of 8x8 pixels"),
    (["--figure", "f.png", "--size", "0"], "--size 0"),
    (["--figure", "f.png", "--image", "nowhere.png"], "nowhere.png"),
    (["--figure", "f.png", "--delta", "1"], "model.permutation.delta: 1 allows no swap"),
    (["--figure", "f.png", "--delta", "2.5"], "argument --delta: 2.5 is neither a whole number, 2 or more, nor inf"),
    (["--figure", "f.png", "--patch_size", "0"], "--patch_size=0 does not divide image_size=8x8"),
])  # fmt: skip
def test_mistakes_in_a_picture_are_named(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert message in error(picture.main, arguments, monkeypatch, capsys)


# Figure 5


@pytest.fixture
def runs(tmp_path):
    """Finished run folders of a permuted classifier at 16x16 pixels."""

    def make(name: str, score: float, seed: int = 0, **permutation) -> Path:
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        permutation = {"swaps": 0, "share": None, "delta": "inf"} | permutation
        (folder / "config.yaml").write_text(yaml.safe_dump({
            "model": {"init_args": {"permutation": permutation}}, "data": {"init_args": {"image_size": 16}},
            "seed_everything": seed,
        }))  # fmt: skip
        (folder / "results.json").write_text(json.dumps({
            "status": "finished", "metrics": {"val/acc1": score}, "seed": seed, "headline": "val/acc1"}))
        return folder

    return make


def test_a_point_has_the_mean_over_seeds_and_the_share_becomes_a_count(runs, tmp_path):
    runs("a-s0", 50.0, swaps=64), runs("a-s1", 60.0, 1, swaps=64)
    runs("b-s0", 40.0, share=0.58, delta=4), runs("c-s0", 70.0)
    groups, _ = group_runs(find_runs([tmp_path / "runs"]))
    points = {group.label: accuracy.point(group) for group in groups}
    assert points["a"][:3] == (64, "inf", 128) and points["a"].accuracy[0::2] == (55.0, 2)
    assert points["b"][:3] == (74, 4, 128) and points["c"][:3] == (0, "inf", 128)


def test_lines_are_drawn_through_the_points(runs, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(accuracy, "_line", lambda axes, x, points, label: drawn.append(
        (label, x, [point.accuracy.mean for point in points])))
    for name, score, options in [("t0", 70.0, {}), ("t64", 50.0, {"swaps": 64}), ("t32", 60.0, {"swaps": 32}),
                                 ("d2", 65.0, {"swaps": 64, "delta": 2}), ("d16", 55.0, {"swaps": 64, "delta": 16})]:
        runs(name, score, **options)
    figure = str(tmp_path / "f.png")
    assert accuracy.main([str(tmp_path / "runs"), "--figure", figure]) == 0
    assert drawn == [("δ = 2", [0, 64], [70.0, 65.0]), ("δ = 16", [0, 64], [70.0, 55.0]),
                     ("δ = ∞", [0, 32, 64], [70.0, 60.0, 50.0])]
    drawn.clear()
    assert accuracy.main([str(tmp_path / "runs"), "--figure", figure, "--against", "delta"]) == 0
    assert drawn == [("T = 32 (25%)", [2], [60.0]), ("T = 64 (50%)", [0, 1, 2], [65.0, 55.0, 50.0])]


@pytest.mark.parametrize("other, message", [
    ({"swaps": 64, "pairs": "within"}, "differs from .* in model.permutation.pairs, which the figure does not show"),
    ({}, "no figure: none of the runs swaps any pixels"),
])  # fmt: skip
def test_what_one_line_would_hide_is_refused(other, message, runs, tmp_path, monkeypatch, capsys):
    folders = [runs("a", 50.0, **({"swaps": 32} if other else {})), runs("b", 40.0, **other)]
    assert re.search(message, error(accuracy.main, [*folders, "--figure", "f.png"], monkeypatch, capsys))


def test_runs_of_no_permutation_are_refused(runs, tmp_path, monkeypatch, capsys):
    folder = runs("a", 50.0)
    (folder / "config.yaml").write_text("data: {init_args: {image_size: 16}}")
    said = error(accuracy.main, [folder, "--figure", "f.png"], monkeypatch, capsys)
    assert "runs/a: not a run of locality_ablation.PermutedClassification" in said


# Positions


def saved(folder: Path, table: torch.Tensor, grid: tuple[int, int], order: torch.Tensor | None = None) -> str:
    """A checkpoint with this position table (L, D), behind a class token's row."""
    weights = {"net.pos_embed": torch.cat([torch.ones(1, table.shape[1]), table])[None]}
    weights |= {} if order is None else {"permuted.order": order}
    content = {"state_dict": weights, "loops": {}, "beyond_shapes": {"grid": list(grid), "heads": 1}, "global_step": 1}
    torch.save(content, folder)
    return str(folder)


def ring(angles: torch.Tensor) -> torch.Tensor:
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def test_a_table_that_has_found_the_grid(tmp_path):
    """Angles along a row of six: each position's most similar one is beside it."""
    found = positions.similarity(saved(tmp_path / "a", ring(torch.arange(6) * 0.2), (1, 6)))
    torch.testing.assert_close(found.cosines[1, 4], torch.tensor(0.6).cos())
    share, chance = found.neighbours_found()
    assert share == 1.0 and chance == pytest.approx((4 * 2 + 2 * 1) / 6 / 5)


def test_a_table_that_has_not(tmp_path):
    """Positions 0 and 3, 1 and 4, 2 and 5 are alike, and none of these pairs touch."""
    angles = torch.tensor([0.0, 1.0, 2.0, 0.1, 1.1, 2.1])
    assert positions.similarity(saved(tmp_path / "a", ring(angles), (1, 6))).neighbours_found()[0] == 0


def test_pixels_are_shown_where_they_come_from(tmp_path):
    order = Permutation(3).order((1, 6), 1, 0)
    table = ring(torch.arange(6) * 0.2)
    shuffled = positions.similarity(saved(tmp_path / "a", table[order], (1, 6), order))
    torch.testing.assert_close(shuffled.cosines, positions.similarity(saved(tmp_path / "b", table, (1, 6))).cosines)
    patches = positions.similarity(saved(tmp_path / "c", table, (1, 6), torch.arange(24).flip(0)))
    torch.testing.assert_close(patches.cosines, shuffled.cosines)  # an order of pixels moves no patch


def test_a_large_grid_shows_some_of_its_positions(tmp_path):
    cosines = torch.arange(40 * 40, dtype=torch.float).expand(1600, 1600) + torch.arange(1600.0)[:, None]
    canvas = positions.tiles(positions.Similarity(cosines, (40, 40)))
    assert canvas.shape == (14 * 41 - 1, 14 * 41 - 1)
    assert canvas[41, 0] == 3 * 40 and canvas[0, 41 + 2] == 3 + 2 and np.isnan(canvas[40]).all()


def test_what_has_no_positions_is_refused(tmp_path, monkeypatch, capsys):
    file = saved(tmp_path / "a", torch.randn(4, 2), (2, 2))
    torch.save(torch.load(file) | {"state_dict": {"net.head.bias": torch.zeros(2)}}, file)
    assert "its model has no position table" in error(
        positions.main, [file, "--figure", "f.png"], monkeypatch, capsys)
    torch.save({"model": {"pos_embed": torch.zeros(1, 5, 2)}}, tmp_path / "published.pth")
    with pytest.raises(InputError, match="published.pth: not a checkpoint of this suite"):
        positions.similarity(str(tmp_path / "published.pth"))
    for nothing in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(InputError, match=f"^{nothing}: not a run folder with a checkpoint"):
            positions.similarity(str(nothing))


def test_the_picture_of_positions(tmp_path, capsys):
    folder = saved(tmp_path / "a", ring(torch.arange(6) * 0.2), (1, 6))
    assert positions.main([folder, "--figure", str(tmp_path / "new" / "p.png")]) == 0
    assert "most similar position is a neighbour: 100% (chance 33%)" in capsys.readouterr().out
    assert Image.open(tmp_path / "new" / "p.png").width > 300


# Segments


def test_patches_and_mean_colours():
    image = torch.arange(3 * 4 * 6, dtype=torch.uint8).view(3, 4, 6)
    labels = segments.patches(image, 2).labels
    assert labels[0].tolist() == [0, 0, 1, 1, 2, 2] and labels[2].tolist() == [3, 3, 4, 4, 5, 5]
    colours = segments.mean_colours(image, labels)
    expected = image[:, 2:4, 4:6].float().mean((1, 2)) / 255
    np.testing.assert_allclose(colours[3, 5], expected.numpy(), atol=1e-6)


def test_segments_are_drawn_over_pictures(tmp_path, monkeypatch, capsys):
    pixels = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "noise.png")
    few = ["--size", "32", "--patch_size", "8", "--iterations", "2"]
    assert segments.main([str(tmp_path / "noise.png"), "--figure", str(tmp_path / "s.png"), *few]) == 0
    assert Image.open(tmp_path / "s.png").height > 500
    said = error(segments.main, [tmp_path / "noise.png", "--figure", "s.png", "--size", "30"], monkeypatch, capsys)
    assert "does not divide image_size=30x30" in said
