"""python -m common.weights: the files from elsewhere that the suite can use, where they go, and whether they are there.

Nothing is fetched, and no study needs any of them for its embedded configs. A checksum is compared where its publisher,
or several projects that pinned the file, made one known; "unknown" means that none is. Of such a file only the
container is opened, which notices a truncated download, and size and sha256 are printed for two people to compare.
"""

from __future__ import annotations

import hashlib
import json
import zipfile
from pathlib import Path
from typing import NamedTuple

from common.command import Parser, run_command
from common.errors import InputError

FOUND, MISSING, OTHER, DAMAGED = "found", "missing", "another checksum", "damaged"
UNKNOWN = "unknown"
LEGACY = bytes.fromhex("80028a0a6cfc9c46f9206aa850192e")  # torch.save before 1.6 began with its magic number, pickled


class External(NamedTuple):
    """A file that others publish.

    Args:
        name: what `--check` calls it.
        file: where it goes below `--root`.
        use: what the suite does with it.
        source: project and file name there.
        checksum: `sha256:` or `md5:` and the hexadecimal digits, or their first ones where no more are published.
        beside: a file of the same folder without which it is not read.
    """

    name: str
    file: str
    use: str
    source: str
    checksum: str = UNKNOWN
    beside: str | None = None


LDM, SD_VAE = "github.com/CompVis/latent-diffusion", "with its config.json beside it"
MAE = "github.com/facebookresearch/mae"

FILES = [
    External("vgg16", "weights/vgg16-397923af.pth", "LPIPS, perceptual loss and measure of autoencoders: features",
             "torchvision, VGG16_Weights.IMAGENET1K_V1: vgg16-397923af.pth",
             "sha256:397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0"),
    External("lpips", "weights/lpips_vgg.pth", "LPIPS: weights of the features' layers",
             "github.com/richzhang/PerceptualSimilarity: lpips/weights/v0.1/vgg.pth; where it is missing, "
             "torchmetrics' copy of it is taken",
             "sha256:a78928a0af1e5f0fcb1f3b9e8f8c3a2a5a3de244d830ad5c1feddc79b8432868"),
    External("inception", "weights-inception-2015-12-05-6726825d.pth",
             "FID, sFID, Inception score, precision and recall of generated images",
             "github.com/toshas/torch-fidelity, release v0.2.0: weights-inception-2015-12-05-6726825d.pth",
             "sha256:6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"),
    External("adm-reference", "weights/VIRTUAL_imagenet256_labeled.npz",
             "the reference of these metrics for ImageNet at 256x256",
             "github.com/openai/guided-diffusion, evaluations: VIRTUAL_imagenet256_labeled.npz"),
    External("vq-f8", "weights/vq-f8/model.ckpt", "latents of the paper's DiT: VQ, 8x8 pixels a cell, 4 channels",
             f"{LDM}: vq-f8.zip, model.ckpt in it"),
    External("sd-vae-ft-ema", "weights/sd-vae-ft-ema/diffusion_pytorch_model.safetensors",
             "latents of the original DiT: KL, 8x8 pixels a cell, 4 channels",
             f"Hugging Face, stabilityai/sd-vae-ft-ema: diffusion_pytorch_model.safetensors, {SD_VAE}",
             beside="config.json"),
    External("sd-vae-ft-mse", "weights/sd-vae-ft-mse/diffusion_pytorch_model.safetensors",
             "the same with another decoder, of DiT's published FID",
             f"Hugging Face, stabilityai/sd-vae-ft-mse: diffusion_pytorch_model.safetensors, {SD_VAE}",
             "sha256:a1d993488569e928462932c8c38a0760b874d166399b14414135bd9c42df5815", "config.json"),
    External("dit-xl-2", "weights/DiT-XL-2-256x256.pt", "a trained DiT, to sample from or to compare with",
             "github.com/facebookresearch/DiT: DiT-XL-2-256x256.pt"),
    External("mae-base", "weights/mae_pretrain_vit_base.pth", "--init_from of ViT-Base: MAE's pre-training",
             f"{MAE}: mae_pretrain_vit_base.pth", "md5:8cad7c"),
    External("mae-large", "weights/mae_pretrain_vit_large.pth", "--init_from of ViT-Large: MAE's pre-training",
             f"{MAE}: mae_pretrain_vit_large.pth", "md5:b8b06e"),
    External("mae-base-visualize", "weights/mae_visualize_vit_base.pth",
             "--init_from of ViT-Base with its decoder, to reconstruct: MAE on plain pixels",
             f"{MAE}, for the pictures of its demo: dl.fbaipublicfiles.com/mae/visualize/mae_visualize_vit_base.pth"),
    External("mae-base-finetuned", "weights/mae_finetuned_vit_base.pth", "ViT-Base fine-tuned by MAE, to evaluate",
             f"{MAE}, FINETUNE.md: mae_finetuned_vit_base.pth", "md5:1b25e9"),
    External("mae-large-finetuned", "weights/mae_finetuned_vit_large.pth", "ViT-Large fine-tuned by MAE, to evaluate",
             f"{MAE}, FINETUNE.md: mae_finetuned_vit_large.pth", "md5:51f550"),
]  # fmt: skip


