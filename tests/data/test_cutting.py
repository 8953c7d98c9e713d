"""A batch is cut into its inputs; that these are what they seem to be is verified on the model."""

import warnings
from collections import namedtuple

import numpy as np
import pytest
import torch
from helpers import C, D, H, N, build, fitted, inputs, mlp, reference_features, targets
from models import Applied
from parts import Attributes, check, draws
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from laplace_ella.data.batches import inputs_between, leaves, nested
from laplace_ella.data.packing import packed, unpacked

F64 = torch.float64
Pair = namedtuple("Pair", ["left", "right"])


class Graph:
    def __init__(self, adjacency):
        self.adjacency = adjacency


CONTAINERS = {
    "list": (lambda a, b: [a, b], lambda v: v),
    "tuple": (lambda a, b: (a, b), lambda v: v),
    "mapping": (lambda a, b: {"a": a, "b": b}, lambda v: (v["a"], v["b"])),
    "deep": (lambda a, b: [{"x": (a,)}, [[b]]], lambda v: (v[0]["x"][0], v[1][0][0])),
    "named tuple": (lambda a, b: Pair(a, b), lambda v: (v.left, v.right)),
}


def contained(kind, n=N, seed=0):
    make, _ = CONTAINERS[kind]
    a, b, y = draws(seed, n, D), draws(seed + 1, n, D), targets("classification", n)
    return [{"in": make(u, v), "labels": t} for u, v, t in zip(a.split(7), b.split(7), y.split(7))]


@pytest.mark.parametrize("kind", CONTAINERS)
def test_tensors_in_containers_are_cut(kind):
    def forward(nets, batch):
        a, b = CONTAINERS[kind][1](batch["in"])
        return nets[0](a) * nets[1](b).tanh()

    model = Applied(forward, nn.ModuleList([mlp(seed=1), mlp(seed=2)]))
    la = check(model, contained(kind), {k: v for k, v in contained(kind, 5, seed=7)[0].items() if k == "in"})
    restored = build(model=model)
    restored.load_state_dict(la.state_dict())
    x = contained(kind, 1, seed=9)[0]
    torch.testing.assert_close(restored(x), la(x))


@pytest.mark.parametrize("kind", CONTAINERS)
def test_packed_inputs_are_plain_and_get_their_types_back(kind, tmp_path):
    x = contained(kind)[0]
    cut = nested(x, [path for path, _ in leaves(x) if path[0] == "in"])
    torch.save(packed(inputs_between(cut, 2, 5)), tmp_path / "x.pt")
    assert (tmp_path / "x.pt").stat().st_size < 8000
    found = torch.load(tmp_path / "x.pt", weights_only=True)
    restored = unpacked(found, cut).container()
    assert type(restored["in"]) is type(x["in"])
    for a, b in zip(CONTAINERS[kind][1](restored["in"]), CONTAINERS[kind][1](x["in"])):
        assert torch.equal(a, b[2:5])
    plain = unpacked(found, None).container()["in"]
    assert type(plain) is (tuple if kind == "named tuple" else type(x["in"]))
    with pytest.raises(ValueError, match=r"under \[\"'graph'\"\]"):
        packed(nested({**x, "graph": Graph(None)}, [("in", 0)]))


VALUES = [
    (len, ["a", "a", "ccc", "dddd", "bb", "a"]),  # the first and the last input are alike
    (float, [4, 4, 1, 4, 4, 4]),
    (float, (2.0, 2.0, 1.0, 2.0, 2.0, 2.0)),
    (sum, [[1], [1], [1, 2], [1], [1], [1]]),
    (float, np.array([4, 4, 1, 4, 4, 4])),
]


@pytest.mark.parametrize(("number", "said"), VALUES, ids=["strings", "numbers", "tuple", "lists", "array"])
@pytest.mark.parametrize("later", [False, True])
def test_lists_of_a_value_for_each_input_are_refused_by_name_whatever_the_values(number, said, later):
    x, y = inputs(12), targets("classification", 12)
    alike = type(said)([said[0]] * 6) if not isinstance(said, np.ndarray) else np.repeat(said[:1], 6)
    first = {"x": x[:6], "said": alike if later else said, "labels": y[:6]}
    second = {"x": x[6:], "said": said, "labels": y[6:]}

    def scaled(net, batch):
        scales = torch.tensor([float(number(v)) for v in batch["said"]], dtype=F64)
        return net(batch["x"] * scales[: len(batch["x"]), None])

    with pytest.raises(ValueError, match="'said'"):
        build(model=Applied(scaled), dict_key_x="x").fit([first, second])


def test_a_forward_pass_gets_a_fresh_mapping_of_the_users_type_with_entries_of_any_kind():
    """Which it may write into; entries that it does not use may be anything."""

    def forward(net, batch):
        batch["x"] = (batch.x - 0.5) / 2
        batch.pop("labels", None)
        assert len(batch.get("said", "inputs")) == 6  # a list of all inputs is handed on as it is
        return net(batch.x)

    x, y, new = inputs(12), targets("classification", 12), inputs(11, seed=5)
    words = [["a"] * 6, ["b", "cc", "d", "ee", "f", "g"]]
    parts = zip(x.split(6), words, y.split(6))
    batches = [Attributes(x=a, said=s, graph=Graph(None), n=3, labels=t) for a, s, t in parts]
    model = Applied(forward)
    options = {"dict_key_x": "x", "chunk_size": 1, "memory_budget": 2000}  # many calls of the model
    la = fitted(model=model, data=batches, **options)
    plain = fitted(model=model.net, data=[((x - 0.5) / 2, y)], **options)
    torch.testing.assert_close(la.H, plain.H)
    for link in ("probit", "mc", "bridge"):
        found = la(Attributes(x=new), link_approx=link)
        torch.testing.assert_close(found, plain((new - 0.5) / 2, link_approx=link))
    samples = [
        e(given, "nn", link_approx="mc", n_samples=5, generator=torch.Generator().manual_seed(0))
        for e, given in ((la, Attributes(x=new)), (plain, (new - 0.5) / 2))
    ]
    torch.testing.assert_close(*samples)
    assert batches[0].keys() == {"x", "said", "graph", "n", "labels"}
    assert torch.equal(batches[0]["x"], x[:6])


