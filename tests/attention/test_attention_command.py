"""python -m common.attention on trained runs: classifiers under a permutation, MAE, files of one's own."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from small import TWO_STEPS
from torchvision.io import write_png

from common.attention import __main__ as command_line
from common.attention.__main__ import examine, main, names_of, print_measures
from common.attention.figures import in_colours, layers_of
from common.attention.measures import AttentionMeasures, Measures
from common.errors import InputError
from common.training.trained import evaluation_batches, load

ROOT = Path(__file__).parent.parent.parent
CONFIGS = {"locality_ablation": ["--model.permutation.share", "1.0", "--model.optim.ema", "0.5"], "mae": []}


@pytest.fixture
def runs(command: Callable) -> dict[str, Path]:
    """A short training of each study: a permuted classifier with an average of its weights, and MAE."""
    for study, options in CONFIGS.items():
        outcome = command("fit", "--run_name", "a", *options, study=study, config=ROOT / study / "configs/digits.yaml")
        assert outcome.code == 0, outcome.err
    return {study: Path("runs") / study / "a" for study in CONFIGS}


def test_it_sees_what_the_model_saw(runs: dict[str, Path]) -> None:
    """The weights that were evaluated, on images as they reached the net."""
    run = load(runs["locality_ablation"], "RUN_FOLDER")
    seen = examine(run, None, count=7, shown=[(1, 0)])
    batch = next(iter(evaluation_batches(run.data)))["image"][:7]
    average = torch.load(run.checkpoint, weights_only=True)["ema"]["state_dict"]
    assert torch.equal(run.net.pos_embed, average["pos_embed"])
    permuted = run.experiment.permuted(batch)
    assert not torch.equal(permuted, batch)
    maps = run.net.attention_maps(permuted, range(run.net.depth))
    expected = AttentionMeasures(run.net.grid, 1)
    for layer, of_layer in maps.items():
        expected.update(layer, of_layer)
    for one, other in zip(seen.measures, expected.compute(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
    rows, columns = run.net.grid
    middle = 1 + rows // 2 * columns + columns // 2
    torch.testing.assert_close(seen.maps[0].flatten(1), maps[0][:4, 1, middle, 1:])


@pytest.mark.parametrize("shows", ["distance", "offset", "offset_per_query", "maps"])
def test_two_runs_side_by_side(runs: dict[str, Path], shows: str) -> None:
    options = ["--count", "5", "--map", "1,0", "--shows", shows, "--figure", "out/a.png", "--json", "a.json"]
    assert main([*map(str, runs.values()), *options]) == 0
    numbers = json.loads(Path("a.json").read_text())
    assert set(numbers) == {"locality_ablation/a", "mae/a"}  # both runs are called a
    assert all(len(run["offset"]) == 1 and len(run["offset"][0]) == 2 for run in numbers.values())
    assert Path("out/a.png").stat().st_size > 10_000


def test_images_of_ones_own(runs: dict[str, Path]) -> None:
    Path("pictures").mkdir()
    for i in range(3):
        picture = torch.randint(256, (1, 20, 30), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
        write_png(picture, f"pictures/{i}.png")
    run = load(runs["mae"], "RUN_FOLDER")
    seen = examine(run, Path("pictures"), count=10, shown=[(0, 0)])
    assert len(seen.images) == len(seen.maps[0]) == 3 and seen.images.shape[1:] == (1, 8, 8)


@pytest.mark.parametrize("study, config, options", [
    ("locality_ablation", "shapes", ["--model", "locality_ablation.SegmentClassification",
                                     "--data", "locality_ablation.SegmentedImages",
                                     "--data.segmentation", "locality_ablation.Slic"]),
    ("diffusion", "digits", ["--data.autoencoder", "null", "--data.image_size", "8"]),
    ("diffusion", "autoencoder_digits", []),
])  # fmt: skip
def test_models_of_another_kind_are_refused(command: Callable, study: str, config: str, options: list[str]) -> None:
    outcome = command("fit", "--run_name", "a", *options, *TWO_STEPS, small=False, study=study,
                      config=ROOT / study / f"configs/{config}.yaml")  # fmt: skip
    assert outcome.code == 0, outcome.err
    with pytest.raises(InputError, match="has no attention over the pixels or patches of images"):
        main([f"runs/{study}/a"])


def test_maps_are_over_pictures_that_all_runs_saw(runs: dict[str, Path], command: Callable) -> None:
    assert command("fit", "--run_name", "b", *TWO_STEPS, small=False, study="supervised",
                   config=ROOT / "supervised/configs/shapes.yaml").code == 0
    both = [str(runs["mae"]), "runs/supervised/b", "--count", "5"]
    with pytest.raises(InputError, match="was trained on shapes.*, and those before it on .*digits.*--images"):
        main([*both, "--shows", "maps"])
    assert main(both) == 0


def test_runs_of_one_name_are_told_apart() -> None:
    for typed, names in [(["r/mae/a", "r/mae/b"], ["a", "b"]), (["r/mae/a", "r/other/a"], ["mae/a", "other/a"]),
                         (["r/mae/a", "s/mae/a"], ["r/mae/a", "s/mae/a"])]:
        assert names_of([Path(name) for name in typed]) == names


def test_thirds_of_the_layers() -> None:
    assert [list(layers_of(third, 12)) for third in range(3)] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert [len(layers_of(third, 7)) for third in range(3)] == [2, 2, 3]


def test_the_printed_means_are_those_of_the_thirds(capsys: pytest.CaptureFixture) -> None:
    """Of three layers with two heads, each measure apart from the others."""
    layers = torch.tensor([[0.1, 0.3], [0.4, 0.6], [0.7, 0.9]])
    print_measures("a", Measures(layers, layers + 1, layers / 10, layers / 100 + 0.5))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[-3:] for row in rows] == [["0.200", "0.500", "0.800"], ["0.020", "0.050", "0.080"],
                                          ["0.502", "0.505", "0.508"]]


@pytest.mark.parametrize("shows", ["distance", "offset", "offset_per_query"])
def test_the_figure_is_of_the_measure_that_was_asked_for(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, shows: str
) -> None:
    drawn = []
    monkeypatch.setattr(command_line, "by_layer_and_head", lambda tables, _: drawn.append(tables) or Figure())
    assert main([str(runs["mae"]), "--count", "3", "--shows", shows, "--json", "a.json"]) == 0
    [tables] = drawn
    numbers = json.loads(Path("a.json").read_text())
    assert tables["a"].tolist() == numbers["a"][shows]
    assert len({str(numbers["a"][name]) for name in ("distance", "offset", "offset_per_query")}) == 3


def test_pictures_are_in_their_own_colours() -> None:
    images = torch.tensor([0.0, 1.0, -1.0]).view(1, 3, 1, 1)
    shown = in_colours(images, (0.5, 0.4, 0.3), (0.2, 0.1, 0.25))
    torch.testing.assert_close(shown.flatten(), torch.tensor([0.5, 0.5, 0.05]))


@pytest.mark.parametrize("options, message", [
    (["--map", "9,0"], "--map 9,0: the model has heads 0 to"), (["--map", "1"], "--map 1: give HEAD,LAYER"),
    (["--count", "0"], "--count 0: give 1 or more"),
    (["--figure", "a.txt"], "--figure a.txt: name a file that ends in"),
    (["--images", "nowhere"], "data.images: nowhere is not a folder"),
])  # fmt: skip
def test_mistakes_are_named(runs: dict[str, Path], options: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        main([str(runs["mae"]), *options])
