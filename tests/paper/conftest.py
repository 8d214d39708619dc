"""Studies of the test's own, with one exhibit and a stand-in for their commands."""

from pathlib import Path

import pytest
import yaml

from common.paper import cost
from common.paper.exhibits import Start, read_exhibits

PRICES = {patch: cost.Price(1_000_000, 6_000_000 // patch**2, 0, 1000, 10) for patch in (1, 2, 4)}


@pytest.fixture
def exhibits(tmp_path, monkeypatch):
    """One exhibit of two arms in study folders of the test's own; the working directory is those folders' parent."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cost, "computed", lambda start: PRICES[start.arm.overrides.get("model.patch_size", 1)])
    for file in ("supervised/configs/tiny_set.yaml", "mae/configs/tiny_set.yaml", "mae/configs/tiny_set_finetune.yaml"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text(f"# Where lr of {file} comes from.\n#\n# Steps: 9.\nmodel: {{}}\n")

    def read(**changes):
        """With these keys changed, or left out where they are None."""
        entry = {
            "shows": "one against two", "metric": "val/acc1",
            "paper": {"differences": {"S/1 - S/2": 1.5}, "unknown": "both values"},
            "arms": {"S/2": {"model.patch_size": 2}, "S/1": {"model.patch_size": 1, "model.drop_path": None}},
            "scales": {
                "demo": {"config": "tiny_set", "set": {"model.patch_size": 4, "data.image_size": [8, 8]}, "seeds": 2},
                "paper": {"config": "tiny_set", "arms": {"only": {"model.qk_norm": True}}},
            },
            **changes,
        }
        entry = {key: value for key, value in entry.items() if value is not None}
        (tmp_path / "supervised" / "paper.yaml").write_text(yaml.safe_dump({"X1": entry}, sort_keys=False))
        return read_exhibits(tmp_path)

    return read


@pytest.fixture
def folders(monkeypatch):
    """Run folders where the test says, so that what is done with them is tested apart from the command line."""

    def located(start):
        patch = start.arm.overrides.get("model.patch_size", 1)
        sources = {option: str(source.located[0]) for option, source in start.sources.items()}
        copy = "-copy" * ("copy_of" in sources)
        return (Path("runs", start.arm.study, f"{start.arm.config.stem}-p{patch}-s{start.seed}{copy}"),
                {"seed_everything": start.seed, "model.patch_size": patch, **sources})

    monkeypatch.setattr(Start, "located", property(located))


@pytest.fixture
def study(exhibits, folders, tmp_path):
    """A stand-in for `python -m STUDY fit|test`: it writes a finished run folder, or leaves with exit code 3.

    With a file `early` the pre-training leaves before its end, with exit code 0; with `early2` every training of patch
    size 2 does. `test` adds `test/fid`. And one for a command that draws.
    """
    (tmp_path / "drawing.py").write_text('''
import json, pathlib, sys
with open("calls", "a") as calls:
    print("drawing", *sys.argv[1:], file=calls)
if pathlib.Path("undrawable").exists():
    sys.exit(2)
if "--measures" in sys.argv:
    folders = sys.argv[1 : sys.argv.index("--figure")]
    measures = {folder: {"shape_bias": 50 + 4 * ("-p1-" in folder) + int(folder[-1])} for folder in folders}
    path = pathlib.Path(sys.argv[sys.argv.index("--measures") + 1])
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(measures))
figure = pathlib.Path(sys.argv[sys.argv.index("--figure") + 1])
figure.parent.mkdir(parents=True, exist_ok=True)
figure.write_bytes(b"a picture")
''')
    (tmp_path / "printing.py").write_text("import sys; print('| seven |\\n| --- |\\n|', sys.argv[1], '|')")
    for name in ("supervised", "mae"):
        (tmp_path / name / "__init__.py").touch()
        (tmp_path / name / "__main__.py").write_text('''
import json, pathlib, sys
word, options = sys.argv[1], dict(zip(sys.argv[2::2], sys.argv[3::2]))
patch, seed = int(options.get("--model.patch_size", 1)), int(options["--seed_everything"])
study, config = pathlib.Path(__file__).parent.name, pathlib.Path(options["--config"]).stem
source, original = options.get("--init_from"), options.get("--copy_of")
folder = pathlib.Path(f"runs/{study}/{config}-p{patch}-s{seed}" + "-copy" * bool(original))
with open("calls", "a") as calls:
    print(*["test"] * (word == "test"), folder, *[source] * bool(source), file=calls)
if pathlib.Path("broken").exists() and patch == 1:
    sys.exit(3)
if word == "test":
    results = json.loads((folder / "results.json").read_text())
    results["metrics"] |= {"test/fid": 10 * patch + seed + 5 * bool(original), "test/sfid": 1.0}
    results["evaluation"] = {"samples": 8}
    (folder / "results.json").write_text(json.dumps(results))
    sys.exit(0)
folder.mkdir(parents=True, exist_ok=True)
before = study == "mae" and not source
metrics = {"val/loss": 0.5} if before else {"val/acc1": 90 + 4 / patch + seed}
early = before and pathlib.Path("early").exists() or patch == 2 and pathlib.Path("early2").exists()
results = {"status": "running" if early else "finished",
           "seed": seed, "metrics": metrics, "headline": next(iter(metrics)), "higher_is_better": not before,
           "patch_size": patch, "dataset": "digits", "epochs": 1, "batch_size": 8}
(folder / "results.json").write_text(json.dumps(results))
trained = {"seed_everything": seed, "model": {"patch_size": patch}, "init_from": source, "copy_of": original}
(folder / "config.yaml").write_text(json.dumps(trained))
''')
    return exhibits
