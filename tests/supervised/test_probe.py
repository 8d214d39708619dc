"""The norm in front of a probe's head: torch's batch norm, over all processes."""

import os
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from supervised.probe import FeatureNorm

FEATURES = 3 + 2 * torch.randn(12, 5, generator=torch.Generator().manual_seed(0))


def reference(batches: list[torch.Tensor]) -> tuple[list[torch.Tensor], torch.nn.BatchNorm1d]:
    norm = torch.nn.BatchNorm1d(5, eps=1e-6, affine=False)
    return [norm(batch) for batch in batches], norm


def test_it_is_torchs_batch_norm() -> None:
    norm = FeatureNorm(5)
    for ours, theirs in zip([norm(FEATURES), norm(2 * FEATURES)], reference([FEATURES, 2 * FEATURES])[0], strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    expected = reference([FEATURES, 2 * FEATURES])[1]
    assert norm.state_dict().keys() == expected.state_dict().keys() and not list(norm.parameters())
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(norm.state_dict()[name], value, msg=name)
    torch.testing.assert_close(norm.eval()(FEATURES), expected.eval()(FEATURES))


def part(rank: int, folder: str) -> None:
    torch.set_num_threads(1)  # a fork must not use its parent's pool
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo"}
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    norm = FeatureNorm(5)
    rows = FEATURES[:4] if rank == 0 else FEATURES[4:]
    torch.save({"out": norm(rows), "state": norm.state_dict()}, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_normalise_by_all_images(tmp_path: Path) -> None:
    mp.start_processes(part, (str(tmp_path),), nprocs=2, start_method="fork")
    found = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    [expected], norm = reference([FEATURES])
    torch.testing.assert_close(torch.cat([each["out"] for each in found]), expected, atol=1e-5, rtol=1e-5)
    for each in found:
        for name, value in norm.state_dict().items():
            torch.testing.assert_close(each["state"][name], value, msg=name)
