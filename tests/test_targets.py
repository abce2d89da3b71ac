"""Which layers are pruned, by which rules, and the reason that every other layer is given."""

from __future__ import annotations

import pytest
import torch
from conftest import TinyAdapter, tiny_model
from torch import nn

import compressor
from compressor import NM, Unstructured
from compressor.adapter import with_rules
from compressor.errors import UsageError
from compressor.plugins.magnitude import Magnitude
from compressor.sparsity.layers import fitting, idle, matches, reached, select, survey, unmatched, weighted

PATTERN = NM(2, 4)


def network() -> nn.Module:
    """Two blocks with attention and MLP, and a stem that 2:4 does not fit."""

    def block() -> nn.Module:
        return nn.ModuleDict(
            {
                "attn": nn.ModuleDict({"qkv": nn.Linear(16, 48, bias=False), "proj": nn.Linear(16, 16)}),
                "mlp": nn.ModuleDict({"fc1": nn.Linear(16, 32), "fc2": nn.Linear(32, 16)}),
            }
        )

    return nn.ModuleDict(
        {"stem": nn.Conv2d(3, 16, 3), "blocks": nn.ModuleList([block(), block()]), "blocks_out": nn.Linear(16, 4)}
    )


def chosen(targets: list[str], ignore: list[str] | None = None) -> set[str]:
    model = network()
    layers = select(model, PATTERN, set(fitting(model, PATTERN)), targets, ignore or [])
    return {layer.module_name for layer in layers if layer.reason is None}


def in_block(index: int) -> set[str]:
    return {f"blocks.{index}.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}


EVERYTHING = in_block(0) | in_block(1) | {"blocks_out"}


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("blocks.0.mlp.fc1", {"blocks.0.mlp.fc1"}),
        ("blocks.0.mlp.fc1.weight", {"blocks.0.mlp.fc1"}),
        ("blocks.1", in_block(1)),
        ("blocks", in_block(0) | in_block(1)),  # and not blocks_out
        ("Linear", EVERYTHING),
        ("*.attn.*", {name for name in EVERYTHING if ".attn." in name}),
        ("blocks.?.mlp.fc[12]", {name for name in EVERYTHING if ".mlp." in name}),
        ("re:fc1|qkv", {name for name in EVERYTHING if name.endswith(("fc1", "qkv"))}),
        ("re:^blocks_", {"blocks_out"}),
    ],
)
def test_a_rule_names_layers(rule: str, expected: set[str]) -> None:
    assert chosen([rule]) == expected
    if rule != "Linear":
        assert chosen([], [rule]) == EVERYTHING - expected


def test_rules_add_up_and_ignore_wins() -> None:
    assert chosen(["blocks.0", "blocks_out"]) == in_block(0) | {"blocks_out"}
    assert chosen(["blocks"], ["*.mlp.*"]) == {name for name in EVERYTHING if ".attn." in name}


def test_every_layer_is_listed_with_its_reason() -> None:
    model = network()
    allowed = set(fitting(model, PATTERN)) - {"blocks.1.attn.qkv.weight"}
    layers = select(model, PATTERN, allowed, ["blocks"], ["*.fc2"])
    reasons = {layer.name: layer.reason for layer in layers}
    assert reasons["stem.weight"] == "2:4 needs dim 1 divisible by 4, got (16, 3, 3, 3)"
    assert reasons["blocks_out.weight"] == "not among the targets"
    assert reasons["blocks.0.mlp.fc2.weight"] == "ignored by a rule"
    assert reasons["blocks.1.attn.qkv.weight"] == "left out by the method"
    assert reasons["blocks.0.attn.qkv.weight"] is None
    assert len(reasons) == len(layers) == 10


@pytest.mark.parametrize("rule", ["stem", "stem.weight"])
def test_a_target_named_in_full_that_does_not_fit_is_an_error(rule: str) -> None:
    with pytest.raises(UsageError) as caught:
        chosen([rule, "blocks"])
    assert caught.value.message == "stem.weight: 2:4 needs dim 1 divisible by 4, got (16, 3, 3, 3)"
    assert caught.value.hint == "Leave it out with --ignore stem"
    assert chosen([rule, "blocks"], ["stem"]) == in_block(0) | in_block(1)


