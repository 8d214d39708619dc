"""Shape bias: hand-computed cases, ImageNet's categories, files of others, and a model of the suite's own shapes."""

import csv
import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from torchvision.io import write_png

from common.errors import InputError
from common.training import progress
from supervised.shape_bias import (
    CATEGORIES,
    Count,
    Decision,
    answers,
    by_category,
    main,
    measured,
    read_decisions,
    total,
)

ROOT = Path(__file__).parent.parent.parent
COUNTS = {"airplane": 1, "bear": 4, "bicycle": 2, "bird": 49, "boat": 5, "bottle": 7, "car": 3, "cat": 6, "chair": 4,
          "clock": 3, "dog": 109, "elephant": 2, "keyboard": 2, "knife": 1, "oven": 1, "truck": 8}  # fmt: skip
MEMBERS = {
    "airplane": [[404]], "bear": [range(294, 298)], "bicycle": [[444, 671]],
    "bird": [[8], range(10, 17), range(18, 21), range(22, 25), range(80, 84), range(87, 97), range(98, 101),
             range(127, 134), range(135, 146)],
    "boat": [[472, 554, 625, 814, 914]], "bottle": [[440, 720, 737, 898, 899, 901, 907]], "car": [[436, 511, 817]],
    "cat": [range(281, 287)], "chair": [[423, 559, 765, 857]], "clock": [[409, 530, 892]],
    "dog": [range(152, 192), range(193, 204), range(205, 227), range(228, 242), range(243, 251), range(252, 258), [259],
            range(261, 264), range(265, 269)],
    "elephant": [[385, 386]], "keyboard": [[508, 878]], "knife": [[499]], "oven": [[766]],
    "truck": [[555, 569, 656, 675, 717, 734, 864, 867]],
}  # fmt: skip


def test_the_categories_are_those_of_geirhos() -> None:
    """All indices, from 0, as RECIPES 3.5 lists them; ends of a range are not in it."""
    assert CATEGORIES == {name: [index for part in parts for index in part] for name, parts in MEMBERS.items()}
    assert {name: len(members) for name, members in CATEGORIES.items()} == COUNTS
    assert len({index for members in CATEGORIES.values() for index in members}) == 207


def test_a_category_has_the_mean_probability_of_its_members() -> None:
    """And not their sum, by which 109 kinds of dogs would win."""
    probabilities = torch.zeros(3, 1000)
    probabilities[0, CATEGORIES["dog"]] = 0.5 / 109
    probabilities[0, 404] = 0.01  # the airplane
    probabilities[1, [385, 386]] = torch.tensor([0.3, 0.0])  # 0.15 for the elephant
    probabilities[1, 499] = 0.14  # the knife
    probabilities[2, 0] = 0.99  # a tench takes no part
    probabilities[2, 766] = 0.001  # the oven
    assert answers(probabilities) == ["airplane", "elephant", "oven"]


def test_counts_and_bias_by_hand() -> None:
    decisions = [
        Decision("a", "cat", "dog", "cat"), Decision("b", "cat", "dog", "cat"), Decision("c", "cat", "dog", "dog"),
        Decision("d", "cat", "bear", "oven"), Decision("e", "bear", "cat", "cat"),
        Decision("f", "cat", "cat", "cat"), Decision("g", "bear", "bear", "bear"),  # the same cue twice
    ]  # fmt: skip
    counts = by_category(decisions)
    assert counts == {"bear": Count(0, 1, 0), "cat": Count(2, 1, 1)}
    assert counts["cat"].bias == pytest.approx(200 / 3) and counts["cat"].either == 75
    # Pooled counts: the mean of 0 % and 66.7 % would be 33.3 %.
    assert total(counts) == Count(2, 2, 1) and total(counts).bias == 50
    assert Count(0, 0, 3).bias is None and Count(0, 0, 3).either == 0
    assert measured(Count(2, 2, 1)) == {"shape_bias": 50, "shape_or_texture": 80}
    assert measured(Count(0, 0, 3)) == {"shape_or_texture": 0}


