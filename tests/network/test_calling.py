"""Mappings are passed whole or by name, as the parameters of forward say."""

from __future__ import annotations

import copy
import pickle
from collections import UserDict
from types import SimpleNamespace

import laplace.curvature
import pytest
import torch
from helpers import C, DictModel, as_tuple, assert_same, dict_batches, fitted
from torch import Tensor, nn

from laplace_ella.network.calling import Calling
from laplace_ella.network.functional import FunctionalModel
from laplace_ella.network.rewriting import Rewrites, RewrittenModel

BATCH = {"ids": torch.ones(2, 3), "mask": torch.zeros(2, 3), "labels": torch.ones(2), "names": ["a", "b"]}


def module(forward):
    made = nn.Module()
    made.forward = forward
    return made


def fail(what):
    raise TypeError(what)


def mappings(x):
    return x if isinstance(x, (dict, UserDict)) else fail("no mapping")


def entries(**given):
    """Entries by name; a mapping in the place of one is an error."""
    return fail("no entry") if any(isinstance(v, (dict, UserDict)) for v in given.values()) else given


WHOLE, IDS, TWO, THREE = "whole", ["ids"], ["ids", "mask"], ["ids", "mask", "names"]
# Name: a forward that returns what it gets, and how it gets the batch.
FORWARDS = {
    "one parameter of another name": (lambda batch: batch, WHOLE),
    "more, no entry among them": (lambda batch, scale=1, *rest: batch, WHOLE),
    "the required one is no entry": (lambda batch, ids=None, mask=None: batch, WHOLE),
    "positional only": (lambda ids, /, mask=None: ids, WHOLE),
    "any positional": (lambda *args: args[0], WHOLE),
    "as in Hugging Face": (lambda ids=None, mask=None, labels=None: entries(ids=ids, mask=mask, labels=labels), TWO),
    "as in peft": (lambda ids=None, mask=None, **more: entries(ids=ids, mask=mask, **more), THREE),
    "two required": (lambda ids, mask: entries(ids=ids, mask=mask), TWO),
    "by keyword only": (lambda *, ids, mask=None: entries(ids=ids, mask=mask), TWO),
    "targets required": (lambda ids, labels: entries(ids=ids, labels=labels), ["ids", "labels"]),
    "one that is not the first": (lambda images=None, ids=None: entries(images=images, ids=ids), IDS),
    "any names": (lambda **more: entries(**more), THREE),
    "one, and any names": (lambda ids, **more: entries(ids=ids, **more), THREE),
    "the first, for mappings": (lambda ids: mappings(ids), WHOLE),
    "the first, for entries": (lambda ids: entries(ids=ids), IDS),
    "the first, and options": (lambda ids, deep=None: entries(ids=ids, deep=deep), IDS),
    "a wrapper's, of mappings": (lambda *args, **more: args[0] if args else fail("none"), WHOLE),
    "a wrapper's, of entries": (lambda *args, **more: fail("one") if args else entries(**more), THREE),
}  # fmt: skip


@pytest.mark.parametrize("kind", [dict, UserDict])
@pytest.mark.parametrize("name", FORWARDS)
def test_forwards(name, kind):
    forward, expected = FORWARDS[name]
    calling, x = Calling(), kind(BATCH)
    for _ in range(2):
        got = calling(module(forward), x)
        assert (WHOLE if got is x else sorted(k for k, v in got.items() if v is not None)) == expected


def test_what_has_no_signature_gets_it_whole():
    assert Calling()(module(type), BATCH) is dict


def test_tensors_and_arguments_of_a_call():
    x = BATCH["ids"]
    assert Calling()(module(lambda ids, mask=1: (ids, mask)), x, mask=3) == (x, 3)
    assert Calling()(module(lambda ids, mask, scale: scale), BATCH, scale=3) == 3
    assert Calling()(module(lambda batch, scale: (batch, scale)), BATCH, scale=3) == (BATCH, 3)


def test_where_two_entries_are_named_nothing_is_tried():
    ids, mask = Calling()(module(lambda ids, mask=None: (ids, mask)), BATCH)  # would take the mapping too
    assert ids is BATCH["ids"]
    assert mask is BATCH["mask"]