def test_a_target_that_matches_nothing_suggests_one_that_does() -> None:
    with pytest.raises(UsageError, match=r"target 'block_out' matches no layer\nDid you mean 'blocks_out'\?"):
        chosen(["blocks", "block_out"])


def test_nothing_left_is_an_error_with_reasons() -> None:
    with pytest.raises(
        UsageError, match=r"fits no layer of this model: stem\.weight \(ignored by a rule\).*; and 7 more"
    ):
        chosen([], ["re:"])
    with pytest.raises(UsageError, match=r"2:5 fits no layer of this model: stem\.weight \(2:5 needs dim 1"):
        fitting(network(), NM(2, 5))


def test_ignore_rules_that_match_nothing_are_told() -> None:
    assert unmatched(survey(network(), PATTERN), ["blocks.0", "blocks.7", "re:fc3", "Conv2d"]) == ["blocks.7", "re:fc3"]


def test_a_malformed_expression_is_refused() -> None:
    layer = survey(network(), PATTERN)[0]
    with pytest.raises(UsageError, match=r"rule 're:\(': not a regular expression"):
        matches("re:(", layer)


@pytest.mark.parametrize(
    ("module", "reason"),
    [
        (nn.Linear(8, 4), None),
        (nn.Linear(8, 4, bias=False), None),
        (nn.Conv1d(8, 4, 3), None),
        (nn.Conv2d(8, 4, 3), None),
        (nn.Conv2d(8, 4, 1), None),
        (nn.Conv3d(8, 4, 3), None),
        (nn.Conv2d(8, 8, 3, groups=2), None),
        (nn.Conv2d(8, 8, 3, groups=4), "2:4 needs dim 1 divisible by 4, got (8, 2, 3, 3)"),
        (nn.Conv2d(8, 8, 3, groups=8), "2:4 needs dim 1 divisible by 4, got (8, 1, 3, 3)"),
        (nn.ConvTranspose1d(8, 4, 3), "transposed convolution: dim 1 of its weight is the output"),
        (nn.ConvTranspose2d(8, 4, 3), "transposed convolution: dim 1 of its weight is the output"),
        (nn.ConvTranspose3d(8, 4, 3), "transposed convolution: dim 1 of its weight is the output"),
        (nn.Linear(6, 4), "2:4 needs dim 1 divisible by 4, got (4, 6)"),
        (nn.Linear(8, 4, dtype=torch.float16), None),
        (nn.Linear(8, 4, device="meta"), None),
        (nn.Linear(8, 4).requires_grad_(False), "frozen (requires_grad is False)"),
    ],
    ids=str,
)
def test_each_kind_of_layer_has_an_answer(module: nn.Module, reason: str | None) -> None:
    (layer,) = survey(nn.Sequential(module), PATTERN)
    assert (layer.name, layer.reason) == ("0.weight", reason)


def test_an_empty_layer_has_an_answer() -> None:
    with pytest.warns(UserWarning, match="zero-element"):
        empty = nn.Linear(8, 0)
    assert survey(empty, PATTERN)[0].reason == "2:4 the weight is empty, got (0, 8)"


def test_integer_weights_are_no_targets() -> None:
    model = nn.Linear(8, 4)
    model.weight = nn.Parameter(torch.zeros(4, 8, dtype=torch.int8), requires_grad=False)
    assert survey(model, PATTERN)[0].reason == "frozen (requires_grad is False)"


def test_layers_without_a_prunable_weight_are_not_listed() -> None:
    model = nn.Sequential(nn.LayerNorm(8), nn.Embedding(4, 8), nn.GELU(), nn.GroupNorm(2, 8))
    assert survey(model, PATTERN) == []


def packed() -> nn.Module:
    """Weights that torch's own modules keep and multiply by, beside those of layers."""
    alike, unlike = nn.MultiheadAttention(16, 2), nn.MultiheadAttention(16, 2, kdim=8, vdim=8)
    return nn.ModuleDict(
        {
            "alike": alike,
            "unlike": unlike,
            "rnn": nn.GRU(16, 16),
            "cell": nn.LSTMCell(16, 16),
            "two": nn.Bilinear(4, 4, 8),
        }
    )