def state(external: External, root: Path) -> str:
    """Whether the file is below `root`: `found`, `missing`, `another checksum`, `damaged`, or `no` file that belongs
    beside it.

    Reads all of it where a checksum is known.
    """
    path = root / external.file
    if not path.is_file():
        return MISSING
    if external.beside and not path.with_name(external.beside).is_file():
        return f"no {external.beside}"
    if external.checksum == UNKNOWN:
        return DAMAGED if damage(path) else FOUND
    algorithm, _, known = external.checksum.partition(":")
    return FOUND if _digest(path, algorithm).startswith(known) else OTHER


def damage(path: Path) -> str | None:
    """Why the container of weights or arrays does not open, or None; nothing in it is loaded."""
    if path.suffix == ".safetensors":
        return _damage_of_safetensors(path)
    with open(path, "rb") as file:
        if path.suffix != ".npz" and file.read(len(LEGACY)) == LEGACY:
            return None  # no part of such a file says how long it is
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
        return f"truncated, or another file: {error}"
    member = ".npy" if path.suffix == ".npz" else "data.pkl"
    return None if any(name.endswith(member) for name in names) else f"a zip archive without {member}"


def _damage_of_safetensors(path: Path) -> str | None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(min(length, size)))
            end = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
            expected = 8 + length + end
        except (ValueError, LookupError, TypeError, AttributeError):
            return "truncated, or another file: it has no header of safetensors"
    return None if size == expected else f"{size:,} bytes, of {expected:,} by its header"


def _digest(path: Path, algorithm: str) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).hexdigest()


def _measured(path: Path) -> str:
    return f"{path.stat().st_size:,} bytes, sha256:{_digest(path, 'sha256')}"


def describe(external: External, root: Path) -> str:
    """Lines about a file; the first, with the state, is for grep."""
    found, path, checksum = state(external, root), root / external.file, external.checksum
    if found == FOUND and checksum == UNKNOWN:
        checksum += f"; here {_measured(path)}"
    return (f"{found:<16}  {external.name:<19}  {path}\n"
            f"  for       {external.use}\n  from      {external.source}\n  checksum  {checksum}")


def check(name: str, root: Path) -> str:
    """What is said of a file that is found; one that is missing, damaged, or another than the published is refused."""
    external = next((external for external in FILES if external.name == name), None)
    if external is None:
        raise InputError(f"--check {name}: not known; choose one of {', '.join(file.name for file in FILES)}")
    found, path = state(external, root), root / external.file
    if found != FOUND:
        why = damage(path) if found == DAMAGED else f"expected {external.checksum}"
        raise InputError(f"--check {name}: {path}: {found} ({why}); it comes from {external.source}")
    return f"{name}: {found}" + (f", {_measured(path)}" if external.checksum == UNKNOWN else "")


def _parser() -> Parser:
    parser = Parser("python -m common.weights", __doc__)
    parser.add_argument("--root", type=Path, default=Path("data"), metavar="DIR",
                        help="the folder that --data.root names; default: data")
    parser.add_argument("--check", metavar="NAME", help="this file alone; the exit code is 2 unless it is found")
    return parser


def main(arguments: list[str]) -> int:
    options = _parser().parse_args(arguments)
    if options.check:
        print(check(options.check, options.root))
    else:
        print("\n".join(describe(external, options.root) for external in FILES))
    return 0


if __name__ == "__main__":
    run_command(main)
