"""python -m common.weights: what is found, missing or another file."""

import hashlib
import re
import shutil
import sys
import zipfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from forked import ROOT
from safetensors.torch import save_file

from common.command import run_command
from common.errors import InputError
from common.weights import FILES, External, check, damage, main, state
from diffusion.evaluation import load_extractor
from diffusion.features import INCEPTION_FILE
from diffusion.perceptual import LINEAR, LPIPS
from diffusion.published import load_autoencoder

# Of the three bytes "abc", as the algorithms' own standards print them.
SHA256 = "sha256:ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
MD5 = "md5:900150983cd24fb0d6963f7d28e17f72"


@pytest.mark.parametrize("checksum", [SHA256, MD5, "md5:900150"])
def test_a_file_is_compared_with_the_known_digits(tmp_path, checksum):
    external = External("x", "weights/x.pth", "", "", checksum)
    assert state(external, tmp_path) == "missing"
    file = tmp_path / "weights" / "x.pth"
    file.parent.mkdir()
    assert state(external._replace(file="weights"), tmp_path) == "missing"  # a folder is no file
    file.write_bytes(b"abc")
    assert state(external, tmp_path) == "found"
    file.write_bytes(b"abd")
    assert state(external, tmp_path) == "another checksum"
    assert state(external._replace(checksum="unknown"), tmp_path) == "damaged"


def saved(file: Path) -> Path:
    """A small file in the format that its name has; .ckpt is torch's older one, without zip."""
    file.parent.mkdir(parents=True, exist_ok=True)
    weights = {"weight": torch.arange(300.0), "bias": torch.zeros(2)}
    if file.suffix == ".safetensors":
        save_file(weights, file)
    elif file.suffix == ".npz":
        np.savez(file, np.zeros((20, 4, 4, 3), np.uint8))
    else:
        torch.save(weights, file, _use_new_zipfile_serialization=file.suffix != ".ckpt")
    return file


@pytest.mark.parametrize("name", ["x.pt", "x.npz", "x.safetensors"])
def test_a_container_that_is_cut_off_anywhere_is_noticed(tmp_path, name):
    file = saved(tmp_path / name)
    assert damage(file) is None
    content = file.read_bytes()
    for length in (*range(0, len(content), 11), len(content) - 1):
        file.write_bytes(content[:length])
        assert damage(file), length


def test_an_older_checkpoint_is_known_by_its_first_bytes(tmp_path):
    file = saved(tmp_path / "x.ckpt")
    assert not zipfile.is_zipfile(file) and damage(file) is None
    content = file.read_bytes()
    file.write_bytes(content[:14])
    assert "truncated, or another file" in damage(file)
    file.with_suffix(".npz").write_bytes(content)
    assert "truncated, or another file" in damage(file.with_suffix(".npz"))


@pytest.mark.parametrize("header", [b"3", b"[]", b"{}", b'{"x": {"data_offsets": "0"}}', b'{"x": 1}', b"\xff"])
def test_a_header_of_anything_else_is_none_of_safetensors(tmp_path, header):
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header)
    assert "no header of safetensors" in damage(file)


def test_an_archive_of_anything_else_is_not_taken(tmp_path):
    """As vq-f8.zip itself in the place of the checkpoint that is in it."""
    for name in ("x.ckpt", "x.npz"):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr("model.ckpt", "weights")
        assert "a zip archive without" in damage(tmp_path / name)


@pytest.mark.parametrize("name", [external.name for external in FILES if external.checksum == "unknown"])
def test_without_a_known_checksum_size_and_sha256_are_told(tmp_path, capsys, name):
    external = next(external for external in FILES if external.name == name)
    file = saved(tmp_path / external.file)
    if external.beside:
        file.with_name(external.beside).write_text("{}")
    found = f"{file.stat().st_size:,} bytes, sha256:{hashlib.sha256(file.read_bytes()).hexdigest()}"
    assert main(["--root", str(tmp_path), "--check", name]) == 0
    assert capsys.readouterr().out == f"{name}: found, {found}\n"
    assert main(["--root", str(tmp_path)]) == 0
    assert f"checksum  unknown; here {found}\n" in capsys.readouterr().out
    file.write_bytes(b"abc")
    with pytest.raises(InputError, match=f"--check {name}: .*: damaged .truncated, or another file: .*it comes from"):
        check(name, tmp_path)
    assert main(["--root", str(tmp_path)]) == 0
    assert f"damaged           {name} " in capsys.readouterr().out