def test_what_else_multiplies_by_weights_is_listed_with_the_reason() -> None:
    listed = {layer.name: (type(layer.module).__name__, layer.reason) for layer in survey(packed(), PATTERN)}
    assert [name for name, (_, reason) in listed.items() if reason is None] == [
        "alike.out_proj.weight",
        "unlike.out_proj.weight",
    ]
    left = {
        name: kind
        for name, (kind, reason) in listed.items()
        if reason == f"a weight of {kind}, not of a Linear or convolution"
    }
    assert left == {
        **{"alike.in_proj_weight": "MultiheadAttention"},
        **dict.fromkeys((f"unlike.{part}_proj_weight" for part in "qkv"), "MultiheadAttention"),
        **dict.fromkeys(("rnn.weight_ih_l0", "rnn.weight_hh_l0"), "GRU"),
        **dict.fromkeys(("cell.weight_ih", "cell.weight_hh"), "LSTMCell"),
        "two.weight": "Bilinear",
    }
    assert len(listed) == len(left) + 2


def test_a_rule_for_such_a_module_is_one_for_the_layer_inside() -> None:
    model = packed()
    names = {layer.name for layer in survey(model, PATTERN)}
    taken = [one.name for one in select(model, PATTERN, names, ["alike"], []) if one.reason is None]
    assert taken == ["alike.out_proj.weight"]
    with pytest.raises(UsageError, match=r"alike\.in_proj_weight: a weight of MultiheadAttention") as caught:
        select(model, PATTERN, names, ["alike", "alike.in_proj_weight"], [])
    assert "--ignore alike.in_proj_weight" in str(caught.value)


def test_a_lone_layer_is_its_own_model() -> None:
    assert list(fitting(nn.Linear(8, 4), PATTERN)) == ["weight"]


def test_shared_modules_and_tied_weights_are_listed_once() -> None:
    shared = nn.Linear(8, 8)
    tied = nn.Linear(8, 8)
    tied.weight = shared.weight
    assert [layer.name for layer in survey(nn.Sequential(shared, shared, tied), PATTERN)] == ["0.weight"]


def test_names_are_those_of_the_parameters() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(8, 8)
            self.head = nn.Linear(8, 8)
            self.head.weight = self.embedding.weight

    for model in (network(), Tied()):
        assert set(fitting(model, PATTERN)) <= set(dict(model.named_parameters()))


def test_a_weight_under_a_parametrization_is_listed_with_a_reason() -> None:
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), nn.Linear(8, 4))
    layers = survey(model, PATTERN)
    assert [layer.module_name for layer in layers] == ["0", "1"]
    assert layers[0].reason is not None and layers[1].reason is None


def test_unstructured_fits_what_n_m_does_not() -> None:
    assert [
        layer.reason for layer in survey(nn.Sequential(nn.Linear(7, 3), nn.Conv2d(3, 5, 3)), Unstructured(0.5))
    ] == [None, None]


def test_weighted_layers_have_their_parameters_names_also_where_they_share_one() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Conv1d(4, 4, 1), nn.Linear(4, 4), nn.ConvTranspose1d(4, 4, 1))
    model[3].weight = model[0].weight
    found = [(layer.name, layer.module_name) for layer in weighted(model)]
    assert found == [("0.weight", "0"), ("2.weight", "2"), ("0.weight", "3")]
    assert all(layer.weight is layer.module.weight for layer in weighted(model))
    assert [layer.name for layer in weighted(nn.Linear(4, 4))] == ["weight"]


class Ignoring(TinyAdapter):
    """With the comma forgotten."""

    ignore = "re:0"


