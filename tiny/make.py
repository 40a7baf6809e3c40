"""tiny/make.py: the embedded model, a small Llama trained from scratch on tiny/corpus.jsonl.

    python tiny/make.py --out runs/tiny          # about 20 minutes on one core

It learns a byte-level BPE vocabulary of 2,048 tokens from the corpus, then trains every weight with
the model's own cross-entropy over the response tokens, and saves the model in bfloat16.
"""

import argparse
import math
import sys
from pathlib import Path

import tokenizers
import torch
import transformers
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parent.parent))
import data

SPECIAL = ["<|bos|>", "<|eos|>", "<|pad|>", "<|system|>", "<|user|>", "<|assistant|>"]
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{{ eos_token if m['role'] == 'assistant' }}{% endfor %}"
    "{{ '<|assistant|>' if add_generation_prompt }}"
)


def make_tokenizer(texts: list[str]) -> transformers.PreTrainedTokenizerFast:
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=2048, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(texts, trainer)
    bos, eos, pad = SPECIAL[:3]
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=bos,
        eos_token=eos,
        pad_token=pad,
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def make_model(vocabulary: int) -> transformers.LlamaForCausalLM:
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return transformers.LlamaForCausalLM(config)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=str(Path(__file__).parent / "corpus.jsonl"))
    parser.add_argument("--out", required=True)
    parser.add_argument("--epochs", type=int, default=36)
    args = parser.parse_args()

    samples = data.read_samples(args.data)
    tokenizer = make_tokenizer([text for s in samples for text in (s.prompt[-1][1], s.response)])
    pairs = [(s.prompt, s.response) for s in samples]
    table, _ = data.build_table(data.Encoder(tokenizer), pairs, max_length=512)
    torch.manual_seed(42)
    model = make_model(len(tokenizer))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.0)
    n, batch_size = len(table.responses), 64
    total = math.ceil(n / batch_size) * args.epochs
    schedule = transformers.get_cosine_schedule_with_warmup(optimizer, math.ceil(total / 20), total)
    bar = tqdm(range(total), desc="step")
    for step in bar:
        rows = data.step_indices(n, batch_size, 42, step)
        batch = data.make_batch(table, rows, share=False, window=512)
        labels = torch.full_like(batch.ids, -100)  # [B, T], of the response tokens alone
        labels.view(-1)[batch.predict + 1] = batch.targets
        loss = model(input_ids=batch.ids, attention_mask=batch.mask(), labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        bar.set_postfix(loss=loss.item())
    model.eval().to(torch.bfloat16).save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)


if __name__ == "__main__":
    main()
