"""sft.py: LoRA's laws, PEFT's file format, the schedule, the loop, and the command."""

import argparse
import hashlib
import json
import math
import runpy
import sys
from collections import Counter
from types import SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import transformers
from conftest import ROOT, TEXTS, load_lm, make_tokenizer, read, shared, write
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

import scores
import sft
from data import UserError, build_table, step_indices
from scores import merge_adapter, read_adapter
from sft import LoRA, adapter_off, inject, lora_layers, save_adapter

BOTH = pytest.mark.parametrize("name", ["llama", "gpt2"])  # nn.Linear and Conv1D
torch.set_num_threads(1)  # the models are so small that threads only wait for each other
IDS = torch.arange(40).reshape(2, 20) * 7 % 300


def load(folder):
    return load_lm(str(folder), torch.float32).model


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, rtol=0, atol=tolerance)


def inject_random(model, r=3, alpha=6, targets=None, seed=1):
    """An adapter that changes the model: B is random, too."""
    inject(model, r, alpha, targets, seed)
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.B.data = 0.1 * torch.randn(layer.B.shape, generator=generator)


# ---- The laws of LoRA ----------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 3, 7)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_layer_in_one_function_is_the_plain_one(dtype, shape, bias):
    """Output and the gradients of x, A and B, for any upstream gradient, W as Conv1D stores it."""
    torch.manual_seed(0)
    sizes = shape, (7, 5), (5,), (2, 7), (5, 2)
    x, W, b, A, B = (torch.randn(size, dtype=dtype) for size in sizes)
    W, b = W.T, b if bias else None
    leaves = [t.requires_grad_() for t in (x, A, B)]
    upstream = torch.randn(*shape[:-1], 5, dtype=dtype)
    results = []
    for way in (sft.lora_plain, sft.LoRALinear.apply):
        y = way(x, W, b, A, B, 2.5)
        results.append([y, *torch.autograd.grad(y, leaves, upstream)])
    for plain, fused in zip(*results, strict=True):
        noise = 1e-12 if dtype == torch.float64 else 0.2
        torch.testing.assert_close(fused, plain, rtol=noise, atol=noise)


@BOTH
def test_a_fresh_adapter_changes_no_bit(checkpoints, name):
    model = load(checkpoints(name))
    before = logits(model)
    inject(model, r=4, alpha=8)
    assert torch.equal(logits(model), before)


@BOTH
def test_training_moves_the_adapter_and_never_the_base(checkpoints, tmp_path, name):
    lm = load_lm(checkpoints(name), torch.float32)
    inject(lm.model, r=2, alpha=4)
    before = {key: p.detach().clone() for key, p in lm.model.named_parameters()}
    train_sft(lm, tmp_path, lr=1e-2)
    for key, p in lm.model.named_parameters():
        adapter = key.endswith((".A", ".B"))
        assert (p.requires_grad, torch.equal(p, before[key])) == (adapter, not adapter), key


@BOTH
def test_merged_equals_adapter(checkpoints, tmp_path, name):
    model, merged = load(checkpoints(name)), load(checkpoints(name))
    base = logits(model)
    inject_random(model)
    assert not close(logits(model), base, 0.1)
    save_adapter(model, tmp_path, "base", beneath=None)
    merge_adapter(merged, read_adapter(str(tmp_path)), "saved")
    assert close(logits(merged), logits(model))


@BOTH
def test_adapter_off_is_the_base_and_ends_even_by_an_exception(checkpoints, name):
    model = load(checkpoints(name))
    base = logits(model)
    inject_random(model)
    adapted = logits(model)
    with adapter_off(model):
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    with pytest.raises(KeyError), adapter_off(model):
        raise KeyError
    assert torch.equal(logits(model), adapted)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_scale_is_applied_exactly_once(tmp_path, kind):
    """W = [[1 2] [3 4]], A = [[1 0] [0 2]], B = [[1 0] [1 1]], r = 2, alpha = 6: scale 3.

    B A = [[1 0] [1 2]], merged W + 3 B A = [[4 2] [6 10]]; x = (1, 1) gives (6, 16) either way.
    """
    W = torch.tensor([[1.0, 2.0], [3.0, 4.0]])

    def layer():
        made = kind(2, 2)
        made.weight.data = (W.T if kind is Conv1D else W).clone()
        made.bias.data.zero_()
        return made.requires_grad_(False)

    lora = LoRA(layer(), 2, 6, torch.Generator())
    lora.A.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    lora.B.data = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    x, want = torch.ones(2), [6.0, 16.0]
    assert lora(x).tolist() == want

    save_adapter(nn.Sequential(lora), tmp_path, "base", beneath=None)
    fresh = nn.Sequential(layer())
    merge_adapter(fresh, read_adapter(str(tmp_path)), "saved")
    assert fresh(x).tolist() == want
    weight = fresh[0].weight.T if kind is Conv1D else fresh[0].weight
    assert weight.tolist() == [[4.0, 2.0], [6.0, 10.0]]


