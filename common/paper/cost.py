"""What an arm costs, by formula: its model is built without numbers, and the data need not be at hand.

Importing Lightning and building takes seconds, so the prices of the paper's own arms lie beside this file, in
costs.json; `python -m common.paper.cost` computes them anew. An arm that is not in there, or whose config has changed
since, is priced when it is asked for.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from common.advice import quieten
from common.command import run_command
from common.paper.exhibits import ROOT, Start, read_exhibits

if TYPE_CHECKING:
    from torch import nn

    from common.data.loader import GlobalBatchData
    from common.training.module import Experiment

FILE = Path(__file__).with_name("costs.json")
H200 = 790e12  # FLOP/s of sustained bf16 matrix products, the ceiling of the estimate
CORES = 60e9  # FLOP/s that the small models of demo reached in fp32 on two cores (RESULTS.md)


class Price(NamedTuple):
    """Of one run: images that it trains on, counted each time; FLOPs of an image's training step and of the samples
    that its test makes; parameters, and bytes that an image keeps for its backward.
    """

    images: int
    training_flops: int
    test_flops: int
    parameters: int
    activation_bytes: int

    @property
    def flops(self) -> int:
        return self.images * self.training_flops + self.test_flops

    @property
    def state_bytes(self) -> int:
        """Weights, gradients, two moments and an average in fp32."""
        return 20 * self.parameters

    def text(self) -> str:
        numbers = (self.parameters / 1e6, self.images / 1e6, self.activation_bytes / 1e6)
        parameters, images, activations = (f"{n:,.0f}" if n >= 100 else f"{n:.3g}" for n in numbers)
        return (f"{parameters} M parameters, {images} M images, {self.flops:.2g} FLOP, memory "
                f"{self.state_bytes / 1e9:.2g} GB and {activations} MB an image")


def duration(flops: float, scale: str) -> str:
    """About how long on two cores at scale demo; otherwise how long on one H200 at the least."""
    if scale == "demo":
        minutes = max(flops / CORES / 60, 0.1)
        return f"{minutes:.0f} min" if minutes >= 10 else f"{minutes:.2g} min"
    hours = flops / H200 / 3600
    return f"{hours:,.0f} H200 h" if hours >= 10 else f"{hours:.2g} H200 h"


def price(start: Start) -> Price:
    stored = _stored().get(_key(start))
    return Price(**stored["price"]) if stored and stored["config"] == _digest(start) else computed(start)


def computed(start: Start) -> Price:
    """By building the model; takes the time of importing Lightning once, and a third of a second a run."""
    module, data, net = _built(start)
    images = data.without_files()
    epochs = start.parsed().options.trainer.max_epochs
    if start.before:
        epochs -= start.before.parsed().options.trainer.max_epochs
    batch = min(data.batch_size, images)
    cost = module.cost(net)
    tested = module.test_flops(net) if start.judged_by else 0
    return Price(epochs * (images // batch) * batch, cost.training_flops, tested, cost.parameters,
                 cost.activation_bytes)


def _built(start: Start) -> tuple[Experiment, GlobalBatchData, nn.Module]:
    import torch

    module, data = start.parsed().parts()
    if "data.autoencoder" in start.sources:
        data.autoencoder = _built(start.sources["data.autoencoder"])[2]
    data.without_files()
    with torch.device("meta"):
        return module, data, module.built(data)


@functools.cache
def _stored() -> dict[str, dict]:
    return json.loads(FILE.read_text()) if FILE.is_file() else {}


def _key(start: Start) -> str:
    """The same for all seeds, and for arms of several ids that are one."""
    overrides = {key: value for key, value in start.arm.overrides.items() if key != "seed_everything"}
    sources = {option: _key(source) for option, source in sorted(start.sources.items())}
    parts = [os.path.relpath(start.arm.config, ROOT), json.dumps(overrides, sort_keys=True)]
    return " ".join(parts + [json.dumps(sources)] * bool(sources) + ["tested"] * bool(start.judged_by))


def _digest(start: Start) -> str:
    texts = [file.read_bytes() for file in with_extended(start.arm.config)]
    texts += [_digest(source).encode() for source in start.sources.values()]
    return hashlib.sha256(b"".join(texts)).hexdigest()[:12]


def with_extended(config: Path) -> Iterator[Path]:
    """A config, and those that it starts from."""
    yield config
    if base := re.search(r"^extends: *(\S+)", config.read_text(encoding="utf-8"), re.MULTILINE):
        yield from with_extended(config.parent / base[1])


def main(arguments: list[str]) -> int:
    quieten()
    starts = {_key(start): start for exhibit in read_exhibits().values() for scale in exhibit.scales.values()
              for start in scale.starts(1)}
    prices = {}
    for number, (key, start) in enumerate(sorted(starts.items()), 1):
        made = computed(start)
        prices[key] = {"config": _digest(start), "price": made._asdict()}
        print(f"{number} of {len(starts)}: {key}: {made.text()}", file=sys.stderr)
    FILE.write_text(json.dumps(prices, indent=0) + "\n")
    print(f"written: {os.path.relpath(FILE)}")
    return 0


if __name__ == "__main__":
    run_command(main)
