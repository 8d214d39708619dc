"""The configs that train, by STUDY/NAME."""

from forked import ROOT

CONFIGS = {f"{study}/{path.stem}": path for study in ("supervised", "mae", "diffusion", "locality_ablation")
           for path in sorted((ROOT / study / "configs").glob("*.yaml"))
           if not path.stem.startswith("autoencoder_")}  # fmt: skip


def study_of(name: str) -> str:
    return name.partition("/")[0]
