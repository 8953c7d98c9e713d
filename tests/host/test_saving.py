"""Estimators in files: the same predictions after loading, and errors that say what a file is not."""

from __future__ import annotations

import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from helpers import Snapshot, assert_same, build, fitted, inputs, mlp, train_loader, val_loader

from laplace_ella import ELLALaplace
from laplace_ella.fitting import files

X = inputs(11, seed=7)
UNFIT = {"subsample_size": 7, "seed": 5, "prior_precision": 7.0, "temperature": None}


@pytest.mark.parametrize("likelihood", ["classification", "regression", "bernoulli"])
def test_what_is_loaded_predicts_the_same_with_the_settings_it_had(likelihood, tmp_path):
    data = [(x, (y > 0).double()) for x, y in train_loader("regression")]
    data = data if likelihood == "bernoulli" else train_loader(likelihood)
    la = fitted(likelihood, data=data, **UNFIT, enable_backprop=True)
    la.temperature, la.n_directions = 3.0, 2
    la.save(tmp_path / "posterior")
    new = ELLALaplace.load(tmp_path / "posterior", la.model)
    assert_same(new(X), la(X))
    assert new.get_params() == {**la.get_params(), "model": la.model}
    assert (new.n_directions, new.n_data, new.enable_backprop) == (2, la.n_data, True)


def test_a_choice_of_tuning_is_loaded(tmp_path):
    la = fitted(temperature=None)
    with pytest.warns(UserWarning, match="Only 17 validation inputs"):
        la.optimize_hyperparameters(val_loader(), "auto", method="temperature scaling")
    la.save(tmp_path / "posterior")
    new = ELLALaplace.load(tmp_path / "posterior", la.model)
    assert (new.variance, new.logit_scale, new.link_approx) == (la.variance, la.logit_scale, la.link_approx)
    assert_same(new(X), la(X))


@pytest.mark.parametrize("directions", ["half", "landmarks"])
def test_directions_are_stored_as_asked(directions, tmp_path):
    la = fitted(model=mlp(dtype=torch.float32), data=train_loader(dtype=torch.float32))
    la.save(tmp_path / "small", directions=directions)
    assert files.read(tmp_path / "small")["basis"]["stored"] == directions
    new = ELLALaplace.load(tmp_path / "small", la.model)
    torch.testing.assert_close(new(X.float()), la(X.float()), rtol=1e-3, atol=1e-4)


def test_options_that_are_not_in_the_file_are_those_of_the_constructor(tmp_path):
    la = fitted()
    la.save(str(tmp_path / "posterior"))
    new = ELLALaplace.load(str(tmp_path / "posterior"), la.model, chunk_size=3, dict_key_x="x")
    assert (new.chunk_size, new.dict_key_x) == (3, "x")
    with pytest.warns(UserWarning, match="enable_backprop=False, which replaces enable_backprop=True"):
        ELLALaplace.load(tmp_path / "posterior", la.model, enable_backprop=True)


def test_files_are_those_of_the_state(tmp_path):
    la, new = fitted(), build()
    la.save(tmp_path / "saved")
    new.load_state_dict(torch.load(tmp_path / "saved", weights_only=True))
    assert_same(new(X), la(X))
    torch.save(la.state_dict(), tmp_path / "state")
    assert_same(ELLALaplace.load(tmp_path / "state", la.model)(X), la(X))


class Mine(ELLALaplace):
    pass


def test_a_subclass_loads_its_own(tmp_path):
    la = Mine(mlp(), "classification")
    la.fit(train_loader())
    la.save(tmp_path / "mine")
    assert type(Mine.load(tmp_path / "mine", la.model)) is Mine
    with pytest.raises(ValueError, match=r"mine' cannot be loaded.*from ELLALaplace.*got one of Mine"):
        ELLALaplace.load(tmp_path / "mine", la.model)


