"""Inputs are cut into rows; that rows are what they seem to be is verified on the model."""

from __future__ import annotations

import warnings
from collections import namedtuple
from collections.abc import MutableMapping

import numpy as np
import pytest
import torch
from helpers import C, D, H, M, N, build, fitted, inputs, mlp, targets
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

F64 = torch.float64
Pair = namedtuple("Pair", ["left", "right"])


def oracle_features(model, x, basis):
    """J(x) V (B, C, K) of the user's own model, given the whole batch, row by row and output by output."""
    weights = {k: p for k, p in model.named_parameters() if p.requires_grad}
    f = model(x)
    phi = torch.zeros(*f.shape, basis.rank, dtype=f.dtype)
    for b in range(len(f)):
        for c in range(f.shape[1]):
            grads = torch.autograd.grad(f[b, c], list(weights.values()), retain_graph=True, allow_unused=True)
            for name, g in zip(weights, grads):
                if g is not None:
                    phi[b, c] += basis.directions[name].flatten(1) @ g.flatten()
    return phi, f.detach()


def check(model, batches, x, **kwargs):
    """Fit, and compare features, curvature and probabilities of whole batches with the oracle."""
    la = build(model=model, **kwargs)
    la.fit(batches)
    phi, f = la.features(x)
    expected, outputs = oracle_features(model, x, la.basis)
    torch.testing.assert_close(f, outputs)
    torch.testing.assert_close(phi, expected)
    G = torch.zeros_like(la.H)
    for batch in batches:
        of_batch, logits = oracle_features(model, batch if isinstance(batch, dict) else batch[0], la.basis)
        p = logits.softmax(-1)
        Lambda = torch.diag_embed(p) - p[:, :, None] * p[:, None]
        G += torch.einsum("bck,bcd,bdl->kl", of_batch, Lambda, of_batch)
    torch.testing.assert_close(la.H, G)
    variance = torch.einsum("bck,kl,bcl->bc", expected, la.posterior_covariance, expected)
    probit = (outputs / torch.sqrt(1 + torch.pi / 8 * variance)).softmax(-1)
    torch.testing.assert_close(la(x), probit)
    return la


