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
from common.attention.__main__ import examine, main, means, names_of, print_measures
from common.attention.figures import in_colours, layers_of
from common.attention.measures import AttentionMeasures, Measures
from common.errors import InputError
from common.training import progress
from common.training.trained import evaluation_batches, load
from supervised.depth_augment import resize_image
from supervised.rooms import Rooms

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
    """The weights that were evaluated, on images as they reached the net; four of the seven are drawn."""
    run = load(runs["locality_ablation"], "RUN_FOLDER")
    seen = examine(run, None, count=7, shown=[(1, 0)])
    [batch] = [batch["image"] for batch in evaluation_batches(run.data, count=7)]
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
    middle, spread = 1 + rows // 2 * columns + columns // 2, [0, 1, 3, 5]
    torch.testing.assert_close(seen.maps[0].flatten(1), maps[0][spread, 1, middle, 1:])
    torch.testing.assert_close(seen.images, in_colours(batch[spread], run.data.mean, run.data.std))


def test_a_model_of_one_token_is_refused(command: Callable) -> None:
    assert command("fit", "--run_name", "one", "--model.patch_size", "8").code == 0
    with pytest.raises(InputError, match="runs/supervised/one has one token"):
        main(["runs/supervised/one"])


def test_that_a_run_is_not_finished_is_said(runs: dict[str, Path]) -> None:
    file = runs["mae"] / "results.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "failed", "error": "no power"}))
    with pytest.warns(UserWarning, match="runs/mae/a is failed at epoch . of .: no power; its last checkpoint is used"):
        load(runs["mae"], "RUN_FOLDER")


def test_images_are_spread_over_the_split(runs: dict[str, Path]) -> None:
    """Of 300, in batches of the size that was asked for; all of them where none are counted."""
    run = load(runs["mae"], "RUN_FOLDER")

    def indices(**asked: int) -> list[list[int]]:
        return [batch["index"].tolist() for batch in evaluation_batches(run.data, **asked)]

    assert indices(count=7, most=3) == [[0, 42, 85], [128, 171, 214], [257]]
    assert indices(count=1000) == indices() == [[*range(256)], [*range(256, 300)]]


