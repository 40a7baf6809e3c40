"""sft.py: LoRA's laws, PEFT's file format, the schedule, the loop, and the command."""

import sft
from data import UserError, build_table, step_indices
from scores import merge_adapter, read_adapter
from sft import LoRA, adapter_off, inject, lora_layers, save_adapter

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
from conftest import ROOT, TEXTS, load_lm, make_checkpoint, make_tokenizer, read, shared, write
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.pytorch_utils import Conv1D

BOTH = pytest.mark.parametrize("name", ["llama", "gpt2"])  # nn.Linear and Conv1D
torch.set_num_threads(1)  # the models are so small that threads only wait for each other
IDS = torch.arange(40).reshape(2, 20) * 7 % 300


def load(folder):
    return load_lm(str(folder), torch.float32).model


@torch.no_grad()
def logits(model, ids=IDS):
    return model(input_ids=ids).logits


def close(a, b, tolerance=1e-5):
    return torch.allclose(a, b, rtol=0, atol=tolerance)


def randomise(model, seed=1):
    """As after some training: every B is random."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(model).values():
        layer.B.data.normal_(0, 0.1, generator=generator)


def inject_random(model, r=3, alpha=6, targets=None, seed=1):
    inject(model, r, alpha, targets, seed)
    randomise(model, seed)


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
def test_an_adapter_that_is_fresh_or_off_changes_no_bit_and_merged_it_is_itself(
    checkpoints, tmp_path, name
):
    """An exception, too, turns it on again."""
    model, merged = load(checkpoints(name)), load(checkpoints(name))
    base = logits(model)
    inject(model, r=3, alpha=6)
    assert torch.equal(logits(model), base)
    randomise(model)
    adapted = logits(model)
    assert not close(adapted, base, 0.1)
    with pytest.raises(KeyError), adapter_off(model):
        assert torch.equal(logits(model), base)
        raise KeyError
    assert torch.equal(logits(model), adapted)
    save_adapter(model, tmp_path, "base", beneath=None)
    merge_adapter(merged, read_adapter(str(tmp_path)), "saved")
    assert close(logits(merged), adapted)


@pytest.mark.parametrize("kind", [nn.Linear, Conv1D])
def test_the_scale_is_applied_exactly_once(kind):
    """W = [[1 2] [3 4]], A = [[1 0] [0 2]], B = [[1 0] [1 1]], r = 2, alpha = 6: scale 3.

    B A = [[1 0] [1 2]], W + 3 B A = [[4 2] [6 10]]: it takes (1, 0) to (4, 6), (0, 1) to (2, 10).
    """
    W, base = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), kind(2, 2).requires_grad_(False)
    base.weight.copy_(W.T if kind is Conv1D else W)
    base.bias.zero_()
    lora = LoRA(base, 2, 6, torch.Generator())
    lora.A.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    lora.B.data = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert lora(torch.eye(2)).tolist() == [[4, 6], [2, 10]]


LINEAR = {
    "llama": "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj "
    "mlp.gate_proj mlp.up_proj mlp.down_proj",
    "gpt2": "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj",
    "gpt-neox": "attention.query_key_value attention.dense mlp.dense_h_to_4h mlp.dense_4h_to_h",
}
BLOCKS = {"llama": "model.layers", "gpt2": "transformer.h", "gpt-neox": "gpt_neox.layers"}


@pytest.mark.parametrize("name", LINEAR)
def test_all_linear_layers_of_the_blocks_or_those_named_and_not_the_head(checkpoints, name):
    every = [f"{BLOCKS[name]}.{block}.{leaf}" for block in (0, 1) for leaf in LINEAR[name].split()]
    some = [layer.rpartition(".")[2] for layer in (every[0], every[-1])]
    model, other = load(checkpoints(name)), load(checkpoints(name))
    with pytest.raises(UserError, match="lm_head is no linear layer of the blocks; there are "):
        inject(model, 2, 4, [*some, "lm_head"])
    assert not lora_layers(model)
    inject(model, 2, 4, some)
    assert lora_layers(model).keys() == {layer for layer in every if layer.endswith(tuple(some))}
    inject(other, r=2, alpha=4)
    assert lora_layers(other).keys() == set(every)


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
    want = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "some/model"}
    want |= {"r": 3, "lora_alpha": 6, "lora_dropout": 0.0, "bias": "none", "fan_in_fan_out": False}
    want["target_modules"] = [f"model.layers.{block}.self_attn.k_proj" for block in (0, 1)]
    assert config == want | {"inference_mode": True}


PLAIN = {"vocab_size": 300, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
PLAIN |= {"num_attention_heads": 4}
SHAPE = PLAIN | {"num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "image_size": 28}
VISION |= {"num_attention_heads": 4, "patch_size": 14, "model_type": "siglip_vision_model"}
MIXTURE = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXTURE |= {"n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
IMAGE = {"image_token_index": 299, "boi_token_index": 298, "eoi_token_index": 297}
IMAGE |= {"text_config": SHAPE | {"sliding_window": 24}, "vision_config": VISION}
FAMILIES = {
    "Mixtral": SHAPE,  # its experts are parameters
    "Glm4Moe": SHAPE | MIXTURE,  # it has shared experts
    "Gemma3": IMAGE,  # a vision tower
    "Falcon": PLAIN,  # its blocks change what a layer returns
}


@pytest.mark.parametrize(
    ("name", "below", "above", "layers"),
    [
        ("llama", None, None, 14),
        ("llama", ["q_proj", "down_proj"], ["q_proj", "v_proj"], 6),
        ("gpt2", ["c_attn", "c_proj"], ["c_fc", "c_proj"], 8),
        *((family, None, None, 14 if family == "Gemma3" else 8) for family in FAMILIES),
    ],
)
def test_stacked_adapters_are_the_whole_change(checkpoints, tmp_path, name, below, above, layers):
    """One of rank 2, merged, and one of rank 3 above: read back by us and PEFT, alone, as both."""
    base = str(tmp_path / "base") if name in FAMILIES else checkpoints(name)
    if name in FAMILIES:
        config = getattr(transformers, f"{name}Config")(**FAMILIES[name])
        make_checkpoint(tmp_path / "base", config)
    first, model, fresh = load(base), load(base), load(base)
    inject_random(first, r=2, alpha=8, targets=below, seed=1)
    assert not close(logits(first), logits(model), 0.1)
    save_adapter(first, tmp_path / "below", base, beneath=None)
    beneath = read_adapter(str(tmp_path / "below"))
    merge_adapter(model, beneath, "below")
    assert close(logits(model), logits(first))
    inject_random(model, r=3, alpha=6, targets=above, seed=2)
    save_adapter(model, tmp_path / "stack", base, beneath)
    config = json.loads((tmp_path / "stack" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (5, 5, layers)
    assert config["fan_in_fan_out"] == (name == "gpt2")
    merge_adapter(fresh, read_adapter(str(tmp_path / "stack")), "stack")
    assert close(logits(fresh), logits(model))

    peft = pytest.importorskip("peft")
    for folder, ours in (("below", first), ("stack", model)):
        theirs = peft.PeftModel.from_pretrained(load(base), tmp_path / folder)
        assert close(logits(theirs), logits(ours))


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
    folder, base = shared("fixtures/lora_peft"), shared("fixtures/tiny_llama")
    want = load_file(folder / "expected.safetensors")
    adapter, model, merged = read_adapter(str(folder)), load(base), load(base)
    merge_adapter(merged, adapter, "PEFT's")
    inject(model, r=8, alpha=16)
    for name, layer in lora_layers(model).items():
        A, B = adapter[name]
        layer.A.data, layer.B.data = A, B / 2
    assert close(logits(load(base), want["input_ids"]), want["logits_base"])
    assert close(logits(merged, want["input_ids"]), want["logits_merged"])
    assert close(logits(model, want["input_ids"]), want["logits_adapter"])

    pair = json.loads((folder / "expected_grads.json").read_text())

    def log_ratio():
        total = 0
        for sign, answer in ((1, pair["chosen_ids"]), (-1, pair["rejected_ids"])):
            ids = torch.tensor([pair["prompt_ids"] + answer])
            rows = model(input_ids=ids).logits[0, -len(answer) - 1 : -1].log_softmax(-1)
            total += sign * rows.gather(1, ids[0, -len(answer) :, None]).sum()
        return total

    with torch.no_grad(), adapter_off(model):
        reference = log_ratio()
    loss = -nn.functional.logsigmoid(pair["beta"] * (log_ratio() - reference))
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
        ("llama", ((4, 32), (32, 4)), "model.layers.2.self_attn.q_proj"),  # there are two blocks
        ("gpt2", ((4, 128), (32, 4)), "transformer.h.0.mlp.c_fc"),
    ):
        model = load(checkpoints(name))
        before, adapter = logits(model), read_adapter(write_adapter(tmp_path, shapes, layer))
        with pytest.raises(UserError, match=r"adapter A: it changes .* model lacks"):
            merge_adapter(model, adapter, "A")
        assert torch.equal(logits(model), before)


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


def fit_points(weight, objective, out, held_out=None, **changed):
    """`fit` of one parameter on five points, which stand on lines 1 to 5."""
    args = {"lr": 0.1, "batch_size": 2, "epochs": 1, "max_steps": None, "seed": 3, "out": str(out)}
    args |= {"schedule": "cosine", "warmup": 0.3, "resume": False, "save_every": None} | changed
    args, where = argparse.Namespace(**args), [f"points:{k + 1}" for k in range(5)]
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


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_fit_is_adamw_with_clipping_and_the_schedule_of_transformers(tmp_path, schedule):
    """Seven steps of `fit` against the textbook loop, in which backward sees the whole step.

    Five items in twos are three steps an epoch. Field names and their order are a contract.
    """
    weight, held = nn.Parameter(torch.zeros(2)), POINTS[:2]
    held_out = toy(weight, held), len(held)
    more = {"epochs": 3, "max_steps": 7, "schedule": schedule}
    results = fit_points(weight, toy(weight), tmp_path, held_out, **more)
    before, *steps, after = read(tmp_path / "metrics.jsonl")

    twin = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.AdamW([twin], lr=0.1, weight_decay=0)
    schedule = getattr(transformers, f"get_{schedule}_schedule_with_warmup")(optimizer, 3, 7)
    rates = ["points_per_second", "tokens_per_second"]
    for step, row in enumerate(steps):
        points = POINTS[step_indices(5, 2, 3, step)]
        loss = (twin - points).square().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_([twin], 1.0).item()
        assert list(row) == ["step", "epoch", "loss", "grad_norm", "lr", "seconds", *rates]
        assert (row["step"], row["epoch"]) == (step, step / 3)
        assert row["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert row["grad_norm"] == pytest.approx(norm, rel=1e-5)
        assert row["lr"] == pytest.approx(schedule.get_last_lr()[0])
        done = [row[rate] * row["seconds"] for rate in rates]
        assert done == pytest.approx([len(points), 7 * len(points)])
        optimizer.step()
        schedule.step()
    assert len(steps) == 7
    assert max(row["grad_norm"] for row in steps) > 2  # clipping had work to do
    assert close(weight.data, twin.data)
    last = (weight - held).square().sum(1).mean().item()
    assert last != 12.5
    assert before == {"step": 0, "epoch": 0, "eval_loss": 12.5}
    assert after == {"step": 7, "epoch": 7 / 3, "eval_loss": pytest.approx(last)}
    assert results == [before, after]


@pytest.mark.parametrize("fault", ["loss", "gradient"])
def test_a_step_that_is_not_finite_stops_the_run_and_is_not_applied(tmp_path, fault):
    """Either alone is enough: loss + nan has a gradient, sqrt(0 w) = 0 has the slope 0 * inf."""
    weight, states = nn.Parameter(torch.zeros(2)), []

    def objective(step, indices):
        states.append(weight.detach().clone())
        wrong = (0 * weight).sqrt().sum() if fault == "gradient" else math.nan
        for loss, stats in toy(weight)(step, indices):
            loss = loss + wrong if step == 2 else loss
            yield loss, stats | {"loss": loss.detach()}

    places = ", ".join(f"points:{k + 1}" for k in step_indices(5, 2, 3, 2))
    sentence = rf"step 2: .* not finite; points of it: {places}\."
    with pytest.raises(UserError, match=sentence):
        fit_points(weight, objective, tmp_path)
    assert torch.equal(weight.data, states[2])
    assert not torch.equal(states[2], states[1])
    assert [row["step"] for row in read(tmp_path / "metrics.jsonl")] == [0, 1]


PROMPTS = [(("user", text),) for text in TEXTS[:2]]
ITEMS = [
    (PROMPTS[0], "A door stop."),
    (PROMPTS[0], "A very small staircase for very small cats"),
    (PROMPTS[0], "A door stop."),  # once more
    (PROMPTS[1], "No."),
    (PROMPTS[0], "A clock"),
    (PROMPTS[1], "Poker would be over, and birthdays quiet."),
]


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
    trained = {name for name, p in lm.model.named_parameters() if p.requires_grad}
    assert trained == sft.lora_parameters(lm.model).keys()  # and never the base
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
    passes, loss, gradient = loss_and_gradient(lm, range(len(ITEMS)), 4096)
    sft.recompute(lm)
    calls = Counter()
    for name, layer in lora_layers(lm.model).items():
        layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    _, again, grads = loss_and_gradient(lm, range(len(ITEMS)), 4096)
    times = Counter(calls.values())
    assert times == {2 * passes: len(calls) - 2, passes: 2} and len(calls) >= 8
    assert again == pytest.approx(loss, abs=1e-6)
    assert all(close(a, b, 1e-6) for a, b in zip(grads, gradient, strict=True))
    assert all(grad.any() for grad in grads)


@pytest.fixture
def command(run_main, tmp_path, checkpoints):
    """command(*flags) is what `python sft.py --data ... --model <tiny llama>` prints."""
    items = [*ITEMS, (PROMPTS[0], "ab" * 200)]
    rows = [{"prompt": prompt[0][1], "response": text} for prompt, text in items]
    small = "--model", checkpoints("llama"), "--lora-r", "4", "--lora-alpha", "8", "--lr", "0.01"
    file = write(tmp_path / "sft.jsonl", rows)
    return lambda *flags: run_main("sft", "--data", file, *small, "--batch-size", "4", *flags)


def test_the_command_trains_saves_and_merges(command, checkpoints, tmp_path):
    """What --merge wrote is, for transformers alone, the base with the adapter."""
    out = tmp_path / "run"
    printed = command("--out", out, "--epochs", 3, "--merge")
    assert "max length  256 tokens, all that" in printed  # the seventh response is longer
    assert "7 responses, 2 prompts; 1 response dropped" in printed
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


def test_too_long_responses_are_reported(command, tmp_path):
    """Three of the seven answers do not fit into 52 tokens with their prompts."""
    flags = "--out", tmp_path / "run", "--max-steps", 1
    printed = command(*flags, "--max-length", 52)
    assert "read        7 responses, 2 prompts; 3 responses dropped as too long" in printed
    long = write(tmp_path / "long.jsonl", [{"prompt": "A brick?", "response": 2 * ITEMS[5][1]}])
    with pytest.raises(UserError, match="every response, with its prompt, exceeds --max-length"):
        command(*flags, "--max-length", 52, "--data", long, "--overwrite")
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
