"""How cost grows: the formulas' parts, the fit, the limits, and what is written. Times are given, not taken."""

import time
from pathlib import Path

import pytest
import torch

from common.benchmark import growth
from common.benchmark.growth import Case, Fit, Point, Work
from common.model import SIZES
from common.model.flops import training_flops

TRUE = Fit(linear=1 / 50e9, attention=1 / 30e9, fixed=4e-3)


def points(measured: int, fit: Fit = TRUE) -> list[Point]:
    """All cases with the times of a fit, of which so many of the first size's are measured."""
    made = []
    for number, case in enumerate(growth.cases(depth=2)):
        work = Work.of(case)
        if measured <= number < len(growth.IMAGES):
            made.append(Point(case, work, left_out="takes about 99 s"))
        else:
            made.append(Point(case, work, (fit.seconds(work),) * 3, int(work.kept)))
    return made


def stub(monkeypatch: pytest.MonkeyPatch, seconds: dict[Case, list[float]]) -> list[Case]:
    """Steps that take these seconds, the last of them again and again; returns the cases as they take steps."""
    taken: list[Case] = []

    def begin(case: Case):
        def step() -> float:
            taken.append(case)
            return seconds[case].pop(0) if len(seconds[case]) > 1 else seconds[case][0]

        return step, 7

    monkeypatch.setattr(growth, "begin", begin)
    return taken


def test_the_images_are_those_of_64_to_50176_tokens() -> None:
    cases = growth.cases(depth=3)
    tokens = [Work.of(case).tokens for case in cases if case.size == growth.SIZE]
    assert tokens == [64, 196, 256, 784, 1024, 3072, 4096, 9216, 16384, 50176]
    assert {case.size for case in cases if case.image == growth.IMAGE} == {"nano", "tiny", "small", "base", "large"}
    assert {case.depth for case in cases} == {3} and len(set(cases)) == len(cases) == 14


@pytest.mark.parametrize("size", growth.WIDTHS)
def test_a_part_grows_with_the_tokens_and_the_other_with_their_square(size: str) -> None:
    one, two = (Work.of(Case(size, (8, side), 2)) for side in (8, 16))
    head = 3 * 2 * SIZES[size].width * growth.CLASSES
    assert two.linear - head == 2 * (one.linear - head) and two.attention == 4 * one.attention
    with torch.device("meta"):
        assert one.linear + one.attention == training_flops(Case(size, (8, 8), 2).net())
    assert two.kept == 2 * one.kept


@pytest.mark.parametrize("true", [TRUE, Fit(1 / 20e9, 1 / 60e9, 0.0), Fit(1 / 20e9, 0.0, 1e-3)])
def test_the_fit_recovers_the_speeds(true: Fit) -> None:
    works = [Work.of(case) for case in growth.cases(2)]
    assert Fit.of(works, [true.seconds(work) for work in works]) == pytest.approx(true, rel=1e-6, abs=1e-16)


