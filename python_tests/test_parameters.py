"""Which parameters are penalized, and the reason given for each."""

from __future__ import annotations

import pytest
import torch
from torch import nn

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
