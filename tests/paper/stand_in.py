"""What the stand-in of a study exhibits, and what it was called with."""

from pathlib import Path

CHAIN = {
    "arms": {
        "S/2": {"model.patch_size": 2},
        "before": {"config": "mae/*", "model.patch_size": 1},
        "S/1": {"config": "mae/*_finetune", "runs": {"init_from": "before"}, "model.patch_size": 1},
    },
    "scales": {"demo": {"config": "tiny_set", "seeds": 2}},
}


def calls() -> list[str]:
    return Path("calls").read_text().splitlines()
