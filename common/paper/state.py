"""How far an arm's run is, by its folder."""

from __future__ import annotations

from common.paper.exhibits import RUNS, Start
from common.runs import changed_source, read_run


def state(start: Start) -> str:
    """finished, not tested (or by other samples than this arm's), unfinished, failed, unreadable, missing, or what a
    changed YAML leaves behind: another config, and weights other than those that its source has now. Or its curves are
    over another x axis than those of the runs beside it.
    """
    # A default folder has the config's name and the seed in its own: where there is none, no parser is needed to know.
    names = f"{start.arm.config.stem}*-s{start.seed}*"
    if "run_name" not in start.arm.overrides and not any((RUNS / start.arm.study).glob(names)):
        return "missing"
    folder, expected = start.located
    if not (folder / "results.json").is_file():
        return "missing"
    run = read_run(folder)
    if run.status != "unreadable" and run.config != expected:
        return "another config"
    if run.results.get("x_axis", "step") != start.arm.overrides.get("x_axis", "step"):
        return "over another x axis"
    if changed_source(run.results):
        return "of other weights"
    if run.status != "finished" or not start.judged_by:
        return run.status
    record = run.results.get("evaluation", {})
    otherwise = "solver" in record and any(record.get(key) != value for key, value in start.sampling.items())
    return "not tested" if otherwise or start.judged_by not in run.results["metrics"] else run.status


def own_seconds(start: Start) -> float:
    """What a run's own training took."""

    def told(start: Start) -> float:
        return read_run(start.located[0]).results.get("train_seconds") or 0.0

    return max(told(start) - told(start.before), 0.0) if start.before else told(start)
