# %% [markdown]
# # From text to a model that writes, step by step
#
# A notebook as a plain script: editors such as VS Code and PyCharm run each `# %%` part by itself, and
# `python walkthrough.py` runs them all, in seconds. Everything is far too small to be good; it shows how
# the parts fit together, not what a trained model can do.

# %% [markdown]
# ## Text
#
# The text is the language reference that Python carries: no download. A corpus is a JSONL file: one object
# with the field `text` for each document.

# %%
import json
from itertools import islice
from pathlib import Path

from minimind.data.builtin_corpus import embedded_documents

documents = list(islice(embedded_documents(), 40))
folder = Path("walkthrough")
folder.mkdir(exist_ok=True)
corpus = folder / "corpus.jsonl"
corpus.write_text("".join(json.dumps({"text": text}) + "\n" for text in documents), encoding="utf-8")
print(f"{len(documents)} documents, {sum(map(len, documents)):,} characters; the first begins:")
print(documents[0][:200])

# %% [markdown]
# ## Tokenizer
#
# A model sees numbers. The tokenizer learns which pieces of text are frequent, and gives each a number. This
# one has 512 entries; the one in the package has 6400.

# %%
import minimind

tokenizer = minimind.train_tokenizer(documents, vocab_size=512)
tokenizer.save(folder / "tokenizer")
ids = tokenizer.encode("for i in range(10): print(i)")
print([tokenizer.decode([id]) for id in ids])

# %% [markdown]
# ## Token ids on the disk, and rows
#
# `prepare_data` tokenizes once, with a start and an end token around each document, and holds out some
# documents for validation. The loader lays documents end to end in rows of 64 tokens.

# %%
from minimind.data.batch_plan import BatchPlan
from minimind.data.loader import Loader
from minimind.data.prepare import prepare_data

config = minimind.PretrainConfig(data=(str(corpus),), cache_dir=str(folder / "cache"), max_seq_len=64)
data = prepare_data(config, tokenizer)
plan = BatchPlan(micro_batch_size=8, accumulation_steps=1, num_processes=1)
loader = Loader(data.train, seq_len=64, packing=True, plan=plan, seed=0, process_index=0, device="cpu")
batch = loader.step(epoch=0, row=0).micro_batches[0]
print(f"{data.train.num_tokens:,} tokens make {loader.sequences_per_epoch} rows a pass")
print("inputs ", batch.input_ids[0, :8].tolist())
print("targets", batch.shift_labels[0, :8].tolist(), "- each input's next token")

# %% [markdown]
# ## Model
#
# A transformer of two blocks. Before training every token is about equally likely, so the loss on each target
# is near ln(512) = 6.24.

# %%
import math

import torch

torch.manual_seed(0)
shape = minimind.MiniMindConfig(
    vocab_size=tokenizer.vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
)
model = minimind.MiniMindForCausalLM(shape)
print(f"{shape.num_parameters():,} parameters")


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
# Forward, backward, step. `minimind.training.step` does the same, with everything a long run needs.

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
# ## Writing
#
# The model gives a probability to every token; `generate` draws one, appends it, and goes on. After these few
# steps it has learned which pieces are frequent and little more.

# %%
from minimind.generation.generate import generate

prompt = [tokenizer.bos_token_id, *tokenizer.encode("The")]
(written,) = generate(model, [prompt], max_new_tokens=60, stop_ids=[tokenizer.eos_token_id])
sample = "The" + tokenizer.decode(written)
print(sample)

# %% [markdown]
# ## The same in one call
#
# `minimind.pretrain(config)` does all of this, with validation, checkpoints and a model folder that Hugging
# Face transformers reads; `minimind-train pretrain` does it on the command line.
