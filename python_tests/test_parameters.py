"""Which parameters are penalized, and the reason given for each."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

from s2d_kernels import S2D
from s2d_kernels.parameters import find_matrices


class Model(nn.Module):
    """One of everything that is mistaken for a plain linear layer somewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 16)
        self.patch = nn.Conv2d(3, 16, 4, stride=4)
        self.overlapping = nn.Conv2d(3, 16, 4, stride=2)
        self.qkv = nn.Linear(16, 48)
        self.c_attn = nn.Linear(16, 32)  # grouped queries: not three equal blocks
        self.attention = nn.MultiheadAttention(16, 2)
        self.fc1 = nn.Linear(16, 64)
        self.fc2 = nn.Linear(64, 16)
        self.frozen = nn.Linear(16, 16)
        self.frozen.weight.requires_grad_(False)
        self.twin = nn.Linear(16, 64)
        self.twin.weight = self.fc1.weight
        self.lora_A = nn.Linear(16, 8, bias=False)
        self.norm = nn.LayerNorm(16)
        self.experts = nn.Parameter(torch.randn(4, 16, 16))
        self.narrow = nn.Linear(16, 6)
        self.lm_head = nn.Linear(16, 50, bias=False)
        self.lm_head.weight = self.embed.weight
        self.score = nn.Linear(16, 10)


def test_every_parameter_gets_one_decision_with_a_reason() -> None:
    model = Model()
    matrices, decisions = find_matrices(model)
    table = {d.name: (d.decision, d.reason) for d in decisions}
    assert len(table) == len(decisions)
    assert {d.name for d in decisions} >= {name for name, _ in model.named_parameters()}
    expected_skips = {
        "embed.weight": "embedding",
        "overlapping.weight": "overlapping windows",
        "attention.out_proj.weight": "cannot be captured",
        "frozen.weight": "frozen",
        "twin.weight": "tied to fc1.weight",
        "lora_A.weight": "low-rank adapter",
        "norm.weight": "not a matrix",
        "experts": "expert",
        "narrow.weight": "only 6 singular values",
        "lm_head.weight": "tied to the embedding embed.weight",
        "score.weight": "output head",
        "fc1.bias": "not a matrix",
    }
    for name, reason in expected_skips.items():
        assert table[name][0] == "skip", name
        assert reason in table[name][1], table[name]
    penalized = {name for name, (decision, _) in table.items() if decision == "penalize"}
    assert penalized == {
        "patch.weight",
        "qkv.weight",
        "c_attn.weight",
        "attention.in_proj_weight",
        "fc1.weight",
        "fc2.weight",
    }
    names = [m.name for m in matrices]
    assert names.count("fc1.weight") == 1
    assert [n for n in names if n.startswith("qkv")] == ["qkv.weight[0:16]", "qkv.weight[16:32]", "qkv.weight[32:48]"]
    assert [m.shape for m in matrices if m.kind == "attention"] == [(16, 16)] * 3
    assert next(m.shape for m in matrices if m.kind == "patch") == (16, 48)
    assert "fused: 3 matrices" in table["qkv.weight"][1]


def test_patterns_first_match_wins() -> None:
    select = [("fc1", False), ("fc|score|narrow|embed|frozen", True)]
    _, decisions = find_matrices(Model(), select=select)
    table = {d.name: d for d in decisions}
    assert table["fc1.weight"].reason == "skipped by pattern 'fc1'"
    assert table["score.weight"].decision == table["narrow.weight"].decision == "penalize"
    assert table["embed.weight"].decision == table["frozen.weight"].decision == "skip"


def test_splits() -> None:
    matrices, _ = find_matrices(Model(), splits={"c_attn": [16, 8, 8]})
    assert [m.name for m in matrices if "c_attn" in m.name] == [
        "c_attn.weight[0:16]",
        "c_attn.weight[16:24]",
        "c_attn.weight[24:32]",
    ]
    with pytest.raises(ValueError, match="add up to its 32 rows"):
        find_matrices(Model(), splits={"c_attn": [16, 8]})
    frozen = Model()
    frozen.c_attn.requires_grad_(False)  # such as a tower whose projections are cut otherwise
    reasons = {d.name: d.reason for d in find_matrices(frozen, splits={"c_attn": [16, 8]})[1]}
    assert reasons["c_attn.weight"] == "frozen"


@pytest.mark.parametrize("arguments", [{"select": [("no_such", True)]}, {"splits": {"no_such": [1]}}])
def test_a_pattern_that_matches_nothing_raises(arguments: dict) -> None:
    with pytest.raises(ValueError, match="no_such"):
        find_matrices(Model(), **arguments)


def test_views_reach_the_parameter() -> None:
    model = Model()
    matrices, _ = find_matrices(model)
    for matrix in matrices:
        gradient = torch.zeros_like(matrix.parameter)
        rows = matrix.rows(gradient)
        rows.fill_(1.0)
        matrix.write_back(gradient, rows)
        assert gradient.sum() == matrix.shape[0] * matrix.shape[1]