def published(path: Path) -> None:
    """As the published files are: by subject, with all 1280 trials of one."""
    names = list(CATEGORIES)
    with open(path, "w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["subj", "session", "trial", "rt", "object_response", "category", "condition", "imagename"])
        for i in range(1280):
            shape, texture = names[i // 80], names[i // 5 % 16]
            answer = shape if i % 5 < 2 else texture if i % 5 == 2 else "na"
            table.writerow(["subject-01", 1, i + 1, 0.5, answer, shape, "cr", f"{shape}{i % 10 + 1}-{texture}3.png"])


def test_published_decisions_are_read_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    published(tmp_path / "human.csv")
    decisions = read_decisions(tmp_path / "human.csv")["subject-01"]
    assert len(decisions) == 1280
    counts = by_category(decisions)
    assert len(counts) == 16 and set(counts.values()) == {Count(30, 15, 30)}  # 75 of each category count
    assert sum(total(counts)) == 1200 and total(counts).bias == pytest.approx(200 / 3)
    assert main(["--decisions", str(tmp_path / "human.csv"), "--figure", str(tmp_path / "bias.png")]) == 0
    assert "66.7" in capsys.readouterr().out and (tmp_path / "bias.png").stat().st_size > 10_000


def test_a_name_that_comes_twice_is_refused(tmp_path: Path) -> None:
    """Else the second would stand for both."""
    for name in ("a.csv", "b.csv"):
        published(tmp_path / name)
    files = [word for name in ("a.csv", "b.csv") for word in ("--decisions", str(tmp_path / name))]
    with pytest.raises(InputError, match="subject-01: of several runs or subjects"):
        main(files)


def test_a_file_that_is_cut_within_a_row_is_named(tmp_path: Path) -> None:
    published(tmp_path / "a.csv")
    text = (tmp_path / "a.csv").read_text()
    (tmp_path / "a.csv").write_text(text[: text.rindex(",")])
    with pytest.raises(InputError, match="a.csv, line 1281: imagename None does not end in -TEXTURE1.png"):
        read_decisions(tmp_path / "a.csv")


HEAD = "subj,session,trial,rt,object_response,category,condition,imagename\n"


@pytest.mark.parametrize("rows, said", [
    ("", "holds no decision"),
    (",1,1,1,,,0,x_cat7-dog1.png\n", "line 2: subj and category and object_response is empty"),
    ("a,1,1,1,cat,cat,0,x_cat7-dog1.png\n" * 2, "line 3: trial 1 of a was there before"),
    (f"a,1,1,1,cat,cat,0,{'x' * 200_000}-dog1.png\n", "is not a CSV file"),
])
def test_rows_that_are_no_decisions_are_named(tmp_path: Path, rows, said) -> None:
    (tmp_path / "a.csv").write_text(HEAD + rows)
    with pytest.raises(InputError, match=f"--decisions: .*a.csv.* {said}"):
        read_decisions(tmp_path / "a.csv")


def test_a_name_is_shown_as_it_stands(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Where it looks like rich's markup, and like one of matplotlib's formulas that is none."""
    (tmp_path / "a.csv").write_text(HEAD + "a[/b]$x^{$,1,1,NaN,cat,cat,0,x_cat7-dog1.png\n")
    assert main(["--decisions", str(tmp_path / "a.csv"), "--figure", str(tmp_path / "a.png")]) == 0
    assert "a[/b]$x^{$" in capsys.readouterr().out


def test_a_mark_at_the_beginning_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("\ufeff" + HEAD + "a,1,1,NaN,na,cat,0,x_cat7-dog1.png\n", encoding="utf-8")
    assert [decision.answer for decision in read_decisions(tmp_path / "a.csv")["a"]] == ["na"]


@pytest.fixture
def shapes(command: Callable) -> Path:
    outcome = command("fit", "--run_name", "both", "--data.source.label", "both", "--data.source.train", "256",
                      "--data.image_size", "8", config=ROOT / "supervised/configs/shapes.yaml")  # fmt: skip
    assert outcome.code == 0, outcome.err
    return Path("runs/supervised/both")


def test_a_model_of_shapes_sees_those_whose_cues_disagree(shapes: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(shapes), "--csv", "own.csv"]) == 0
    printed = capsys.readouterr().out
    own = read_decisions(Path("own.csv"))["both"]
    assert len(own) == 1120 and all(decision.shape != decision.texture for decision in own)
    assert len({(decision.shape, decision.texture) for decision in own}) == 56
    assert main(["--decisions", "own.csv"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] in printed  # what was written counts as what was seen


def test_it_says_how_many_pictures_are_left(
    shapes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """Of 1120, 32 at a time: those that take four seconds have a line every twelve, as it is due after ten."""
    clock = itertools.count(0.0, 4.0)
    monkeypatch.setattr(progress.time, "perf_counter", lambda: next(clock))
    assert main([str(shapes)]) == 0
    told = [line for line in capsys.readouterr().err.splitlines() if " left" in line]
    assert told == [f"both: {32 * done} of 1120 images · {4 * (35 - done)} s left" for done in range(3, 36, 3)]


def test_an_imagenet_model_is_asked_about_files(command: Callable, capsys: pytest.CaptureFixture) -> None:
    """Of a model that always sees a cat, by the probability of class 281: it goes by shape where that is a cat.

    By the mean of the logits, before the softmax, it would be an elephant, whose two classes are 6 and 6 where the six
    of cats are 9, 0, 0, 0, 0 and 0.
    """
    for wnid in range(1000):
        folder = Path(f"data/images/n{wnid:08}")
        folder.mkdir(parents=True)
        for i in range(3):
            write_png(torch.full((3, 8, 8), (wnid + i) % 256, dtype=torch.uint8), str(folder / f"{i}.png"))
    outcome = command("fit", "--run_name", "imagenet", "--data.image_size", "8", "--trainer.max_epochs", "1",
                      "--model.optim.warmup_epochs", "0", "--trainer.limit_train_batches", "1", "--data.augment", "{}",
                      config=ROOT / "supervised/configs/image_folder.yaml")  # fmt: skip
    assert outcome.code == 0, outcome.err
    logits = torch.zeros(1000)
    logits[281], logits[385], logits[386] = 9, 6, 6
    assert answers(logits.softmax(0)[None]) == ["cat"] and answers(logits[None]) == ["elephant"]
    checkpoint = Path("runs/supervised/imagenet/checkpoints/last.ckpt")
    content = torch.load(checkpoint, weights_only=True)
    for weights in [content["state_dict"]] + ([content["ema"]["state_dict"]] if "ema" in content else []):
        for name in weights:
            if name.endswith("head.bias"):
                weights[name] = logits
            elif name.endswith("head.weight"):
                weights[name].zero_()
    torch.save(content, checkpoint)
    for pair in ("cat1-dog2", "cat2-oven1", "dog1-cat1", "bear1-truck9", "cat3-cat4"):
        Path("stimuli", pair.split("-")[0][:-1]).mkdir(parents=True, exist_ok=True)
        write_png(torch.zeros(3, 20, 20, dtype=torch.uint8), f"stimuli/{pair.split('-')[0][:-1]}/{pair}.png")
    assert main(["runs/supervised/imagenet", "--stimuli", "stimuli", "--measures", "new/measures.json"]) == 0
    assert json.loads(Path("new/measures.json").read_text()) == {
        "runs/supervised/imagenet": {"shape_bias": pytest.approx(200 / 3), "shape_or_texture": 75}}
    assert capsys.readouterr().out.splitlines()[-2].split() == ["imagenet", "all", "2", "1", "1", "66.7", "75.0"]
    write_png(torch.zeros(3, 20, 20, dtype=torch.uint8), "stimuli/cow1-dog1.png")
    with pytest.raises(InputError, match="stimuli/cow1-dog1.png is not named SHAPE1-TEXTURE2.png"):
        main(["runs/supervised/imagenet", "--stimuli", "stimuli"])


def test_what_cannot_be_asked_is_refused(shapes: Path, command: Callable) -> None:
    assert command("fit", "--run_name", "digits").code == 0
    for words, message in [
        ([], "name a run of a classifier, or --decisions"),
        (["runs/supervised/digits"], "has 10 classes; the categories are made of ImageNet's 1000"),
        (["nowhere"], "RUN_FOLDER: nowhere is no run folder"),
        ([str(shapes), "--figure", "a.txt"], "name a file that ends in"),
        ([str(shapes), str(shapes), "--csv", "a.csv"], "holds the decisions of one run"),
        (["--decisions", "a.csv", "--measures", "m.json"], "--measures m.json: holds what runs are measured by"),
    ]:
        with pytest.raises(InputError, match=message):
            main(words)
    config = yaml.safe_load((shapes / "config.yaml").read_text())
    config["data"]["init_args"]["source"]["init_args"]["label"] = "shape"
    (shapes / "config.yaml").write_text(yaml.safe_dump(config))
    with pytest.raises(InputError, match="trained on shapes by shape, which decides beforehand"):
        main([str(shapes)])
    Path("a.csv").write_text("subj,trial\n1,2\n")
    with pytest.raises(InputError, match="a.csv lacks the columns category"):
        main(["--decisions", "a.csv"])
