"""Which axis is which: entries that all rows share, classes beside positions, models that lose the axis of one row."""

import pytest
import torch
from helpers import C, H, N, build, fitted, targets
from models import Applied
from parts import check, draws, pairs
from torch import nn

F64 = torch.float64


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


def channels(last):
    """Outputs (B, C, L), as convolutions give them; or (B, L, C)."""
    conv = nn.Conv1d(2, C, 1, dtype=F64)
    return Applied(lambda net, x: net(x).transpose(1, 2), conv) if last else conv


def sequences(*lengths):
    return [(draws(i, 4, 2, length), torch.randint(C, (4, length))) for i, length in enumerate(lengths)]


def test_targets_tell_which_axis_holds_the_classes():
    build(model=channels(last=False)).fit(sequences(5))
    with (
        pytest.warns(UserWarning, match="last axis"),
        pytest.raises(ValueError, match=r"batch 1.*channel_axis=1"),
    ):
        build(model=channels(last=False)).fit(sequences(C, 5))
    build(model=channels(last=False), channel_axis=1).fit(sequences(C, 5))
    for last in (False, True):
        with pytest.warns(UserWarning, match=r"\(4, 3, 3\).*last axis.*classes") as said:
            build(model=channels(last)).fit(sequences(C, C))
        assert len([w for w in said if "last axis" in str(w.message)]) == 1


def squeezing():
    layers = nn.Conv2d(2, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Linear(5, C)
    return Applied(lambda net, x: net[4](net[:4](x).squeeze()), nn.Sequential(*layers)).double().eval()


@pytest.mark.parametrize("first", [1, 7])
@pytest.mark.parametrize("key", ["x", "absent"])
def test_a_model_that_squeezes_an_entry_of_a_mapping(first, key):
    model = Applied(lambda net, batch: net(batch["x"]), squeezing())
    x, y, new = draws(0, N, 2, 5, 5), targets("classification"), draws(1, 5, 2, 5, 5)
    data = [(x[:first], y[:first]), (x[first:], y[first:])]
    la = fitted(model=model, data=[{"x": a, "labels": t} for a, t in data], dict_key_x=key)
    plain = fitted(model=model.net, data=data)
    torch.testing.assert_close(la.H, plain.H)
    for n in (5, 1):  # mappings of another kind, without labels
        torch.testing.assert_close(la({"x": new[:n]}), plain(new[:n]))
    restored = build(model=model, dict_key_x=key)
    restored.load_state_dict(la.state_dict())
    torch.testing.assert_close(restored({"x": new[:1]}), plain(new[:1]))


@pytest.mark.parametrize("autodiff", ["forward", "reverse", "double"])
def test_a_model_that_squeezes_is_right_for_every_batch(autodiff):
    model = squeezing()
    batches = pairs(draws(0, N, 2, 5, 5))
    la = check(model, batches, draws(1, 5, 2, 5, 5), autodiff=autodiff)
    one = draws(1, 5, 2, 5, 5)
    torch.testing.assert_close(la(one[:1]), la(one)[:1])
    assert la(one[:1], "nn", link_approx="mc", n_samples=3).shape == (1, C)