def decisions_of(model: nn.Module) -> dict[str, str]:
    return {d.name: f"{d.decision}: {d.reason}" for d in find_matrices(model)[1]}


def nested(name: str, leaf: nn.Module) -> nn.Module:
    """A model that holds `leaf` under a dotted name."""
    for part in reversed(name.split(".")):
        outer = nn.Module()
        outer.add_module(part, leaf)
        leaf = outer
    return leaf


@pytest.mark.parametrize(
    "name",
    [
        "lm_head",  # Llama, GPT-2
        "lm_head.decoder",  # RoBERTa
        "cls.predictions.decoder",  # BERT
        "cls.seq_relationship",
        "classifier.out_proj",  # RobertaForSequenceClassification
        "cls_classifier",  # DeiT
        "distillation_classifier",
        "head.fc",  # timm
        "head_dist",
        "heads.head",  # torchvision
        "lm_head.dense",
        "qa_outputs",
        "score",
        "embed_out",  # GPT-NeoX
    ],
)
def test_output_heads_by_their_real_names(name: str) -> None:
    assert decisions_of(nested(name, nn.Linear(32, 32)))[f"{name}.weight"] == "skip: output head"


@pytest.mark.parametrize("name", ["attention.heads.0.key", "headless.proj", "rescore", "vision_model.head.mlp.fc1"])
def test_names_that_only_look_like_heads(name: str) -> None:
    assert decisions_of(nested(name, nn.Linear(32, 32)))[f"{name}.weight"].startswith("penalize")


def test_a_projection_whose_heads_come_in_turn_is_one_matrix() -> None:
    """GPT-NeoX: queries, keys and values of a head, then of the next; thirds of its rows are no matrices."""
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTNeoXConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=4, intermediate_size=64, vocab_size=50
    )
    model = transformers.GPTNeoXModel(config)
    name = "layers.0.attention.query_key_value.weight"
    assert [m.name for m in find_matrices(model)[0] if "query" in m.name] == [name]
    assert "counts as one matrix" in decisions_of(model)[name]
    cut, _ = find_matrices(model, splits={"query_key_value": [8] * 12})
    assert len([m for m in cut if "query" in m.name]) == 12


def test_names_under_wrappers() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(32, 32)
            self.module = nn.Sequential()
            self.module.add_module("fc", nn.Linear(32, 32))

    model = Own()
    expected = ["fc.weight", "module.fc.weight"]
    assert [m.name for m in find_matrices(model)[0]] == expected  # a level of its own that is called `module`
    for wrapped in (nn.DataParallel(model), torch.compile(model), torch.compile(nn.DataParallel(model))):
        assert [m.name for m in find_matrices(wrapped)[0]] == expected
    model.fc = torch.compile(model.fc)
    assert [m.name for m in find_matrices(model)[0]] == expected


def test_a_model_on_several_devices_or_without_data_is_refused() -> None:
    spread = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32, device="meta"))
    with pytest.raises(NotImplementedError, match=r"spread over 2 devices.*'0.weight' on cpu, '1.weight' on meta"):
        S2D(spread)
    with pytest.raises(NotImplementedError, match=r"'0.weight' is on the meta device: load the weights"):
        S2D(nn.Sequential(nn.Linear(32, 32, device="meta")))


def test_parameters_unfrozen_later_are_warned_of_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(3)))
    model.add_module("lm_head", nn.Linear(32, 32))
    model[0].requires_grad_(False)
    model.lm_head.requires_grad_(False)  # an output head is left alone either way
    reg = S2D(model, interval=2, lead=0)
    for step in range(5):
        if step == 1:
            model.requires_grad_(True)
        model(torch.randn(8, 32)).sum().backward()
        reg.add_grad()
        warnings = [r.getMessage() for r in caplog.records if "frozen when it was built" in r.getMessage()]
        assert len(warnings) == (step >= 2)  # at the refresh step after it
    assert "S2D: 1 parameters that were" in warnings[0]  # its bias is no matrix
    assert "(first: 0.weight)" in warnings[0]
    reg.close()


def test_an_s2d_says_that_it_cannot_be_copied() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    model.reg = S2D(model)
    for copying in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match=r"S2D cannot be copied or pickled: .* Store state_dict\(\)"):
            copying(model)
    model.reg.close()


def test_names_of_implementations_and_states_are_checked() -> None:
    model = nn.Sequential(nn.Linear(32, 32))
    with pytest.raises(ValueError, match="impl='x' is none of"):
        S2D(model, impl="x")
    reg = S2D(model)
    with pytest.raises(TypeError, match=r"state must be what S2D.state_dict\(\) returned, got NoneType"):
        reg.load_state_dict(None)
    reg.close()
