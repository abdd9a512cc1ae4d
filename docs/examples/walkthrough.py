# %% [markdown]
# # From documents to a language model, step by step
#
# A notebook as a plain script: editors such as VS Code and PyCharm run each `# %%` cell separately, and
# `python walkthrough.py` runs them all in seconds. Model and data are far too small for good results; the
# example shows how the parts work together, not what a trained model can do.

# %% [markdown]
# ## Documents
#
# The documents come from the language reference that ships with Python, so there is no download. A corpus is
# a JSONL file: one object with the field `text` per document.

# %%
import json
from itertools import islice
from pathlib import Path

from minimind.data.builtin_corpus import builtin_documents

documents = list(islice(builtin_documents(), 40))
folder = Path("walkthrough")
folder.mkdir(exist_ok=True)
corpus = folder / "corpus.jsonl"
corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
print(f"{len(documents)} documents, {sum(map(len, documents)):,} characters; the first begins:")
print(documents[0][:200])

# %% [markdown]
# ## Tokenizer
#
# A model processes token ids. Training a tokenizer finds frequent pieces of text and assigns an id to each.
# This vocabulary has 512 entries; that of the packaged tokenizer has 6400.

# %%
import minimind

tokenizer = minimind.train_tokenizer(documents, vocab_size=512)
tokenizer.save(folder / "tokenizer")
ids = tokenizer.encode("for i in range(10): print(i)")
print([tokenizer.decode([id]) for id in ids])

# %% [markdown]
# ## Token cache and sequences
#
# `prepare_data` tokenizes once, with a start and an end token around each document, and holds out some
# documents for validation. The loader packs documents into sequences of 64 tokens.

# %%
from minimind.data.batch_plan import BatchPlan
from minimind.data.loader import Loader
from minimind.data.prepare import prepare_data

config = minimind.PretrainConfig(data=(str(corpus),), cache_dir=str(folder / "cache"), max_seq_len=64)
data = prepare_data(config, tokenizer)
plan = BatchPlan(micro_batch_size=8, accumulation_steps=1, num_processes=1)
loader = Loader(data.train, seq_len=64, packing=True, plan=plan, seed=0, process_index=0, device="cpu")
batch = loader.step(epoch=0, first_sequence=0).micro_batches[0]
print(f"{data.train.num_tokens:,} tokens make {loader.sequences_per_epoch} sequences per epoch")
print("inputs ", batch.input_ids[0, :8].tolist())
print("targets", batch.shift_labels[0, :8].tolist(), "- each input's next token")

# %% [markdown]
# ## Model
#
# A transformer with two layers. Before training all tokens are about equally likely, so the loss per target
# is near ln(512) = 6.24.

# %%
import math

import torch

torch.manual_seed(0)
model_config = minimind.MiniMindConfig(
    vocab_size=tokenizer.vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
)
model = minimind.MiniMindForCausalLM(model_config)
print(f"{model_config.num_parameters():,} parameters")


def loss_of(batch, num_targets):
    """Return the mean loss over the targets of a batch."""
    return model(
        batch.input_ids,
        shift_labels=batch.shift_labels,
        document_ids=batch.document_ids,
        position_ids=batch.position_ids,
        num_items_in_batch=num_targets,
    ).loss


targets = int((batch.shift_labels >= 0).sum())
print(f"loss {loss_of(batch, targets).item():.2f}, ln(512) = {math.log(512):.2f}")

# %% [markdown]
# ## Training
#
# Forward pass, backward pass, optimizer step. `minimind.training.step` does the same and adds what a long
# run needs.

# %%
optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
losses = []
for step in islice(loader.steps(epoch=0), 60):
    loss = loss_of(step.micro_batches[0], step.num_targets)
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    losses.append(loss.item())
    if len(losses) % 20 == 0:
        print(f"step {len(losses)}: loss {losses[-1]:.2f}")

# %% [markdown]
# ## Generation
#
# The model computes a probability for every token; `generate` samples one, appends it and repeats. After so
# few steps the model has learned token frequencies and little more.

# %%
from minimind.generation.generate import generate

prompt = [tokenizer.bos_token_id, *tokenizer.encode("The")]
(completion,) = generate(model, [prompt], max_new_tokens=60, stop_ids=[tokenizer.eos_token_id])
sample = "The" + tokenizer.decode(completion)
print(sample)

# %% [markdown]
# ## The same in one call
#
# `minimind.pretrain(config)` does all of this and adds validation, checkpoints and a model folder that
# Hugging Face transformers loads; `minimind-train pretrain` is the command for it.