# ---- Where adapters go ---------------------------------------------------------------------------


LINEAR = {
    "llama": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "mlp.gate_proj mlp.up_proj mlp.down_proj",
    "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
    "gpt-neox": "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
}
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "gpt-neox": "gpt_neox.layers"}


@pytest.mark.parametrize("name", LINEAR)
def test_all_linear_layers_of_the_blocks_and_not_the_head(checkpoints, name):
    model = load(checkpoints(name))
    inject(model, r=2, alpha=4)
    want = {f"{BLOCKS[name]}.{block}.{leaf}" for block in (0, 1) for leaf in LINEAR[name].split()}
    assert lora_layers(model).keys() == want


@pytest.mark.parametrize(
    ("name", "targets"), [("llama", ["q_proj", "down_proj"]), ("gpt2", ["c_proj"])]
)
def test_named_targets(checkpoints, name, targets):
    model = load(checkpoints(name))
    with pytest.raises(UserError, match="lm_head is no linear layer of the blocks; there are "):
        inject(model, 2, 4, [*targets, "lm_head"])
    assert not lora_layers(model)
    inject(model, 2, 4, targets)
    assert len(lora_layers(model)) == 4
    assert {layer.split(".")[-1] for layer in lora_layers(model)} == set(targets)


def test_the_start_is_that_of_peft_and_of_the_seed(checkpoints):
    """A uniform in +-1/sqrt(in), B zero; the numbers follow from the seed."""

    def start(seed):
        model = load(checkpoints("llama"))
        inject(model, 8, 4, seed=seed)
        return lora_layers(model)["model.layers.0.mlp.down_proj"]

    one, same, other = start(5), start(5), start(6)
    assert (one.A.shape, one.B.shape, one.scale) == ((8, 64), (32, 8), 4 / 8)
    assert torch.equal(one.A, same.A)
    assert not torch.equal(one.A, other.A)
    assert 0.98 / 8 < one.A.abs().max() <= 1 / 8
    assert not one.B.any()


# ---- Adapters as files ---------------------------------------------------------------------------