def test_inputs_keep_the_precision_they_come_with():
    """Unix seconds, whose differences float32 cannot tell."""
    seconds = (1.7e9 + torch.arange(24, dtype=F64))[:, None]
    net = nn.Sequential(nn.Linear(1, H), nn.Tanh(), nn.Linear(H, C))
    model = Applied(lambda net, x: net(((x - 1.7e9) / 10).float()), net)
    la = fitted(model=model, data=[(seconds, targets("classification", 24))])
    phi, f = la.features(seconds[:6])
    torch.testing.assert_close(f, model(seconds[:6]).detach())
    assert len(la(seconds[:6]).unique(dim=0)) == 6
    torch.testing.assert_close(phi, reference_features(model, la.basis, seconds[:6])[0], rtol=1e-4, atol=1e-5)


def test_inputs_are_converted_only_where_the_model_fails_without_it():
    model = mlp(dtype=torch.float32)
    la = build(model=model)
    batches = [(a, t) for a, t in zip(inputs().split(7), targets("classification").split(7))]
    with pytest.warns(UserWarning, match=r"float64.*converted to torch.float32") as said:
        la.fit(batches)
    assert len(said) == 1
    torch.testing.assert_close(la(inputs(3)), la(inputs(3).float()))  # without another warning


def test_sequences_packed_inside_the_model_work():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = nn.GRU(D, H, batch_first=True, dtype=F64), nn.Linear(H, C, dtype=F64)

        def forward(self, batch):
            packed = pack_padded_sequence(batch["x"], batch["lengths"].cpu(), True, enforce_sorted=False)
            padded, lengths = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
            return self.head(padded[torch.arange(len(lengths)), lengths - 1])

    x, lengths, y = draws(0, N, 4, D), torch.arange(N) % 4 + 1, targets("classification")
    parts = zip(x.split(7), lengths.split(7), y.split(7))
    batches = [{"x": a, "lengths": n, "labels": t} for a, n, t in parts]
    la = build(model=Tagger(), subsample_size=5, n_eigenvalues=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such models are differentiated one input at a time
        la.fit(batches)
        new = {"x": x[:3], "lengths": lengths[:3]}
        torch.testing.assert_close(la.features(new)[0], reference_features(la.model, la.basis, new)[0])


def packed_inputs(n=7):
    return pack_padded_sequence(draws(0, n, 4, D), torch.arange(n, 0, -1).clamp(max=4), batch_first=True)


def in_place(find):
    def forward(net, x):
        x = find(x)
        x -= 0.5
        return net(x)

    return Applied(forward)


def same(x):
    return x


OF_OTHERS, OF_GRAPH = (
    r"depend on the other inputs",
    lambda net, batch: net(batch["graph"].adjacency @ batch["x"]),
)
REFUSED = {
    "sparse": (None, lambda x: x.to_sparse(), r"dense.*sparse_coo.*to_dense"),
    "packed": (None, lambda x: packed_inputs(), "PackedSequence"),
    "packed in a mapping": (None, lambda x: {"x": packed_inputs()}, r"packed sequence under 'x'.*lengths"),
    "complex": (None, lambda x: x.to(torch.complex64), r"torch.complex64.*real numbers"),
    "integers": (None, lambda x: x.to(torch.uint8), r"torch.uint8.*torch.float64.*scale"),
    "integer outputs": (Applied(lambda net, x: net(x).round().long()), same, r"floating-point.*torch.int64"),
    "half the inputs": (Applied(lambda net, x: net(x)[::2]), same, r"\(4, 3\) for 7 inputs"),
    "inputs of each other": (Applied(lambda net, x: net(x - x.mean(0))), same, OF_OTHERS),
    "graph": (Applied(OF_GRAPH), lambda x: {"x": x, "graph": Graph(draws(1, 7, 7))}, r"'graph' \(Graph\)"),
    "in place": (in_place(same), same, "changes its input in place"),
    "entry in place": (in_place(lambda x: x["pixels"]), lambda x: {"pixels": x}, "'pixels'"),
    "deep entry": (in_place(lambda x: x["in"][1]), lambda x: {"in": [torch.ones(7), x]}, r"'in'\[1\]"),
    # A rectifier changes nothing of positive inputs, this time.
    "rectified": (nn.Sequential(nn.ReLU(inplace=True), mlp()), torch.abs, r"in place.*inplace=False"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_inputs_and_models_that_are_refused(name):
    model, change, match = REFUSED[name]
    x, y = inputs(7), targets("classification", 7)
    before, given = x.clone(), change(x)
    la = build(model=model)
    with pytest.raises(ValueError, match=match):
        la.fit([{**given, "labels": y}] if isinstance(given, dict) else [(given, y)])
    assert la.H is None
    assert torch.equal(x, before)


def test_a_fitted_estimator_refuses_other_inputs():
    la = fitted()
    with pytest.raises(ValueError, match="sparse_coo"):
        la(inputs(7).to_sparse())
    with pytest.raises(RuntimeError):  # the model's own
        la(torch.zeros(3, D + 1, dtype=F64))
