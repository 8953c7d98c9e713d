"""The files of a fit in progress: how they are written, and which are refused."""

import os
import pickle
import random
import zipfile

import pytest
import torch
from helpers import K, M, build, fitted, inputs, mlp
from interrupting import (
    N_BATCHES,
    Ending,
    Killed,
    Watched,
    all_files,
    assert_equal_fits,
    batches,
    contents,
    go_on,
    interrupt,
    refused,
)

SUFFIXES = ("", ".basis", ".curvature")


@pytest.fixture
def expected():
    return fitted(model=Watched(), data=batches())


WRONG_ORDERS = {
    "reversed": lambda data: data[::-1],
    "last batch": lambda data: [*data[:2], data[3], data[2], *data[4:]],
    "other targets": lambda data: [(x, (y + 1) % 3) for x, y in data],
    "other inputs": lambda data: [(x + 1e-12, y) for x, y in data],
    "too few": lambda data: data[:2],
    "other sizes": lambda data: list(zip(*(torch.cat(part).split(4) for part in zip(*data)))),
}


@pytest.mark.parametrize("name", WRONG_ORDERS)
@pytest.mark.parametrize(("size", "at"), [(2000, 3), (None, N_BATCHES + 3)])
def test_data_in_another_order_are_refused(name, size, at, tmp_path):
    data, wrong = batches(), WRONG_ORDERS[name](batches())
    interrupt(build(curvature_size=size), Ending(data, at), tmp_path / "fit", OSError)
    first_is_the_same = at > N_BATCHES and name in ("last batch", "too few")
    match = "order|second pass" if first_is_the_same else "order"
    refused(build(curvature_size=size), wrong, tmp_path / "fit", match)
    la = go_on(build(curvature_size=size), data, tmp_path / "fit")  # the right one still goes on
    assert_equal_fits(la, fitted(data=data, curvature_size=size))