def draws(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


# ---------------------------------------------------------------------- containers in a mapping


class Contained(nn.Module):
    """Adds up what two tensors, somewhere in its input, are mapped to."""

    def __init__(self, find):
        super().__init__()
        self.find, self.first, self.second = find, mlp(seed=1), mlp(seed=2)

    def forward(self, batch):
        a, b = self.find(batch)
        return self.first(a) * self.second(b).tanh()


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
    _, find = CONTAINERS[kind]
    model = Contained(lambda batch: find(batch["in"]))
    la = check(model, contained(kind), {k: v for k, v in contained(kind, 5, seed=7)[0].items() if k == "in"})
    restored = build(model=model)
    restored.load_state_dict(la.state_dict())
    x = contained(kind, 1, seed=9)[0]
    torch.testing.assert_close(restored(x), la(x))


def test_variances_of_five_inputs_are_five():
    _, find = CONTAINERS["list"]
    la = fitted(model=Contained(lambda batch: find(batch["in"])), data=contained("list"))
    batch = contained("list", 5, seed=3)[0]
    together = la.features(batch)[0]
    alone = [la.features({"in": [t[i : i + 1] for t in batch["in"]]})[0] for i in range(5)]
    torch.testing.assert_close(together, torch.cat(alone))


class ByLengths(nn.Module):
    """Takes the mean over the first entries of every row, as many as lengths, in Python, say."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, batch):
        means = [row[:n].mean(0) for row, n in zip(batch["x"], batch["lengths"])]
        return self.net(torch.stack(means))


def by_lengths(convert):
    x, lengths = draws(0, N, 4, D), torch.arange(N) % 4 + 1
    y = targets("classification")
    return [
        {"x": a, "lengths": convert(n), "labels": t}
        for a, n, t in zip(x.split(7), lengths.split(7), y.split(7))
    ]


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("lengths", lambda n: n.tolist()),
        ("lengths", lambda n: tuple(n.tolist())),
        ("lengths", lambda n: [str(v) for v in n.tolist()]),
    ],
    ids=["list", "tuple", "strings"],
)
def test_rows_that_cannot_be_cut_are_refused_by_name(name, entry):
    class Model(ByLengths):
        def forward(self, batch):
            return super().forward({**batch, "lengths": [int(n) for n in batch["lengths"]]})

    la = build(model=Model())
    with pytest.raises(ValueError, match=f"'{name}'"):
        la.fit(by_lengths(entry))
    assert la.H is None


class Scaled(nn.Module):
    """Scales each row by what a list says of it."""

    def __init__(self, number):
        super().__init__()
        self.net, self.number = mlp(), number

    def forward(self, batch):
        scales = torch.tensor([float(self.number(v)) for v in batch["said"]], dtype=F64)
        return self.net(batch["x"] * scales[: len(batch["x"]), None])


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (len, ["a", "a", "ccc", "dddd", "bb", "a"]),  # the first and the last rows are alike
        (float, [4, 4, 1, 4, 4, 4]),
        (float, (2.0, 2.0, 1.0, 2.0, 2.0, 2.0)),
        (sum, [[1], [1], [1, 2], [1], [1], [1]]),
        (float, np.array([4, 4, 1, 4, 4, 4])),
    ],
    ids=["strings", "numbers", "tuple", "lists", "array"],
)
@pytest.mark.parametrize("later", [False, True])
def test_lists_of_a_value_for_each_row_are_refused_by_name_whatever_the_values(number, said, later):
    x, y = inputs(12), targets("classification", 12)
    alike = type(said)([said[0]] * 6) if not isinstance(said, np.ndarray) else np.repeat(said[:1], 6)
    first = {"x": x[:6], "said": alike if later else said, "labels": y[:6]}
    second = {"x": x[6:], "said": said, "labels": y[6:]}
    with pytest.raises(ValueError, match="'said'"):
        build(model=Scaled(number), dict_key_x="x").fit([first, second])


def test_a_list_that_is_not_used_is_no_hindrance_in_any_batch():
    class Counts(Scaled):
        def forward(self, batch):
            assert len(batch["said"]) == 6  # a list of all rows is handed on as it is
            return self.net(batch["x"])

    x, y = inputs(12), targets("classification", 12)
    words = [["a"] * 6, ["b", "cc", "d", "ee", "f", "g"]]
    batches = [{"x": x[i : i + 6], "said": words[i // 6], "labels": y[i : i + 6]} for i in (0, 6)]
    model = Counts(len)
    la = fitted(model=model, data=batches, dict_key_x="x")
    plain = fitted(model=model.net, data=[(b["x"], b["labels"]) for b in batches])
    torch.testing.assert_close(la.H, plain.H)
    torch.testing.assert_close(la(batches[1]), plain(x[6:]))


class Wrapper(MutableMapping):
    """A mapping around another, which copies of it share."""

    def __init__(self, entries):
        self.entries = entries

    def __getitem__(self, key):
        return self.entries[key]

    def __setitem__(self, key, value):
        self.entries[key] = value

    def __delitem__(self, key):
        del self.entries[key]

    def __iter__(self):
        return iter(self.entries)

    def __len__(self):
        return len(self.entries)


def test_mappings_of_the_users_own_type_are_handed_on_and_left_alone():
    class Typed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, batch):
            assert type(batch) is Wrapper
            return self.net(batch.entries["x"])

    x, y = inputs(), targets("classification")
    batches = [Wrapper({"x": a, "labels": t}) for a, t in zip(x.split(7), y.split(7))]
    model = Typed()
    la = fitted(model=model, data=batches, dict_key_x="x")
    torch.testing.assert_close(la.H, fitted(model=model.net, data=[(x, y)]).H)
    assert batches[0].entries.keys() == {"x", "labels"}
    assert torch.equal(batches[0]["x"], x[:7])


class Graph:
    def __init__(self, adjacency):
        self.adjacency = adjacency


def test_a_graph_in_a_batch_is_refused_by_name():
    class Convolution(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, batch):
            return self.net(batch["graph"].adjacency @ batch["x"])

    batch = {"x": inputs(7), "graph": Graph(draws(1, 7, 7)), "labels": targets("classification", 7)}
    with pytest.raises(ValueError, match=r"'graph' \(Graph\)"):
        build(model=Convolution()).fit([batch])


def test_entries_that_the_model_does_not_use_may_be_anything():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, batch):
            return self.net(batch["x"])

    x, y = inputs(), targets("classification")
    plain = [{"x": a, "labels": t} for a, t in zip(x.split(7), y.split(7))]
    more = [{**b, "text": ["a"] * len(b["x"]), "graph": Graph(None), "n": 3} for b in plain]
    model = Model()
    la = check(model, plain, {"x": inputs(5, seed=4)})
    other = build(model=model)
    other.fit(more)
    torch.testing.assert_close(other.H, la.H)
    torch.testing.assert_close(other.basis.eigenvalues, la.basis.eigenvalues)


def test_rows_that_depend_on_each_other_are_refused():
    class Centred(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x - x.mean(0))

    with pytest.raises(ValueError, match="depend on the other inputs"):
        build(model=Centred()).fit([(inputs(), targets("classification"))])


def test_outputs_that_have_another_number_of_rows_are_refused():
    class Halved(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x)[::2]

    with pytest.raises(ValueError, match=r"\(4, 3\) for 7 inputs"):
        build(model=Halved()).fit([(inputs(7), targets("classification", 7))])


# ---------------------------------------------------------------------- forwards that write


class WritesEntry(nn.Module):
    """Normalises an entry of its mapping in place of the old one, and takes the labels out."""

    def __init__(self):
        super().__init__()
        self.net = mlp()

    def forward(self, batch):
        batch["x"] = (batch["x"] - 0.5) / 2
        batch.pop("labels", None)
        return self.net(batch["x"])


def test_a_forward_that_writes_into_its_mapping_sees_a_fresh_one_at_every_call():
    x, y = inputs(), targets("classification")
    batches = [{"x": a, "labels": t} for a, t in zip(x.split(7), y.split(7))]
    model = WritesEntry()
    la = build(model=model, chunk_size=1, memory_budget=2000)  # many calls of the model
    la.fit(batches)
    plain = build(model=model.net, chunk_size=1, memory_budget=2000)
    plain.fit([((a - 0.5) / 2, t) for a, t in zip(x.split(7), y.split(7))])
    new = inputs(11, seed=5)
    for link in ("probit", "mc", "bridge"):
        torch.testing.assert_close(la({"x": new}, link_approx=link), plain((new - 0.5) / 2, link_approx=link))
    torch.testing.assert_close(la.H, plain.H)
    generators = [torch.Generator().manual_seed(0) for _ in range(2)]
    torch.testing.assert_close(
        la({"x": new}, "nn", link_approx="mc", n_samples=5, generator=generators[0]),
        plain((new - 0.5) / 2, "nn", link_approx="mc", n_samples=5, generator=generators[1]),
    )
    assert batches[0].keys() == {"x", "labels"}
    assert torch.equal(batches[0]["x"], x[:7])


@pytest.mark.parametrize("kind", ["tensor", "mapping", "nested"])
def test_a_tensor_changed_in_place_is_refused_by_name(kind):
    class Changes(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            x = x if kind == "tensor" else x["pixels"] if kind == "mapping" else x["in"][1]
            x -= 0.5
            return self.net(x)

    x, y = inputs(7), targets("classification", 7)
    batch = {
        "tensor": (x, y),
        "mapping": {"pixels": x, "labels": y},
        "nested": {"in": [torch.ones(7), x], "labels": y},
    }[kind]
    before = x.clone()
    named = {"tensor": "changes its input in place", "mapping": "'pixels'", "nested": r"'in'\[1\]"}[kind]
    with pytest.raises(ValueError, match=named):
        build(model=Changes()).fit([batch])
    assert torch.equal(x, before)


def test_changes_in_place_are_found_whatever_the_values():
    """A rectifier changes nothing of positive inputs, this time."""
    model = nn.Sequential(nn.ReLU(inplace=True), mlp())
    with pytest.raises(ValueError, match=r"in place.*inplace=False"):
        build(model=model).fit([(inputs(7).abs(), targets("classification", 7))])


# ---------------------------------------------------------------------- dtypes of inputs


class SinceEpoch(nn.Module):
    """Takes Unix seconds, whose differences float32 cannot tell."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(1, H), nn.Tanh(), nn.Linear(H, C))
        self.register_buffer("offset", torch.tensor(1.7e9, dtype=F64))

    def forward(self, seconds):
        return self.net(((seconds - self.offset) / 10).float())


def test_inputs_keep_the_precision_they_come_with():
    seconds = (1.7e9 + torch.arange(24, dtype=F64))[:, None]
    torch.manual_seed(0)
    model = SinceEpoch()
    la = fitted(model=model, data=[(seconds, targets("classification", 24))])
    phi, f = la.features(seconds[:6])
    torch.testing.assert_close(f, model(seconds[:6]).detach())
    assert len(la(seconds[:6]).unique(dim=0)) == 6
    torch.testing.assert_close(phi, oracle_features(model, seconds[:6], la.basis)[0], rtol=1e-4, atol=1e-5)


def test_inputs_of_a_model_whose_first_weight_is_coarse_keep_their_bits():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate = nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
            self.net = mlp(dtype=torch.float32)

        def forward(self, x):
            assert x.dtype == torch.float32
            return self.net(x) * self.gate.float()

    torch.manual_seed(0)
    model, x = Mixed(), inputs(dtype=torch.float32)
    la = fitted(model=model, data=[(x, targets("classification"))])
    torch.testing.assert_close(la.features(x)[1], model(x).detach())


def test_inputs_are_converted_only_where_the_model_fails_without_it():
    model = mlp(dtype=torch.float32)
    la = build(model=model)
    batches = [(a, t) for a, t in zip(inputs().split(7), targets("classification").split(7))]
    with pytest.warns(UserWarning, match=r"float64.*converted to torch.float32") as said:
        la.fit(batches)
    assert len(said) == 1
    torch.testing.assert_close(la(inputs(3)), la(inputs(3).float()))  # without another warning


# ---------------------------------------------------------------------- axes that fit by chance


class Positioned(nn.Module):
    """Adds an embedding of positions, an entry that all rows share."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.words, self.places = nn.Embedding(11, H, dtype=F64), nn.Embedding(11, H, dtype=F64)
        self.head = nn.Linear(H, C, dtype=F64)

    def forward(self, batch):
        h = self.words(batch["input_ids"]) + self.places(batch["position_ids"])
        return self.head(h.tanh().mean(1))


def positioned(*sizes):
    generator = torch.Generator().manual_seed(3)
    return [
        {
            "position_ids": torch.arange(6),
            "input_ids": torch.randint(11, (n, 6), generator=generator),
            "labels": torch.randint(C, (n,), generator=generator),
        }
        for n in sizes
    ]


@pytest.mark.parametrize("sizes", [(6, 5, 7), (7, 6, 5), (6, 6), (5, 6, 6)])
@pytest.mark.parametrize("key", ["input_ids", "absent"])
def test_a_shared_entry_as_long_as_a_batch_stays_whole(sizes, key):
    la = check(Positioned(), positioned(*sizes), positioned(6)[0], dict_key_x=key)
    x = positioned(6)[0]
    alone = [la({**x, "input_ids": x["input_ids"][i : i + 1]}) for i in range(6)]
    torch.testing.assert_close(la(x), torch.cat(alone))


class Channels(nn.Module):
    """Outputs (B, C, L), as convolutions give them; or (B, L, C)."""

    def __init__(self, last):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.last = nn.Conv1d(2, C, 1, dtype=F64), last

    def forward(self, x):
        f = self.conv(x)
        return f.transpose(1, 2) if self.last else f


def sequences(*lengths):
    return [
        (draws(i, 4, 2, length), torch.randint(C, (4, length), generator=torch.Generator().manual_seed(i)))
        for i, length in enumerate(lengths)
    ]


def test_classes_on_the_wrong_axis_are_refused_by_the_targets_shape():
    with pytest.raises(ValueError, match="movedim"):
        build(model=Channels(last=False)).fit(sequences(5))


@pytest.mark.parametrize("last", [False, True])
def test_two_readings_of_the_outputs_are_said_once(last):
    la = build(model=Channels(last))
    with pytest.warns(UserWarning, match=r"\(4, 3, 3\).*last axis.*classes") as said:
        la.fit(sequences(C, C))
    assert len([w for w in said if "last axis" in str(w.message)]) == 1


def test_a_second_length_decides_between_two_readings():
    la = build(model=Channels(last=False))
    with pytest.warns(UserWarning, match="last axis"), pytest.raises(ValueError, match="batch 1"):
        la.fit(sequences(C, 5))


# ---------------------------------------------------------------------- models that squeeze


class Squeezes(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(2, 5, 3, dtype=F64), nn.BatchNorm2d(5, dtype=F64)
        self.head = nn.Linear(5, C, dtype=F64)

    def forward(self, x):
        h = nn.functional.adaptive_avg_pool2d(self.norm(self.conv(x)).relu(), 1)
        return self.head(h.squeeze())


@pytest.mark.parametrize("autodiff", ["forward", "reverse", "double"])
def test_a_model_that_squeezes_is_right_for_every_batch(autodiff):
    model = Squeezes().eval()
    x, y = draws(0, N, 2, 5, 5), targets("classification")
    batches = [(a, t) for a, t in zip(x.split(7), y.split(7))]
    la = check(model, batches, draws(1, 5, 2, 5, 5), autodiff=autodiff)
    one = draws(1, 5, 2, 5, 5)
    torch.testing.assert_close(la(one[:1]), la(one)[:1])
    assert la(one[:1], "nn", link_approx="mc", n_samples=3).shape == (1, C)


class SqueezesEntry(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = Squeezes().eval()

    def forward(self, batch):
        return self.net(batch["x"])


@pytest.mark.parametrize("first", [1, 7])
@pytest.mark.parametrize("key", ["x", "absent"])
def test_a_model_that_squeezes_an_entry_of_a_mapping(first, key):
    x, y = draws(0, N, 2, 5, 5), targets("classification")
    model = SqueezesEntry().eval()
    pairs = [(x[:first], y[:first]), (x[first:], y[first:])]
    la = fitted(model=model, data=[{"x": a, "labels": t} for a, t in pairs], dict_key_x=key)
    plain = fitted(model=model.net, data=pairs)
    torch.testing.assert_close(la.H, plain.H)
    new = draws(1, 5, 2, 5, 5)
    for n in (5, 1):  # mappings of another kind, without labels
        torch.testing.assert_close(la({"x": new[:n]}), plain(new[:n]))
    restored = build(model=model, dict_key_x=key)
    restored.load_state_dict(la.state_dict())
    torch.testing.assert_close(restored({"x": new[:1]}), plain(new[:1]))


def test_a_first_batch_of_one_row_of_a_model_that_squeezes():
    x, y = draws(0, N, 2, 5, 5), targets("classification")
    la = fitted(model=Squeezes().eval(), data=[(x[:1], y[:1]), (x[1:], y[1:])])
    other = fitted(model=Squeezes().eval(), data=[(x, y)])
    torch.testing.assert_close(la.H, other.H)


# ---------------------------------------------------------------------- what cannot be used


def test_sparse_inputs_say_so():
    batch = (inputs(7).to_sparse(), targets("classification", 7))
    with pytest.raises(ValueError, match=r"dense.*sparse_coo.*to_dense"):
        build(model=mlp()).fit([batch])
    la = fitted()
    with pytest.raises(ValueError, match="sparse_coo"):
        la(inputs(7).to_sparse())


def test_packed_sequences_say_so():
    packed = pack_padded_sequence(draws(0, 3, 4, D), torch.tensor([4, 3, 1]), batch_first=True)
    with pytest.raises(ValueError, match="PackedSequence"):
        build().fit([(packed, targets("classification", 3))])
    with pytest.raises(ValueError, match=r"packed sequence under 'x'.*lengths"):
        build().fit([{"x": packed, "labels": targets("classification", 3)}])
    assert isinstance(packed, PackedSequence)


def test_sequences_packed_inside_the_model_work():
    class Tagger(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.rnn, self.head = nn.GRU(D, H, batch_first=True, dtype=F64), nn.Linear(H, C, dtype=F64)

        def forward(self, batch):
            packed = pack_padded_sequence(
                batch["x"], batch["lengths"].cpu(), batch_first=True, enforce_sorted=False
            )
            padded, lengths = pad_packed_sequence(self.rnn(packed)[0], batch_first=True)
            return self.head(padded[torch.arange(len(lengths)), lengths - 1])

    x, lengths, y = draws(0, N, 4, D), torch.arange(N) % 4 + 1, targets("classification")
    batches = [
        {"x": a, "lengths": n, "labels": t} for a, n, t in zip(x.split(7), lengths.split(7), y.split(7))
    ]
    la = build(model=Tagger(), subsample_size=5, n_eigenvalues=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # such models are differentiated row by row
        la.fit(batches)
        new = {"x": x[:3], "lengths": lengths[:3]}
        torch.testing.assert_close(la.features(new)[0], oracle_features(la.model, new, la.basis)[0])


def test_integers_into_a_floating_point_model_say_so():
    images = torch.randint(256, (7, D), dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"torch.uint8.*torch.float64.*scale"):
        build(model=mlp()).fit([(images, targets("classification", 7))])

    class Scales(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x.double() / 255)

    torch.testing.assert_close(
        fitted(model=Scales(), data=[(images, targets("classification", 7))]).H,
        fitted(model=Scales().net, data=[(images.double() / 255, targets("classification", 7))]).H,
    )


def test_integer_outputs_say_so():
    class Decides(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = mlp()

        def forward(self, x):
            return self.net(x).round().long()

    with pytest.raises(ValueError, match=r"floating-point.*torch.int64"):
        build(model=Decides()).fit([(inputs(7), targets("classification", 7))])


def test_complex_inputs_say_so():
    with pytest.raises(ValueError, match=r"torch.complex64.*real numbers"):
        build().fit([(inputs(7).to(torch.complex64), targets("classification", 7))])


def test_complex_weights_say_so():
    model = nn.Sequential(nn.Linear(D, C, dtype=torch.complex64))
    with pytest.raises(ValueError, match=r"complex.*'0.weight'"):
        build(model=model)


def test_the_width_of_an_input_is_checked_by_the_model_itself():
    la = fitted()
    with pytest.raises(RuntimeError):
        la(torch.zeros(3, D + 1, dtype=F64))
    assert M <= N
