"""Files of a fit in progress that are not what the call expects, and what is the user's at their paths."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import assert_same, build, fitted, inputs, train_loader

from laplace_ella.fitting.resume import FitFiles
from laplace_ella.parallel.ranks import ALONE

STAGES = {"": "scan", ".basis": "basis", ".curvature": "curvature"}


class Stopping:
    """Batches that end with an error in the second pass."""

    def __init__(self):
        self.batches, self.passes = list(train_loader()), 0

    def __iter__(self):
        self.passes += 1
        for i, batch in enumerate(self.batches):
            if self.passes == 2 and i == 2:
                raise RuntimeError("stopped")
            yield batch


def files_at(path):
    return {s: Path(f"{os.path.realpath(path)}{s}").read_bytes() for s in STAGES}


def stopped(path):
    """Leave what a fit that has failed in its last stage leaves: a file of each stage."""
    with pytest.raises(RuntimeError, match="stopped"):
        build(curvature_size=None).fit(Stopping(), checkpoint=path, checkpoint_every=1)
    return files_at(path)


def test_exchanged_files_of_two_stages(tmp_path):
    path = tmp_path / "fit"
    files, la = stopped(path), build(curvature_size=None)
    for left, right in ((a, b) for a in STAGES for b in STAGES if a < b):
        exchanged = {**files, left: files[right], right: files[left]}
        for suffix, content in exchanged.items():
            Path(f"{path}{suffix}").write_bytes(content)
        said = rf"of the stage '{STAGES[right]}', and its name that of '{STAGES[left]}'"
        with pytest.raises(ValueError, match=said):
            la.fit(train_loader(), checkpoint=path, checkpoint_every=1)
        assert files_at(path) == exchanged
    assert la.H is None


def test_files_of_another_rank(tmp_path):
    FitFiles(tmp_path / "other", 1, {}, SimpleNamespace(rank=1, size=2)).save("scan", {"a": 1})
    (theirs,) = tmp_path.iterdir()
    (tmp_path / "fit").write_bytes(theirs.read_bytes())
    with pytest.raises(ValueError, match="of rank 1 of 2, and this is rank 0 of 1"):
        FitFiles(tmp_path / "fit", 1, {}, ALONE)


@pytest.mark.parametrize("exists", [False, True])
def test_a_link_given_as_checkpoint_is_followed_and_stays(exists, tmp_path):
    (tmp_path / "scratch").mkdir()
    link, target = tmp_path / "fit", tmp_path / "scratch" / "file"
    link.symlink_to(target)
    stopped(target if exists else link)
    assert zipfile.is_zipfile(target)
    la, x = build(curvature_size=None), inputs(11, seed=7)
    la.fit(train_loader(), checkpoint=link, checkpoint_every=1)
    assert link.is_symlink()
    assert list((tmp_path / "scratch").iterdir()) == []
    assert_same(la(x), fitted(curvature_size=None)(x))


def thesis_behind_a_link(folder):
    (folder / "thesis").write_text("thesis")
    (folder / "fit").symlink_to(folder / "thesis")


OCCUPIED = {
    "a file of the user's": (thesis_behind_a_link, "cannot be used"),
    "a link to no folder": (
        lambda f: (f / "fit").symlink_to(f / "no" / "file"),
        r"checkpoint .*existing folder",
    ),
    "a link to a folder": (lambda f: (f / "fit").symlink_to(f), r"checkpoint .*path of a file"),
    "a link to itself": (lambda f: (f / "fit").symlink_to(f / "fit"), r"checkpoint .*link"),
    **{
        f"a link in the place of {s}": (
            lambda f, s=s: (f / f"fit.{s}").symlink_to(f / "nothing"),
            rf"checkpoint .*fit.{s}, where there is a symbolic link",
        )
        for s in ("basis", "curvature")
    },
    "a pipe": (lambda f: os.mkfifo(f / "fit"), r"checkpoint .*no regular file"),
}


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes")
@pytest.mark.parametrize("name", OCCUPIED)
def test_what_is_the_users_is_neither_replaced_nor_deleted(name, tmp_path):
    occupy, match = OCCUPIED[name]
    occupy(tmp_path)
    before = {p.name: p.is_symlink() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match=match):
        build().fit(train_loader(), checkpoint=tmp_path / "fit")
    assert {p.name: p.is_symlink() for p in tmp_path.iterdir()} == before
    if (tmp_path / "thesis").exists():
        assert (tmp_path / "thesis").read_text() == "thesis"