def test_other_data_and_other_parameters_are_refused_when_all_have_been_read(tmp_path):
    all_files(tmp_path / "fit")
    for data in (batches()[::-1], []):
        refused(build(model=Watched()), data, tmp_path / "fit", "order")
    net = mlp()
    net[0].bias.requires_grad_(False)
    refused(build(model=Watched(net)), batches(), tmp_path / "fit", "other parameters")


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_truncated_and_damaged_files_are_refused(suffix, tmp_path, expected):
    """Of damage, one byte; those between the entries of the archive mean nothing."""
    path = tmp_path / "fit"
    all_files(path)
    file, whole = tmp_path / f"fit{suffix}", contents(tmp_path)
    content = whole[file.name]
    for length in (0, 10, len(content) // 2, len(content) - 1):
        file.write_bytes(content[:length])
        refused(build(model=Watched()), batches(), path, "truncated")
    draw, refusals = random.Random(3), 0
    for _ in range(12):
        damaged = bytearray(content)
        damaged[draw.randrange(len(damaged))] ^= 0xFF
        file.write_bytes(damaged)
        la = build(model=Watched())
        try:
            la.fit(batches(), checkpoint=path, checkpoint_every=1)
        except ValueError:
            refusals += 1
            assert file.read_bytes() == damaged
        else:
            assert_equal_fits(la, expected)
        for name, before in whole.items():
            (tmp_path / name).write_bytes(before)
    assert refusals


class Payload:
    """Creates a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


FOREIGN = {
    "text": lambda file, victim: file.write_text("a list of things to do\n" * 20),
    "dict of tensors": lambda file, victim: torch.save({"weight": torch.zeros(3)}, file),
    "state_dict": lambda file, victim: torch.save(fitted().state_dict(), file),
    "list": lambda file, victim: torch.save([torch.zeros(3)], file),
    "tensor": lambda file, victim: torch.save(torch.zeros(3), file),
    "payload": lambda file, victim: file.write_bytes(pickle.dumps(Payload(victim))),
    "payload of torch.save": lambda file, victim: torch.save({"digest": Payload(victim)}, file),
    "zip": lambda file, victim: zipfile.ZipFile(file, "w").close(),
}


@pytest.mark.parametrize("suffix", ["", ".curvature"])
@pytest.mark.parametrize("name", FOREIGN)
def test_foreign_files_are_refused_and_not_executed(name, suffix, tmp_path):
    path, victim = tmp_path / "folder" / "fit", tmp_path / "executed"
    path.parent.mkdir()
    if suffix:
        all_files(path)
    FOREIGN[name](path.parent / f"fit{suffix}", victim)
    refused(build(model=Watched()), batches(), path, "no checkpoint of a fit")
    assert not victim.exists()
    if name == "payload":  # which works, or this would prove nothing
        pickle.loads((path.parent / f"fit{suffix}").read_bytes())
        assert victim.is_dir()


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_another_format_and_missing_entries_are_refused(suffix, tmp_path):
    path, file = tmp_path / "fit", tmp_path / f"fit{suffix}"
    all_files(path)
    whole = torch.load(file, weights_only=True)
    for step in (-1, 1):
        torch.save({**whole, "format": whole["format"] + step}, file)
        refused(build(model=Watched()), batches(), path, f"has format {whole['format'] + step}")
    for key in whole:
        torch.save({k: v for k, v in whole.items() if k != key}, file)
        refused(build(model=Watched()), batches(), path, "cannot be used")


@pytest.mark.parametrize(("seed", "message"), [(3, "seed was 3 and is 4"), (4, "does not belong")])
def test_files_of_two_fits_do_not_go_together(seed, message, tmp_path):
    """Not even of two with the same arguments, whose data may differ."""
    path = tmp_path / "fit"
    all_files(path, seed=seed)
    others = contents(tmp_path)
    for suffix in SUFFIXES[1:]:
        for file in tmp_path.iterdir():
            file.unlink()
        all_files(path, seed=4)
        (tmp_path / f"fit{suffix}").write_bytes(others[f"fit{suffix}"])
        refused(build(model=Watched(), seed=4), batches(), path, message)
    path.unlink()
    refused(build(model=Watched(), seed=4), batches(), path, "does not belong|seed")


def other_weights():
    net = mlp()
    net[2].bias.data[0] += 1e-12
    return net


OTHER_FITS = {
    # estimator's changes, fit's changes, what the message names
    "seed": ({"seed": 4}, {}, "seed"),
    "M": ({"subsample_size": M - 1}, {}, "subsample_size"),
    "K": ({"n_eigenvalues": K}, {}, "n_eigenvalues"),
    "share": ({"n_eigenvalues": 0.9}, {}, "n_eigenvalues"),
    "curvature_size": ({"curvature_size": 11}, {}, "curvature_size"),
    "streamed": ({"curvature_size": None}, {}, "curvature_size"),
    "curvature": ({"curvature": "mc"}, {}, "curvature"),
    "labels": ({"curvature_samples": 3}, {}, "curvature_samples"),
    "weights": ({"model": other_weights}, {}, "model"),
    "width": ({"model": lambda: mlp(4)}, {}, "model"),
    "float32": ({"model": lambda: mlp(dtype=torch.float32)}, {}, "dtype"),
    "likelihood": ({"likelihood": "bernoulli"}, {}, "likelihood"),
    "balanced": ({}, {"balanced": True}, "balanced"),
    "landmarks": ({}, {"landmarks": (inputs(M, seed=9), torch.arange(M) % 3)}, "landmarks"),
    "val_steps": ({}, {"val_steps": 1}, "val_steps"),
    "max_samples": ({}, {"max_samples": 20}, "max_samples"),
    "n_total": ({}, {"n_total": 200}, "n_total"),
    "memory_budget": ({"memory_budget": 5000}, {}, "memory_budget"),
    "chunk_size": ({"chunk_size": 1}, {}, "chunk_size"),
    "autodiff": ({"autodiff": "reverse"}, {}, "autodiff"),
    "spill": ({"spill": "cpu"}, {}, "spill"),
}


@pytest.mark.parametrize("name", OTHER_FITS)
def test_a_checkpoint_of_another_fit_is_refused(name, tmp_path):
    changes, fit_options, message = OTHER_FITS[name]
    path, changes = tmp_path / "fit", dict(changes)
    interrupt(build(model=Watched()), Ending(batches(), 3), path, OSError)
    model = Watched(changes.pop("model", mlp)())
    said = refused(build(model=model, **changes), batches(), path, message, **fit_options)
    assert not model.calls, "the model was run before the checkpoint was looked at"
    assert str(path) in said


def test_added_data_do_not_go_with_another_fit_before(tmp_path):
    la = fitted(model=Watched(), data=batches())
    la.model.at = la.model.calls + 7
    interrupt(la, batches(seed=50), tmp_path / "fit", override=False)
    for other in (fitted(model=Watched(), data=batches(seed=60)), build(model=Watched())):
        refused(other, batches(seed=50), tmp_path / "fit", "fitted before|override", override=False)


def test_files_reach_the_disk_before_they_get_their_names(tmp_path, monkeypatch):
    events, replace = [], os.replace

    def replacing(source, target):
        events.append(os.path.basename(target))
        assert os.path.basename(source) == "fit.tmp"
        return replace(source, target)

    monkeypatch.setattr(os, "fsync", lambda descriptor: events.append("sync"))
    monkeypatch.setattr(os, "replace", replacing)
    build().fit(batches(), checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert set(events[::2]) == {"sync"}
    names = events[1::2]
    assert names[: N_BATCHES + 2] == ["fit"] * (N_BATCHES + 1) + ["fit.basis"]
    assert set(names[N_BATCHES + 2 :]) == {"fit.curvature"}


@pytest.mark.parametrize("error", [OSError, Killed])
def test_a_file_that_cannot_be_renamed_leaves_the_old_one(error, tmp_path, monkeypatch):
    expected, replace = fitted(data=batches()), os.replace
    for at in (0, 1, 3, N_BATCHES, N_BATCHES + 1, N_BATCHES + 2, N_BATCHES + 4):
        left = [at]

        def replacing(source, target, left=left):
            left[0] -= 1
            if left[0] < 0:
                raise error("interrupted")
            return replace(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replacing)
            interrupt(build(), batches(), tmp_path / "fit", error)
        for file in tmp_path.iterdir():
            torch.load(file, weights_only=True)
        assert bool(os.listdir(tmp_path)) == (at > 0)
        assert_equal_fits(go_on(build(), batches(), tmp_path / "fit"), expected, f"at the renaming {at}")


def test_what_a_process_that_died_was_writing_is_deleted(tmp_path):
    (tmp_path / "fit.tmp").write_bytes(b"half a fi")
    go_on(build(), batches(), tmp_path / "fit", checkpoint_every=1000)


def test_a_full_disk_is_an_error_that_leaves_no_rubbish(tmp_path, monkeypatch):
    save, writes = torch.save, []

    def failing(whole, file):
        writes.append(file)
        save(whole, file)
        if len(writes) == 3:
            raise RuntimeError("unexpected pos 64 vs 0")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", failing)
        with pytest.raises(OSError, match=r"fit.*could not be written"):
            build().fit(batches(), checkpoint=tmp_path / "fit", checkpoint_every=1)
    assert os.listdir(tmp_path) == ["fit"]
    assert_equal_fits(go_on(build(), batches(), tmp_path / "fit"), fitted(data=batches()))