def test_what_is_drawn_does_not_depend_on_how_images_are_batched(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = load(runs["mae"], "RUN_FOLDER")
    whole = examine(run, None, 11, [(0, 0), (1, 0)])
    monkeypatch.setattr(run.data, "eval_batch_size", 2)
    parts = examine(run, None, 11, [(0, 0), (1, 0)])
    for one, other in zip((whole.images, *whole.maps, *whole.measures), (parts.images, *parts.maps, *parts.measures),
                          strict=True):  # fmt: skip
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shows", ["distance", "distance_to_last", "offset", "offset_per_query", "maps"])
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


def test_images_that_are_not_looked_at_are_not_read(runs: dict[str, Path]) -> None:
    """Every other one of ten cannot be."""
    Path("pictures").mkdir()
    for i in range(0, 10, 2):
        write_png(torch.full((1, 8, 8), 25 * i, dtype=torch.uint8), f"pictures/{i}.png")
        Path(f"pictures/{i + 1}.png").write_bytes(b"no image")
    run = load(runs["mae"], "RUN_FOLDER")
    seen = examine(run, Path("pictures"), count=5, shown=[(0, 0)])
    assert (255 * seen.images).round().amax((1, 2, 3)).tolist() == [0, 50, 100, 150]
    with pytest.raises(InputError, match="pictures/1.png: not a readable image"):
        examine(run, Path("pictures"), count=10, shown=[])


@pytest.fixture
def oblong(command: Callable) -> Path:
    """Of images of 8x4 pixels in patches of 2x2, where rows and columns cannot be taken for each other."""
    outcome = command("fit", "--run_name", "oblong", "--data.image_size", "[8,4]", "--model.patch_size", "2",
                      *TWO_STEPS)  # fmt: skip
    assert outcome.code == 0, outcome.err
    return Path("runs/supervised/oblong")


def test_maps_are_those_of_the_tokens_that_hold_the_pixels(oblong: Path) -> None:
    run = load(oblong, "RUN_FOLDER")
    batch = torch.cat([batch["image"] for batch in evaluation_batches(run.data, count=4)])
    maps = run.net.attention_maps(batch, [0])[0]
    pixels = {(0, 0): 0, (1, 1): 0, (0, 2): 1, (5, 3): 5, (6, 1): 6, (7, 3): 7}  # 4 rows of 2 tokens
    seen = examine(run, None, 4, [(1, 0), (0, 0)], list(pixels))
    expected = [maps[:, head, 1 + token, 1:].unflatten(1, (4, 2)) for head in (1, 0) for token in pixels.values()]
    for found, of_token in zip(seen.maps, expected, strict=True):
        torch.testing.assert_close(found, of_token)
    [middle] = examine(run, None, 4, [(1, 0)]).maps
    torch.testing.assert_close(middle, maps[:, 1, 1 + 5, 1:].unflatten(1, (4, 2)))


@pytest.mark.parametrize("options, titles, crosses", [
    (["--pixel", "5,3", "--pixel", "0,1"],
     ["oblong\nhead 1, layer 0\npixel 5,3", "oblong\nhead 1, layer 0\npixel 0,1"], [(3.5, 5.5), (1.5, 0.5)]),
    ([], ["oblong\nhead 1, layer 0"], [(2.5, 4.5)]),
])  # fmt: skip
def test_a_cross_lies_on_the_pixel_that_looks(
    oblong: Path, monkeypatch: pytest.MonkeyPatch, options: list[str], titles: list[str], crosses: list
) -> None:
    """(x, y) in pixels from the top left corner."""
    drawn = []
    monkeypatch.setattr(command_line, "save", lambda figure, _: drawn.append(figure))
    assert main([str(oblong), "--count", "5", "--shows", "maps", "--map", "1,0", *options]) == 0
    panels, wide = drawn[0].axes, 1 + len(crosses)
    rows = [panels[start : start + wide] for start in range(0, 4 * wide, wide)]
    assert [axes.get_title() for axes in rows[0]] == ["", *titles]
    for row in rows:
        assert [(axes.lines[0].get_xdata()[0], axes.lines[0].get_ydata()[0]) for axes in row[1:]] == crosses
        assert all(axes.images[0].get_extent() == [0, 4, 8, 0] for axes in row)


@pytest.mark.parametrize("pixel, message", [
    ("8,0", "--pixel 8,0: an image as the model sees it has rows 0 to 7 and columns 0 to 3"),
    ("0,4", "--pixel 0,4: an image as the model sees it has rows 0 to 7 and columns 0 to 3"),
    ("3", "--pixel 3: give ROW,COLUMN, counted from 0, as in --pixel 7,2"),
])  # fmt: skip
def test_pixels_outside_the_image_are_named(oblong: Path, pixel: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        main([str(oblong), "--shows", "maps", "--pixel", pixel])


def test_a_depth_model_is_looked_into(command: Callable) -> None:
    """Its images are oblong, and shown in the colours that they have in the files."""
    outcome = command("fit", "--run_name", "rooms", "--model.patch_size", "2", "--data.source.train", "4",
                      "--data.source.val", "6", "--data.image_size", "[6,8]", *TWO_STEPS, small=False,
                      config=ROOT / "supervised/configs/rooms.yaml")  # fmt: skip
    assert outcome.code == 0, outcome.err
    folder = "runs/supervised/rooms"
    assert main([folder, "--count", "3", "--shows", "maps", "--pixel", "5,7", "--measures", "a.json"]) == 0
    assert 0 < json.loads(Path("a.json").read_text())[folder]["distance_late"] < 1
    run = load(Path(folder), "RUN_FOLDER")
    seen = examine(run, None, 3, [(0, 0)])
    assert seen.maps[0].shape == (3, 3, 4)
    frames = Rooms(train=4, val=6).frames("val", Path())
    expected = torch.stack([resize_image(frames[index][0].float() / 255, (6, 8)) for index in (0, 2, 4)])
    torch.testing.assert_close(seen.images, expected, rtol=1e-5, atol=1e-6)


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


def test_means_of_the_thirds_are_printed(capsys: pytest.CaptureFixture) -> None:
    """Of three layers with two heads, each measure apart from the others."""
    layers = torch.tensor([[0.1, 0.3], [0.4, 0.6], [0.7, 0.9]])
    print_measures("a", Measures(layers, layers + 1, layers / 10, layers / 100 + 0.5))
    rows = [line.split() for line in capsys.readouterr().out.splitlines()[1:]]
    assert [row[-3:] for row in rows] == [["0.200", "0.500", "0.800"], ["1.200", "1.500", "1.800"],
                                          ["0.020", "0.050", "0.080"], ["0.502", "0.505", "0.508"]]


def test_means_of_the_thirds_by_name() -> None:
    """What common.paper compares; two layers are a middle and a late one."""
    layers = torch.tensor([[0.1, 0.3], [0.4, 0.6], [0.7, 0.9]])
    assert means(Measures(layers, layers + 1, layers / 10, layers / 100 + 0.5)) == pytest.approx({
        "distance_early": 0.2, "distance_middle": 0.5, "distance_late": 0.8,
        "distance_to_last_early": 1.2, "distance_to_last_middle": 1.5, "distance_to_last_late": 1.8,
        "offset_early": 0.02, "offset_middle": 0.05, "offset_late": 0.08,
        "offset_per_query_early": 0.502, "offset_per_query_middle": 0.505, "offset_per_query_late": 0.508,
    })  # fmt: skip
    two = means(Measures(*[layers[:2]] * 4))
    assert set(two) == {f"{measure}_{third}" for measure in Measures._fields for third in ("middle", "late")}
    assert (two["offset_middle"], two["offset_late"]) == pytest.approx((0.2, 0.5))


def test_the_measures_of_runs_are_by_their_folders(runs: dict[str, Path]) -> None:
    assert main([*map(str, runs.values()), "--count", "5", "--json", "all/a.json", "--measures", "new/m.json"]) == 0
    every, found = (json.loads(Path(name).read_text()) for name in ("all/a.json", "new/m.json"))
    assert set(found) == set(map(str, runs.values()))
    for study, folder in runs.items():  # of one layer, which is the last third
        assert set(found[str(folder)]) == {f"{measure}_late" for measure in Measures._fields}
        for measure in Measures._fields:
            heads = every[f"{study}/a"][measure][0]
            assert found[str(folder)][f"{measure}_late"] == pytest.approx(sum(heads) / len(heads))


@pytest.mark.parametrize("shows", ["distance", "distance_to_last", "offset", "offset_per_query"])
def test_the_figure_is_of_the_measure_that_was_asked_for(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, shows: str
) -> None:
    drawn = []
    monkeypatch.setattr(command_line, "by_layer_and_head", lambda tables, _: drawn.append(tables) or Figure())
    assert main([str(runs["mae"]), "--count", "3", "--shows", shows, "--json", "a.json"]) == 0
    [tables] = drawn
    numbers = json.loads(Path("a.json").read_text())
    assert tables["a"].tolist() == numbers["a"][shows]
    assert len({str(numbers["a"][name]) for name in Measures._fields}) == 4


class Clock:
    """A second for each image that the model has looked at."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, update = 100.0, AttentionMeasures.update
        monkeypatch.setattr(progress.time, "perf_counter", lambda: self.now)

        def looked(measures: AttentionMeasures, layer: int, maps: torch.Tensor) -> None:
            update(measures, layer, maps)
            self.now += len(maps)

        monkeypatch.setattr(AttentionMeasures, "update", looked)


def test_it_says_how_many_images_are_left(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Six images of a second each go by at once, and a line is due after more than ten seconds."""
    run = load(runs["mae"], "RUN_FOLDER")
    monkeypatch.setattr(run.data, "eval_batch_size", 6)
    Clock(monkeypatch)
    capsys.readouterr()
    examine(run, None, 40, [], name="mae/a")
    lines = [f"mae/a: {done} of 40 images · {40 - done} s left" for done in (12, 24, 36)]
    out, err = capsys.readouterr()
    assert err.splitlines() == lines and not out


def test_on_a_terminal_the_line_stays_in_its_place(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Also where the name looks like rich's markup; and it is gone when an error message follows."""
    for name, value in (("TERM", "xterm"), ("COLUMNS", "80")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    clock = iter([0.0, 4.0, 8.0])
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    with pytest.raises(InputError), progress.told("a[b]", 256) as tell:
        tell(64)
        tell(64)
        raise InputError("no image")
    err = capsys.readouterr().err
    assert "a[b]: 128 of 256 images · 8 s left" in err
    assert err.rstrip("\n").endswith("\x1b[2K") and "\x1b[?25h" in err  # the line is erased, the cursor is back


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