def test_a_rewritten_model_is_called_as_the_model_is():
    model = FunctionalModel(nn.Linear(2, 3), calling=Calling("digit"))
    assert RewrittenModel(model, Rewrites()).calling is model.calling


def test_targets_have_the_name_that_the_estimator_knows():
    got = Calling("mask")(module(lambda ids=None, mask=None, labels=None: (mask, labels)), BATCH)
    assert got == (None, BATCH["labels"])


def test_what_was_tried_is_remembered():
    calls, calling = [], Calling()
    tried = module(lambda ids: calls.append(ids) or entries(ids=ids))
    for _ in range(3):
        calling(tried, BATCH)
    assert [isinstance(x, dict) for x in calls] == [True, False, False, False]


def test_neither_fits():
    match = r"forward\(ids, pixels, \*, deep=1\) takes neither.*\['ids', 'labels', 'mask', 'names'\]; it needs \['pixels'\]"
    with pytest.raises(ValueError, match=match):
        Calling()(module(lambda ids, pixels, *, deep=1: None), BATCH)
    with pytest.raises(ValueError, match=r"forward\(\) takes neither"):
        Calling()(module(lambda: None), BATCH)


def test_errors_of_both_ways_are_seen():
    with pytest.raises(TypeError, match="by name") as caught:
        Calling()(module(lambda ids: fail("whole" if ids is BATCH else "by name")), BATCH)
    assert str(caught.value.__cause__) == "whole"
    with pytest.raises(TypeError, match="my own") as caught:
        Calling()(module(lambda ids, mask: fail("my own")), BATCH)
    assert caught.value.__cause__ is None


# ------------------------------------------------------------------ estimators


class ByName(DictModel):
    """As Hugging Face's models: entries by name, and a loss if there are labels."""

    def forward(self, input_ids=None, attention_mask=None, labels=None, **more):
        assert labels is None
        assert not more
        return super().forward({"input_ids": input_ids, "attention_mask": attention_mask})


class OfMappings(DictModel):
    """Looks at one entry of a mapping."""

    def forward(self, batch):
        return SimpleNamespace(logits=self.head(self.embedding(batch["input_ids"]).mean(1).tanh()))


class OfFirst(OfMappings):
    """Takes the first entry alone: either reading may be meant."""

    def forward(self, input_ids):
        return super().forward(
            {"input_ids": input_ids if isinstance(input_ids, Tensor) else fail("no tensor")}
        )


USES = {
    "call": lambda la, x: la(x),
    "nn": lambda la, x: la(x, pred_type="nn", generator=torch.Generator().manual_seed(0)),
    "features": lambda la, x: la.features(x),
    "novelty": lambda la, x: la.novelty(x),
    "copy": lambda la, x: copy.deepcopy(la)(x),
    "pickle": lambda la, x: pickle.loads(pickle.dumps(la))(x),
    "module": lambda la, x: la.as_module()(**x),
}


@pytest.mark.parametrize("makes", [(DictModel, ByName), (OfMappings, OfFirst)])
def test_estimators_find_the_same_with_either_kind_of_model(makes):
    whole, by_name = (fitted(model=make(), data=dict_batches()) for make in makes)
    x = {k: v for k, v in dict_batches(n=5)[0].items() if k != "labels"}
    for use in USES.values():
        for found, expected in zip(*(as_tuple(use(la, x)) for la in (by_name, whole)), strict=True):
            torch.testing.assert_close(found, expected)
    assert_same(by_name(UserDict(x)), by_name(x))


class Network(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Linear(4, C).double()

    def forward(self, pixels=None, labels=None):
        assert labels is None
        return self.net(pixels)


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")  # BackPACK's, as no input requires grad
@pytest.mark.parametrize("backend", ["BackPackGGN", "AsdlGGN"])
def test_backends_that_work_on_copies(backend):
    torch.manual_seed(0)
    data = [{"pixels": torch.randn(9, 4).double(), "labels": torch.arange(9) % C}]
    options = {"backend": getattr(laplace.curvature, backend), "dict_key_x": "pixels"}
    la, plain = fitted(model=Network(), data=data, **options), Network()
    plain.load_state_dict(la.model.state_dict())
    torch.testing.assert_close(la(data[0]), fitted(model=plain, data=data, dict_key_x="pixels")(data[0]))