def test_the_saved_file_is_in_the_format_of_peft(checkpoints, tmp_path):
    """PEFT 0.21: A is [r, in], B is [out, r]; k_proj of this Llama is 32 -> 16."""
    model = load(checkpoints("llama"))
    inject_random(model, targets=["k_proj"])
    save_adapter(model, tmp_path, "some/model", beneath=None)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == {
        f"base_model.model.model.layers.{block}.self_attn.k_proj.lora_{part}.weight": shape
        for block in (0, 1)
        for part, shape in (("A", (3, 32)), ("B", (16, 3)))
    }
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config == {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "some/model",
        "r": 3,
        "lora_alpha": 6,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [f"model.layers.{block}.self_attn.k_proj" for block in (0, 1)],
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def stack(base, folder, below, above):
    """Merge an adapter of rank 2 on the layers `below`, put one of rank 3 on the layers `above`."""
    first = load(base)
    inject_random(first, r=2, alpha=8, targets=below, seed=1)
    save_adapter(first, folder / "below", base, beneath=None)
    beneath = read_adapter(str(folder / "below"))
    model = load(base)
    merge_adapter(model, beneath, "below")
    assert close(logits(model), logits(first))
    inject_random(model, r=3, alpha=6, targets=above, seed=2)
    save_adapter(model, folder / "stack", base, beneath)
    return model


STACKS = [
    ("llama", None, None),
    ("llama", ["q_proj", "down_proj"], ["q_proj", "v_proj"]),
    ("llama", ["o_proj"], ["up_proj"]),
    ("gpt2", None, None),
    ("gpt2", ["c_attn", "c_proj"], ["c_fc", "c_proj"]),
]


@pytest.mark.parametrize(("name", "below", "above"), STACKS)
def test_stacked_adapters_are_the_whole_change(checkpoints, tmp_path, name, below, above):
    """The file of a second adapter, put on the original base alone, is the model with both."""
    model = stack(checkpoints(name), tmp_path, below, above)
    config = json.loads((tmp_path / "stack" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (5, 5)
    fresh = load(checkpoints(name))
    merge_adapter(fresh, read_adapter(str(tmp_path / "stack")), "stack")
    assert close(logits(fresh), logits(model))


@pytest.mark.parametrize(("name", "below", "above"), STACKS)
def test_peft_reads_what_was_saved(checkpoints, tmp_path, name, below, above):
    peft = pytest.importorskip("peft")
    model = stack(checkpoints(name), tmp_path, below, above)
    both = peft.PeftModel.from_pretrained(load(checkpoints(name)), tmp_path / "stack")
    assert close(logits(both), logits(model))
    one = peft.PeftModel.from_pretrained(load(checkpoints(name)), tmp_path / "below")
    with adapter_off(model):
        assert close(logits(one), logits(model))


SHAPE = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
PLAIN = SHAPE | {"num_attention_heads": 4}
SHAPE = PLAIN | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 28}
VISION |= {"num_attention_heads": 4, "patch_size": 14, "model_type": "siglip_vision_model"}
MIXTURE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTURE |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}


def image_model():
    tokens = {"image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297}
    text = SHAPE | {"sliding_window": 24}
    return transformers.Gemma3Config(text_config=text, vision_config=VISION, **tokens)


# A family, its configuration, and how many layers are adapted
FAMILIES = {
    "experts that are parameters": (lambda: transformers.MixtralConfig(**SHAPE), 8),
    "shared experts": (lambda: transformers.Glm4MoeConfig(**SHAPE, **MIXTURE), 8),
    "a vision tower": (image_model, 14),
    "changes what a layer returns": (lambda: transformers.FalconConfig(**PLAIN), 8),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_adapted_where_peft_will_read_it(tmp_path, family):
    """Saved and read back, by us and by PEFT where it is installed, the logits are the same."""
    make, layers = FAMILIES[family]
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(make()).save_pretrained(tmp_path)
    load = lambda: transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()  # noqa: E731
    model = load().requires_grad_(False)
    before = logits(model)
    inject_random(model)
    save_adapter(model, tmp_path / "adapter", str(tmp_path), beneath=None)
    assert len(lora_layers(model)) == layers and not close(logits(model), before, 0.1)
    again = load()
    merge_adapter(again, read_adapter(str(tmp_path / "adapter")), "saved")
    assert close(logits(again), logits(model))
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(load(), tmp_path / "adapter")
    assert close(logits(theirs), logits(model))


def test_a_layer_whose_weight_the_model_reads_itself_is_refused_by_name():
    """Mamba calls in_proj and out_proj, and hands the weight of dt_proj to a kernel."""
    config = transformers.MambaConfig(vocab_size=300, hidden_size=32, num_hidden_layers=1)
    models = [transformers.AutoModelForCausalLM.from_config(config).eval() for _ in range(2)]
    assert 0.5 < inject(models[0], 2, 4, ["in_proj", "out_proj"]) < 1
    logits(models[0])
    inject(models[1], 2, 4)
    with pytest.raises(UserError, match=r"reads the weight of backbone.layers.0.mixer.dt_proj"):
        logits(models[1])


def test_an_adapter_of_peft_gives_its_logits_and_gradients():
    """Logits and the gradients of one DPO loss (beta 0.1) that PEFT 0.21.2 made, on real files."""
    folder = shared("fixtures/lora_peft")
    base = shared("fixtures/tiny_llama")
    want = load_file(folder / "expected.safetensors")
    adapter = read_adapter(str(folder))

    def run(model, ids=want["input_ids"]):
        return model(input_ids=ids).logits

    model = load(base)
    with torch.no_grad():
        assert close(run(model), want["logits_base"])
        merge_adapter(model, adapter, "PEFT's")
        assert close(run(model), want["logits_merged"])

    model = load(base)
    inject(model, r=8, alpha=16)
    for name, layer in lora_layers(model).items():
        A, B = adapter[name]
        layer.A.data, layer.B.data = A, B / 2
    assert close(run(model), want["logits_adapter"])

    pair = json.loads((folder / "expected_grads.json").read_text())

    def logp(answer):
        ids = torch.tensor([pair["prompt_ids"] + answer])
        rows = run(model, ids)[0, -len(answer) - 1 : -1].log_softmax(-1)
        return rows.gather(1, ids[0, -len(answer) :, None]).sum()

    sides = pair["chosen_ids"], pair["rejected_ids"]
    with torch.no_grad(), adapter_off(model):
        reference = logp(sides[0]) - logp(sides[1])
    loss = -nn.functional.logsigmoid(pair["beta"] * (logp(sides[0]) - logp(sides[1]) - reference))
    loss.backward()
    assert loss.item() == pytest.approx(pair["loss"], abs=1e-5)
    for key, grad in load_file(folder / "expected_grads.safetensors").items():
        name, part = key.removeprefix("base_model.model.").removesuffix(".weight").split(".lora_")
        mine = getattr(lora_layers(model)[name], part).grad
        assert close(mine, grad, 1e-4 * grad.abs().max().item()), key


def write_adapter(folder, shapes=((4, 32), (32, 4)), layer="model.layers.0.self_attn.q_proj", **c):
    """A small adapter in PEFT's format: all of A is 1, all of B is 2."""
    stem, (A, B) = f"base_model.model.{layer}", map(torch.ones, shapes)
    tensors = {f"{stem}.lora_A.weight": A, f"{stem}.lora_B.weight": 2 * B}
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "bias": "none"} | c
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize(("rslora", "scale"), [(False, 1.5), (True, 3.0)])
def test_the_scale_of_a_file_is_alpha_over_r_or_over_its_root(tmp_path, rslora, scale):
    """alpha 6, r 4: 6 / 4 = 1.5, rank-stabilised 6 / sqrt(4) = 3."""
    ((name, (A, B)),) = read_adapter(write_adapter(tmp_path, use_rslora=rslora)).items()
    assert name == "model.layers.0.self_attn.q_proj"
    assert torch.equal(A, torch.ones(4, 32)) and torch.equal(B, torch.full((32, 4), 2 * scale))


def test_an_adapter_for_another_model_is_refused(checkpoints, tmp_path):
    """c_fc is 32 -> 128, and stored as [32, 128]. More of these are in test_bad_input.py."""
    for name, shapes, layer in (
        ("llama", ((4, 32), (64, 4)), "model.layers.0.mlp"),
        ("llama", ((4, 32), (32, 4)), "model.layers.2.self_attn.q_proj"),  # there are two blocks
        ("gpt2", ((4, 128), (32, 4)), "transformer.h.0.mlp.c_fc"),
    ):
        model = load(checkpoints(name))
        before, adapter = logits(model), read_adapter(write_adapter(tmp_path, shapes, layer))
        with pytest.raises(UserError, match=r"adapter A: it changes .* model does not have"):
            merge_adapter(model, adapter, "A")
        assert torch.equal(logits(model), before)


# ---- The schedule and the loop -------------------------------------------------------------------


def test_a_step_that_memory_has_no_room_for_is_done_again_in_smaller_passes(capsys):
    """Once, from a zero gradient; if it then happens again, the error stands."""
    weight = nn.Parameter(torch.zeros(2))
    lm = SimpleNamespace(micro_tokens=8, halved=False)

    def objective(step, indices):
        for k in indices:
            loss = (weight - POINTS[k]).square().sum()
            yield loss, {"loss": loss.detach(), "tokens": 1}
            if lm.micro_tokens > step:
                raise torch.OutOfMemoryError("no room")

    metrics = sft.gradient(lm, objective, 4, [0, 1], {"weight": weight})
    assert metrics["loss"] == 25
    assert metrics["grad_norm"] == pytest.approx(10)  # of 2 (weight - points): (-6, 8)
    assert "at most 4 tokens a pass" in capsys.readouterr().out
    with pytest.raises(torch.OutOfMemoryError):
        sft.gradient(lm, objective, 3, [0, 1], {"weight": weight})


@pytest.mark.parametrize("total", [1, 7, 10])
@pytest.mark.parametrize("warmup", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_learning_rates_are_those_of_transformers(schedule, warmup, total):
    make = getattr(transformers, f"get_{schedule}_schedule_with_warmup")
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    factor = make(optimizer, math.ceil(warmup * total), total).lr_lambdas[0]
    for step in range(total):
        mine = sft.learning_rate(step, total, 3e-5, schedule, warmup)
        assert mine == pytest.approx(3e-5 * factor(step), rel=1e-12, abs=1e-20)


def settings(out, **changed):
    """The flags that `fit` reads."""
    values = {"lr": 0.1, "batch_size": 2, "epochs": 1, "max_steps": None, "seed": 3}
    values |= {"schedule": "cosine", "warmup": 0.3, "out": str(out)}
    return argparse.Namespace(**(values | {"resume": False, "save_every": None} | changed))


def fit_points(weight, objective, n, args, held_out=None):
    """`fit` of one parameter on n points, which stand on lines 1 to n."""
    where = [f"points:{k + 1}" for k in range(n)]
    lm = SimpleNamespace(model=weight)
    with patch.object(sft, "lora_parameters", lambda model: {"weight": model}):
        return sft.fit(lm, objective, where, args, "points", lambda folder: None, held_out)


POINTS = torch.tensor([[3.0, 0.0], [0.0, -4.0], [1.0, 1.0], [-2.0, 5.0], [0.5, 0.1]])


def toy(weight, points=POINTS):
    """Mean squared distance of `weight` to the points of the step, a pass for each point."""

    def objective(step, indices):
        for k in indices:
            loss = (weight - points[k]).square().sum() / len(indices)
            yield loss, {"loss": loss.detach(), "tokens": 7}

    return objective


def test_fit_is_adamw_with_clipping_and_the_schedule_of_transformers(tmp_path):
    """Nine steps of `fit` against the textbook loop, in which backward sees the whole step."""
    weight = nn.Parameter(torch.zeros(2))
    fit_points(weight, toy(weight), 5, settings(tmp_path, epochs=3))

    twin = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([twin], lr=0.1, weight_decay=0)
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, 3, 9)
    rows = read(tmp_path / "metrics.jsonl")
    assert len(rows) == 9
    for step, row in enumerate(rows):
        points = POINTS[step_indices(5, 2, 3, step)]
        loss = (twin - points).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([twin], 1.0).item()
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert row["lr"] == pytest.approx(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert max(row["grad_norm"] for row in rows) > 2  # clipping had work to do
    assert close(weight.data, twin.data)


def test_the_lines_of_metrics(tmp_path):
    """Field names and their order are a contract; five items in twos are three steps an epoch."""
    weight, held = nn.Parameter(torch.zeros(2)), POINTS[:2]
    held_out = toy(weight, held), len(held)
    args = settings(tmp_path, epochs=2, max_steps=4)
    results = fit_points(weight, toy(weight), 5, args, held_out)
    before, *steps, after = read(tmp_path / "metrics.jsonl")
    for step, row in enumerate(steps):
        rates = ["points_per_second", "tokens_per_second"]
        assert list(row) == ["step", "epoch", "loss", "grad_norm", "lr", "seconds", *rates]
        items = 1 if step == 2 else 2  # the epoch's last batch is smaller
        assert (row["step"], row["epoch"]) == (step, step / 3)
        assert row["points_per_second"] * row["seconds"] == pytest.approx(items)
        assert row["tokens_per_second"] * row["seconds"] == pytest.approx(7 * items)
    assert len(steps) == 4
    assert before == {"step": 0, "epoch": 0, "eval_loss": 12.5}
    last = (weight - held).square().sum(1).mean().item()
    assert after == {"step": 4, "epoch": 4 / 3, "eval_loss": pytest.approx(last)}
    assert [r["eval_loss"] for r in results] == [before["eval_loss"], after["eval_loss"]]
    assert last != 12.5


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run_and_is_not_applied(tmp_path, fault):
    """Either alone is enough: loss + nan has a gradient, sqrt(0 w) = 0 has the slope 0 * inf."""
    weight = nn.Parameter(torch.zeros(2))
    kept = []

    def objective(step, indices):
        kept.append(weight.detach().clone())
        wrong = (0 * weight).sqrt().sum() if fault == "gradient" else math.nan
        for loss, stats in toy(weight)(step, indices):
            loss = loss + wrong if step == 2 else loss
            yield loss, stats | {"loss": loss.detach()}

    places = ", ".join(f"points:{k + 1}" for k in step_indices(5, 2, 3, 2))
    said = rf"step 2: .* not finite; points of it: {places}\."
    with pytest.raises(UserError, match=said):
        fit_points(weight, objective, 5, settings(tmp_path))
    assert torch.equal(weight.data, kept[2])
    assert not torch.equal(kept[2], kept[1])
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [0, 1]


# ---- The objective of supervised fine-tuning -----------------------------------------------------

PROMPTS = [(("user", text),) for text in TEXTS[:2]]
ITEMS = [
    (PROMPTS[0], "A door stop."),
    (PROMPTS[0], "A very small staircase for very small cats"),
    (PROMPTS[0], "A door stop."),  # once more
    (PROMPTS[1], "No."),
    (PROMPTS[0], "A clock"),
    (PROMPTS[1], "Poker would be over, and birthdays quiet."),
]


def train_sft(lm, out, **changed):
    table, items = build_table(lm.encoder, ITEMS, 200)
    objective, where = sft.sft_objective(lm, table, items), ["sft.jsonl:1"] * len(items)
    args = settings(out, **changed)
    sft.fit(lm, objective, where, args, "responses", lambda folder: None)


def loss_and_gradient(lm, indices, micro_tokens):
    """Over one step: the number of passes, the loss, the gradient of every A and B."""
    table, items = build_table(lm.encoder, ITEMS, 200)
    assert items == [0, 1, 0, 2, 3, 4]
    lm.model.zero_grad()
    lm.micro_tokens, losses = micro_tokens, []
    for loss, stats in sft.sft_objective(lm, table, items)(0, indices):
        loss.backward()
        losses.append(loss.item())
        assert stats["loss"].item() == loss.item()
    layers = lora_layers(lm.model).values()
    return len(losses), sum(losses), [p.grad.clone() for m in layers for p in (m.A, m.B)]


# bloom takes plain rows, the others share prompts
@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
@pytest.mark.parametrize(
    ("indices", "micro_tokens", "passes"),
    [([0, 1, 3, 5], 4096, 1), ([4], 4096, 1), ([2, 3, 0, 1], 4096, 1), ([2, 3, 0, 1], 1, 3)],
)
def test_the_loss_is_that_of_transformers_on_response_tokens(
    checkpoints, name, indices, micro_tokens, passes
):
    """Labels are -100 on prompt and padding; a response that comes twice counts twice."""
    lm = load_lm(checkpoints(name), torch.float32)
    assert lm.share == (name != "bloom")
    inject_random(lm.model)
    count, loss, gradient = loss_and_gradient(lm, indices, micro_tokens)
    assert count >= passes

    tokenizer = lm.encoder.tokenizer
    heads = [f"<bos>{ITEMS[k][0][0][1]}\n\n" for k in indices]
    texts = [f"{head}{ITEMS[k][1]}<eos>" for head, k in zip(heads, indices, strict=True)]
    both = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt")
    ids, mask = both["input_ids"], both["attention_mask"]
    labels = ids.masked_fill(mask == 0, -100)
    for row, head in enumerate(heads):
        labels[row, : len(tokenizer(head)["input_ids"])] = -100
    lm.model.zero_grad()
    theirs = lm.model(input_ids=ids, attention_mask=mask, labels=labels).loss
    theirs.backward()
    assert loss == pytest.approx(theirs.item(), abs=1e-5)
    want = [p.grad for m in lora_layers(lm.model).values() for p in (m.A, m.B)]
    assert all(close(a, b) for a, b in zip(gradient, want, strict=True))


@pytest.mark.parametrize("name", [*LINEAR, "bloom"])
def test_recomputed_blocks_change_no_number(checkpoints, name):
    """Linear layers run once more, in backward, but for the last of a block, which none waits for.

    And every B has a gradient.
    """
    lm = load_lm(checkpoints(name), torch.float32)
    inject_random(lm.model)
    everything = list(range(len(ITEMS)))
    passes, loss, gradient = loss_and_gradient(lm, everything, 4096)
    sft.recompute(lm)
    calls = Counter()
    for name, layer in lora_layers(lm.model).items():
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    _, again, grads = loss_and_gradient(lm, everything, 4096)
    times = Counter(calls.values())
    assert times == {2 * passes: len(calls) - 2, passes: 2} and len(calls) >= 8
    assert again == pytest.approx(loss, abs=1e-6)
    assert all(close(a, b, 1e-6) for a, b in zip(grads, gradient, strict=True))
    assert all(grad.any() for grad in grads)


# ---- The command ---------------------------------------------------------------------------------


@pytest.fixture
def command(run_main, tmp_path, checkpoints):
    """command(*flags) is what `python sft.py --data ... --model <tiny llama>` prints."""
    rows = [{"prompt": prompt[0][1], "response": text} for prompt, text in ITEMS]
    small = "--model", checkpoints("llama"), "--lora-r", "4", "--lora-alpha", "8", "--lr", "0.01"
    file = write(tmp_path / "sft.jsonl", rows)
    return lambda *flags: run_main("sft", "--data", file, *small, "--batch-size", "4", *flags)


def test_plain_rows_are_reported(command, tmp_path, monkeypatch):
    """A model that fails the trial of rows with several responses gets plain rows."""
    monkeypatch.setattr(scores, "probe", lambda lm: False)
    printed = command("--out", tmp_path / "run", "--max-steps", 1)
    assert "\nlayout      plain rows, one response each: LlamaForCausalLM cannot share" in printed


def test_the_command_trains_saves_and_merges(command, checkpoints, tmp_path):
    """What --merge wrote is, for transformers alone, the base with the adapter."""
    out = tmp_path / "run"
    printed = command("--out", out, "--epochs", 3, "--merge")
    assert "6 responses, 2 prompts; 0 prompts cut, 0 responses dropped" in printed
    rows = read(out / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(6))
    assert "responses_per_second" in rows[0] and rows[-1]["loss"] < rows[0]["loss"]

    record = json.loads((out / "run.json").read_text())
    assert (record["lora_r"], record["torch"]) == (4, torch.__version__)
    file = (tmp_path / "sft.jsonl").read_bytes()
    assert record["sha256 of data"] == hashlib.sha256(file).hexdigest()

    files = [*out.rglob("*.safetensors"), out / "run.json"]
    assert len(files) >= 4 and len({file.stat().st_mode for file in files}) == 1  # by the umask

    model, adapter = load(checkpoints("llama")), read_adapter(str(out))
    merged = transformers.AutoModelForCausalLM.from_pretrained(out / "merged")
    assert len(adapter) == 14 and not close(logits(merged), logits(model), 1e-3)
    merge_adapter(model, adapter, "saved")
    assert close(logits(merged), logits(model))
    tokenizer = transformers.AutoTokenizer.from_pretrained(out / "merged")
    assert tokenizer(TEXTS[0])["input_ids"] == make_tokenizer()(TEXTS[0])["input_ids"]


def test_too_long_responses_are_counted_or_refused(command, tmp_path):
    """With 24 tokens the short answers fit beside a cut prompt, the two long ones never do."""
    flags = "--out", tmp_path / "run", "--max-steps", 1
    printed = command(*flags, "--max-length", 24)
    assert "2 prompts cut, 2 responses dropped as too long" in printed
    long = write(tmp_path / "long.jsonl", [{"prompt": "A brick?", "response": ITEMS[5][1]}])
    for more, message in (
        (["--too-long", "refuse"], "too long for --max-length 24"),
        (["--data", long], "every response is too long; raise --max-length"),
    ):
        with pytest.raises(UserError, match=message):
            command(*flags, "--max-length", 24, *more, "--overwrite")
    assert len(read(tmp_path / "run" / "metrics.jsonl")) == 1


def test_make_trains_a_small_llama_that_transformers_loads(tmp_path, monkeypatch):
    """Two steps of tiny/make.py: every weight has moved, and the template is the embedded one."""
    data = write(tmp_path / "corpus.jsonl", [{"prompt": p[0][1], "response": y} for p, y in ITEMS])
    for epochs in "0", "2":
        argv = ["make.py", "--data", str(data), "--out", str(tmp_path / epochs), "--epochs", epochs]
        monkeypatch.setattr(sys, "argv", argv)
        runpy.run_path(str(ROOT / "tiny" / "make.py"), run_name="__main__")
    began, saved = (load_file(tmp_path / epochs / "model.safetensors") for epochs in "02")
    for name, weight in saved.items():
        assert weight.dtype == torch.bfloat16
        assert not torch.equal(weight, began[name]), f"{name} was not trained"
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "2")
    assert model.lm_head.weight is model.model.embed_tokens.weight
    template = transformers.AutoTokenizer.from_pretrained(tmp_path / "2").chat_template
    assert template == (ROOT / "tiny" / "chat_template.jinja").read_text()