def test_the_fit_bears_noise_and_is_never_negative() -> None:
    works = [Work.of(Case("tiny", image, 2)) for image in growth.IMAGES]
    noise = [1.05, 0.95] * (len(works) // 2)
    fit = Fit.of(works, [TRUE.seconds(work) * factor for work, factor in zip(works, noise, strict=True)])
    assert [fit.seconds(work) for work in works] == pytest.approx([TRUE.seconds(work) for work in works], rel=0.05)
    # Time that grows more slowly than any part of the formula would have a negative part besides.
    assert min(Fit.of(works, [work.tokens**0.5 for work in works])) >= 0
    assert min(Fit.of(works[:1], [0.1])) >= 0 and Fit.of(works[:1], [0.1]).seconds(works[0]) == pytest.approx(0.1)


def test_exponent_of_a_power_law() -> None:
    assert growth.exponent([1, 10, 50], [3 * x**1.7 for x in (1, 10, 50)]) == pytest.approx(1.7)


@pytest.mark.parametrize("size, image, depth", [("tiny", (8, 8), 2), ("tiny", (12, 16), 3), ("small", (8, 8), 1)])
def test_measured_bytes_are_the_formula_s(size: str, image: tuple[int, int], depth: int) -> None:
    case = Case(size, image, depth)
    step, kept = growth.begin(case)
    assert kept == pytest.approx(Work.of(case).kept, rel=0.02)
    assert step() > 0


def test_a_step_trains_all_parameters_and_is_clocked(monkeypatch: pytest.MonkeyPatch) -> None:
    nets = []
    monkeypatch.setattr(growth, "training_step", lambda net, *_: nets.append(net) or (lambda: time.sleep(0.02) or 0.0))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert growth.begin(Case("nano", (4, 4), 1))[0]() >= 0.02  # more threads: by the clock
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert growth.begin(Case("nano", (4, 4), 1))[0]() < 0.02  # one: what the processor did, which slept
    assert all(net.training and all(p.requires_grad for p in net.parameters()) for net in nets)


def test_what_would_take_too_long_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    cases = growth.cases(2)
    taken = stub(monkeypatch, {case: [TRUE.seconds(Work.of(case))] for case in cases})
    found = growth.measured(cases, rounds=2, limit=10.0)
    out = {point.case for point in found if point.left_out}
    assert out == {case for case in cases if TRUE.seconds(Work.of(case)) > 10} == set(cases[7:10])
    assert not out & set(taken) and all(not point.times and point.kept is None for point in found if point.left_out)
    seconds = TRUE.seconds(Work.of(cases[9]))
    caption = growth.caption(found)
    assert f"tiny at 224x224 (takes about {seconds:,.0f} s)" in caption and "tiny at 64x64" not in caption
    rows = [dict(zip(growth.COLUMNS, row, strict=True)) for row in growth.rows(found)]
    assert rows[9]["ms (quartiles)"] == rows[9]["MB kept"] == "left out" and rows[9]["steps"] == "0"
    assert rows[9]["ms by fit"] == f"{1e3 * seconds:,.0f}"
    assert "tiny at 224x224: takes about" in capsys.readouterr().err


def test_what_would_keep_too_much_is_left_out_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = growth.cases(2)[:3]
    stub(monkeypatch, {case: [0.1] for case in cases})
    found = growth.measured(cases, rounds=1, limit=10.0, memory=Work.of(cases[1]).kept)
    assert [point.left_out for point in found] == ["", "", "keeps 0.0 GB"]


def test_steps_take_turns_until_the_time_is_up(monkeypatch: pytest.MonkeyPatch) -> None:
    short, long, longest = (Case("tiny", (8, side), 2) for side in (8, 10, 12))
    taken = stub(monkeypatch, {short: [5.0, 0.5, 1.0, 2.0, 0.5], long: [2.0, 3.0], longest: [6.0]})
    found = growth.measured([short, long, longest], rounds=4, limit=10.0)
    # The first steps warm up. 5 + 0.5 + 1 + 2 leave no time for another 2, and 2 + 3 + 3 none for another 3; after 6
    # there is none for a second step, so that the first counts.
    assert [point.times for point in found] == [(0.5, 1.0, 2.0), (3.0, 3.0), (6.0,)]
    assert taken == [short, long, longest, short, long, short, long, short]
    assert found[0].seconds == 1.0 and [point.kept for point in found] == [7, 7, 7]


def test_rows_and_caption_of_given_times() -> None:
    found = points(10)
    rows = [dict(zip(growth.COLUMNS, row, strict=True)) for row in growth.rows(found)]
    assert [row["ms (quartiles)"].split()[0] for row in rows] == [row["ms by fit"] for row in rows]
    assert rows[4] | {"model": "tiny", "pixels": "32x32", "tokens": "1,024", "GFLOP": "10.27",
                      "attention's share": "47%", "steps": "3", "MB by formula": "25.17"} == rows[4]
    caption = growth.caption(found)
    assert "the 10 point(s) of tiny: 50.0 GFLOP/s in linear layers, 30.0 GFLOP/s in attention, and 4.0 ms" in caption
    assert "From 4,096 tokens on" in caption and "memory as that of 1.00" in caption and "Left out" not in caption
    exponent = float(caption.partition("power of ")[2].split()[0])
    assert 1.9 < exponent < 2.0
    slow = [point._replace(times=(2 * point.seconds,)) if point.case.size == "base" else point for point in found]
    assert "-50% base" in growth.caption(slow) and "+0% nano" in growth.caption(slow)


@pytest.mark.parametrize("measured", [1, 2])
def test_few_points_are_fitted_too(measured: int) -> None:
    found = points(measured)
    assert len(growth.rows(found)) == 14
    assert f"over the {measured} point(s)" in growth.caption(found) and "power" not in growth.caption(found)


def test_the_figure_is_written_and_tells_what_was_measured_from_what_was_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    drawn, save = [], growth.save
    monkeypatch.setattr(growth, "save", lambda figure, path: drawn.append(figure) or save(figure, path))
    file, found = tmp_path / "new" / "growth.png", points(6)
    growth.draw(found, file)
    assert file.read_bytes().startswith(b"\x89PNG") and 20_000 < file.stat().st_size < 150_000
    lines = [{line.get_label(): line for line in axes.get_lines()} for axes in drawn[0].axes]
    assert list(lines[0]["measured, tiny"].get_xdata()) == [point.work.tokens for point in found[:6]]
    milliseconds = [1e3 * point.seconds for point in found[:6]]
    assert list(lines[0]["measured, tiny"].get_ydata()) == pytest.approx(milliseconds)
    assert max(lines[0]["fit, the sum of:"].get_xdata()) <= 3072 < max(lines[0]["extrapolated"].get_xdata()) == 50176
    assert max(lines[2]["formula: 64 bytes per token, channel and block"].get_xdata()) == 50176
    for panel, values in ((1, lambda point: 1e3 * point.seconds), (3, lambda point: point.kept / 1e6)):
        measured = lines[panel]["measured, 1,024 tokens"]
        assert list(measured.get_xdata()) == [48, 192, 384, 768, 1024]
        sizes = sorted((p for p in found if p.case.image == (32, 32)), key=lambda point: point.work.width)
        assert list(measured.get_ydata()) == pytest.approx([values(point) for point in sizes])
    assert list(lines[3]["formula: 64 bytes per token, channel and block"].get_ydata()) == pytest.approx(
        [point.work.kept / 1e6 for point in sizes])


def test_one_small_case_from_end_to_end(tmp_path: Path) -> None:
    cases = [Case("tiny", (4, 4), 1), Case("tiny", (4, 8), 1), Case("nano", (4, 4), 1)]
    found = growth.measured(cases, rounds=3, limit=10.0)
    assert [len(point.times) for point in found] == [3, 3, 3] and all(point.seconds > 0 for point in found)
    assert growth.rows(found) and growth.caption(found)