@pytest.mark.parametrize("verb", [compressor.prune, compressor.prune_])
def test_rules_are_texts_and_no_single_one(verb) -> None:
    given = {"adapter": TinyAdapter(), "data": torch.randn(8, 16), "batch_size": 8}
    given |= {"steps": 0} if verb is compressor.prune else {}
    for name in ("targets", "ignore"):
        with pytest.raises(UsageError, match=rf"{name} is the text 're:0'"):
            verb(tiny_model(), Magnitude(), **{**given, name: "re:0"})
        with pytest.raises(UsageError, match=f"{name} holds a NoneType"):
            verb(tiny_model(), Magnitude(), **{**given, name: [None]})
        for wrong in (3, (rule for rule in ["0"])):
            with pytest.raises(UsageError, match=f"{name}: a {type(wrong).__name__}"):
                verb(tiny_model(), Magnitude(), **{**given, name: wrong})
    with pytest.raises(UsageError, match="ignore of Ignoring is the text 're:0'"):
        verb(tiny_model(), Magnitude(), **{**given, "adapter": Ignoring()})
    assert list(verb(tiny_model(), Magnitude(), **given, ignore=("0",)).masks) == ["2.weight"]


def test_rules_that_are_one_text_are_refused_wherever_they_are_read() -> None:
    model = tiny_model()
    layer = survey(model, PATTERN)[0]
    for call in (
        lambda: compressor.choose_layers(model, Magnitude(), TinyAdapter(), "0", None),
        lambda: compressor.choose_layers(model, Magnitude(), Ignoring(), None, None),
        lambda: with_rules(TinyAdapter(), None, "0"),
        lambda: with_rules(Ignoring(), ["0"], None),
        lambda: select(model, PATTERN, {"0.weight"}, "0", []),
        lambda: select(model, PATTERN, {"0.weight"}, [], "0"),
        lambda: unmatched([layer], "0"),
        lambda: reached(layer, "0", []),
        lambda: reached(layer, [], "0"),
    ):
        with pytest.raises(UsageError, match="the text"):
            call()


@pytest.mark.parametrize("verb", [compressor.prune, compressor.prune_])
def test_a_rule_that_leaves_nothing_out_is_warned_of(verb) -> None:
    given = {"adapter": TinyAdapter(), "data": torch.randn(8, 16), "batch_size": 8}
    given |= {"steps": 0} if verb is compressor.prune else {}
    with pytest.warns(UserWarning, match="ignore: 'nope' matches no layer"):
        verb(tiny_model(), Magnitude(), **given, ignore=["nope", "0"])


def test_looking_for_layers_changes_no_buffer_of_a_parametrization(samples: torch.Tensor) -> None:
    """Spectral norm's, in training mode, takes a step of its power iteration whenever the weight is computed."""
    normed = nn.utils.parametrizations.spectral_norm(nn.Linear(16, 16))
    model = nn.Sequential(normed, nn.SiLU(), nn.Linear(16, 16)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    layers = compressor.choose_layers(model, Magnitude(), TinyAdapter())
    compressor.prune(model, Magnitude(), adapter=TinyAdapter(), data=samples, ignore=["0"], steps=1, batch_size=8)
    assert [layer.reason for layer in layers] == ["its weight is computed by a parametrization", None]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(module.training for module in model.modules())


class Tied(nn.Module):
    """One weight under three names: an embedding's and those of two Linears; and a module with two names."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.head, self.tail = nn.Embedding(16, 16), nn.Linear(16, 16), nn.Linear(16, 16)
        self.head.weight = self.tail.weight = self.embedding.weight
        self.encoder = nn.ModuleDict({"inner": nn.Linear(16, 16)})
        self.decoder, self.free = nn.ModuleDict({"inner": self.encoder["inner"]}), nn.Linear(16, 16)


@pytest.mark.parametrize("rule", ["embedding", "head", "tail", "tail.weight", "re:^tail$", "t*l"])
def test_a_shared_weight_goes_by_the_name_of_each_module_that_has_it(rule: str) -> None:
    model = Tied()
    allowed = set(fitting(model, PATTERN))
    left = [one.module_name for one in select(model, PATTERN, allowed, [], [rule]) if one.reason is None]
    assert left == ["encoder.inner", "free"] and not idle(model, [rule])
    taken = [one.module_name for one in select(model, PATTERN, allowed, [rule], []) if one.reason is None]
    assert taken == ["head"]


@pytest.mark.parametrize("rule", ["decoder", "decoder.inner", "encoder"])
def test_a_shared_module_goes_by_each_of_its_names(rule: str) -> None:
    layers = select(Tied(), PATTERN, set(fitting(Tied(), PATTERN)), [], [rule])
    assert [one.module_name for one in layers if one.reason is None] == ["head", "free"]