@pytest.mark.parametrize("name", ["sd-vae-ft-ema", "sd-vae-ft-mse"])
def test_weights_in_diffusers_layout_need_their_config(tmp_path, name):
    external = next(external for external in FILES if external.name == name)
    file = tmp_path / external.file
    file.parent.mkdir(parents=True)
    file.write_bytes(b"abc")
    with pytest.raises(InputError, match=f"--check {name}: .*safetensors: no config.json .*its config.json beside it"):
        check(name, tmp_path)
    with pytest.raises(InputError, match="config.json: there is no such file"):
        load_autoencoder(file.parent)
    (file.parent / "config.json").write_text("{}")
    assert state(external._replace(checksum=SHA256), tmp_path) == "found"
    file.unlink()
    assert state(external, tmp_path) == "missing"


def test_files_that_the_commands_name_are_listed():
    texts = [ROOT / "README.md", *ROOT.glob("*/configs/*.yaml")]
    named = {name for text in texts for name in re.findall(r"[\w-]+\.(?:pth|pt|safetensors)\b", text.read_text())}
    assert {"mae_visualize_vit_base.pth", "DiT-XL-2-256x256.pt"} <= named
    assert named <= {Path(external.file).name for external in FILES}


def test_the_lpips_weights_that_torchmetrics_installs_are_the_published_ones(tmp_path):
    package = Path(find_spec("torchmetrics").submodule_search_locations[0])
    external = next(external for external in FILES if external.name == "lpips")
    file = tmp_path / external.file
    file.parent.mkdir(parents=True)
    shutil.copyfile(package / "functional/image/lpips_models/vgg.pth", file)
    assert state(external, tmp_path) == "found"
    with open(file, "r+b") as content:  # one byte of the weights
        content.seek(1500)
        byte = content.read(1)
        content.seek(1500)
        content.write(bytes([byte[0] ^ 1]))
    assert state(external, tmp_path) == "another checksum"


def test_the_places_are_those_that_the_suite_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {external.name: str(Path("data") / external.file) for external in FILES}
    with pytest.raises(InputError, match=f"^{re.escape(files['inception'])}: there is no such file"):
        load_extractor("inception", Path("data") / INCEPTION_FILE)
    with pytest.raises(InputError, match=re.escape(files["vgg16"])):
        LPIPS().load(Path("data"))
    assert files["lpips"] == str(Path("data") / LINEAR)


def test_the_table(tmp_path, capsys):
    for field in ("name", "file"):
        assert len({getattr(external, field) for external in FILES}) == len(FILES)
    for external in FILES:
        assert re.fullmatch(r"unknown|sha256:[0-9a-f]{64}|md5:[0-9a-f]{6,32}", external.checksum), external
        # Where a name carries the first digits of the file's sha256, as torch.hub's do, both must agree.
        tag = re.search(r"-([0-9a-f]{8})\.pth$", external.file)
        assert tag is None or external.checksum.startswith(f"sha256:{tag[1]}")
    dit = next(external for external in FILES if external.name == "dit-xl-2")
    saved(tmp_path / dit.file)
    assert main(["--root", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    for external in FILES:
        line = next(line for line in out.splitlines() if str(tmp_path / external.file) in line)
        assert line.startswith("found " if external is dit else "missing "), line
        assert external.use in out and external.source in out and external.checksum in out


@pytest.mark.parametrize("name, code, said", [
    ("dit-xl-2", 0, "dit-xl-2: found, "),
    ("mae-base-visualize", 2, "damaged (truncated, or another file: File is not a zip file); it comes from github"),
    ("vgg16", 2, "another checksum (expected sha256:397923af"),
    ("lpips", 2, "missing"),
    ("vgg", 2, "not known; choose one of vgg16, lpips"),
])
def test_check_leaves_with_an_exit_code(tmp_path, monkeypatch, capsys, name, code, said):
    for external in FILES:
        if external.name in ("dit-xl-2", "vgg16", "mae-base-visualize"):
            file = saved(tmp_path / external.file)
            if external.name != "dit-xl-2":
                file.write_bytes(b"abc")
    monkeypatch.setattr(sys, "argv", ["common.weights", "--root", str(tmp_path), "--check", name])
    with pytest.raises(SystemExit) as leaving:
        run_command(main)
    assert leaving.value.code == code
    assert said in "".join(capsys.readouterr())