class Opened:
    """Does something when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("opened",)


def edited(**changes):
    return lambda path, la: torch.save({**la.state_dict(), **changes}, path)


def cut_off(path, la):
    la.save(path)
    path.write_bytes(path.read_bytes()[:-500])


WRONG = {
    "nothing": (lambda path, la: None, FileNotFoundError, "posterior"),
    "a folder": (lambda path, la: path.mkdir(), ValueError, "path must be the path of a file"),
    "text": (lambda path, la: path.write_text("thesis"), ValueError, r"posterior' cannot.*no file that ELLALaplace"),
    "cut off": (cut_off, ValueError, "posterior' cannot.*truncated"),
    "code": (lambda path, la: torch.save(Opened(), path), ValueError, "posterior' cannot.*UnpicklingError"),
    "weights": (
        lambda path, la: torch.save(la.model.state_dict(), path),
        ValueError,
        r"posterior' cannot.*must come from ELLALaplace.state_dict\(\); got one of a dict",
    ),
    "a list": (lambda path, la: torch.save([1], path), ValueError, "posterior' cannot.*got one of list"),
    "another version": (edited(format=99), ValueError, r"posterior' cannot.*format 99, this version reads \(3, 4"),
    "an entry less": (
        lambda path, la: torch.save({k: v for k, v in la.state_dict().items() if k != "H"}, path),
        ValueError,
        r"posterior' cannot.*lacks \['H'\]",
    ),
    "damaged": (edited(n_data=29), ValueError, "damaged"),
    "another likelihood": (edited(likelihood="guesses"), ValueError, "likelihood must be one of.*got 'guesses'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_such_file_is_refused_and_nothing_of_it_is_run(name, tmp_path, monkeypatch):
    make, kind, match = WRONG[name]
    monkeypatch.chdir(tmp_path)
    la = fitted()
    make(tmp_path / "posterior", la)
    with pytest.raises(kind, match=match):
        ELLALaplace.load(tmp_path / "posterior", la.model)
    assert not (tmp_path / "opened").exists()


def test_another_network_is_refused(tmp_path):
    la = fitted()
    la.save(tmp_path / "posterior")
    with pytest.raises(ValueError, match=r"made with another model.*Load the model's own weights first"):
        ELLALaplace.load(tmp_path / "posterior", mlp(seed=1))
    la.model[0].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="belongs to other parameters"):
        ELLALaplace.load(tmp_path / "posterior", la.model)


def test_what_cannot_be_saved_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path, la = tmp_path / "posterior", fitted()
    with pytest.raises(AttributeError, match=r"[Ff]it"):
        build().save(path)
    la.save(path)
    before = path.read_bytes()
    for wrong in (None, 3, "", tmp_path, tmp_path / "none" / "posterior"):
        with pytest.raises(ValueError, match="path must be"):
            la.save(wrong)
    with pytest.raises(ValueError, match="directions must be one of"):
        la.save(path, directions="thirds")

    def full(content, name):
        Path(name).write_bytes(b"half a file")
        raise RuntimeError("enforce fail: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match=r"could not be written: .*No space.*space on the disk\?"):
            la.save(path)
    la.model[0].bias.data += 1
    with pytest.raises(ValueError, match="changed since the fit"):
        la.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_is_followed_and_what_is_no_file_stays(tmp_path):
    la, (link, target) = fitted(), (tmp_path / "link", tmp_path / "target")
    link.symlink_to(target)
    la.save(link)
    assert link.is_symlink()
    assert_same(ELLALaplace.load(target, la.model)(X), la(X))
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(ValueError, match="no regular file"):
            la.save(tmp_path / "pipe")


def test_readers_see_the_old_file_or_the_new_one(tmp_path):
    """Two threads save, as processes of a group do, while a third one reads."""
    path, la = tmp_path / "posterior", fitted()
    before = Snapshot(la, X)
    la.save(path)
    threads = [threading.Thread(target=lambda: [la.save(path) for _ in range(10)]) for _ in range(2)]
    for t in threads:
        t.start()
    while any(t.is_alive() for t in threads):
        assert_same(ELLALaplace.load(path, la.model)(X), before.prediction)
    for t in threads:
        t.join()
    assert list(tmp_path.iterdir()) == [path]


def test_what_was_loaded_can_be_copied_and_saved_again(tmp_path):
    la = fitted()
    la.save(tmp_path / "first")
    new = pickle.loads(pickle.dumps(ELLALaplace.load(tmp_path / "first", la.model)))
    new.save(tmp_path / "second")
    assert_same(ELLALaplace.load(tmp_path / "second", la.model)(X), la(X))
