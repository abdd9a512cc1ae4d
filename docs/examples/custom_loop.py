"""A custom training loop with minimind's data, model and checkpoints.

    python custom_loop.py corpus.jsonl my-checkpoints

Run the same command again to resume from the last checkpoint; the steps equal those of an uninterrupted run.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from accelerate import Accelerator

import minimind
from minimind.checkpoint.state_dict import gather_state_dict, load_state_dict
from minimind.checkpoint.store import CheckpointStore
from minimind.data.batch_plan import BatchPlan
from minimind.data.loader import Loader
from minimind.data.prepare import prepare_data

SEQ_LEN = 64  # tokens


def train(corpus: str, folder: Path, steps: int = 200, save_every: int = 50) -> torch.nn.Module:
    """Train until `steps` steps are done, resuming from the last checkpoint in `folder` if there is one."""
    # Tokenize the corpus into the token cache; the next call reuses it.
    tokenizer = minimind.load_tokenizer()
    data = prepare_data(minimind.PretrainConfig(data=(corpus,), max_seq_len=SEQ_LEN), tokenizer)

    # A global batch of 2 x 8 sequences on one process. Accelerate only chooses the device.
    accelerator = Accelerator()
    plan = BatchPlan(micro_batch_size=8, accumulation_steps=2, num_processes=1)
    loader = Loader(
        data.train,
        seq_len=SEQ_LEN,
        packing=True,
        plan=plan,
        seed=42,
        process_index=0,
        device=accelerator.device,
    )

    torch.manual_seed(42)
    model_config = minimind.MiniMindConfig(
        vocab_size=tokenizer.vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=4
    )
    model = minimind.MiniMindForCausalLM(model_config).to(accelerator.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)

    # Three numbers define the position of a run: the order of the sequences is a function of the seed.
    place = {"step": 0, "epoch": 0, "sequence": 0}
    store = CheckpointStore(folder, keep=2, on_error=print)
    checkpoint = store.latest(on_damaged=print)
    if checkpoint is not None:
        place = load_state_dict(accelerator, model, optimizer, checkpoint)["place"]

    while place["step"] < steps:
        for batch in loader.steps(place["epoch"], place["sequence"]):
            loss = torch.zeros((), device=accelerator.device)
            for micro_batch in batch.micro_batches:
                # Divide by the number of targets in the global batch: every token gets the same weight.
                output = model(
                    micro_batch.input_ids,
                    shift_labels=micro_batch.shift_labels,
                    document_ids=micro_batch.document_ids,
                    position_ids=micro_batch.position_ids,
                    num_items_in_batch=batch.num_targets,
                )
                output.loss.backward()
                loss += output.loss.detach()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

            place["step"] += 1
            place["sequence"] += batch.num_sequences
            if place["sequence"] == loader.sequences_per_epoch:
                place["epoch"], place["sequence"] = place["epoch"] + 1, 0
            if place["step"] % 10 == 0:
                print(f"step {place['step']}: loss {loss.item():.4f}")
            done = place["step"] == steps
            if done or place["step"] % save_every == 0:
                extra = {"step": place["step"], "place": place}
                store.wait_until_written()  # wait for the last save: its memory is used again
                store.save(
                    gather_state_dict(accelerator, model, optimizer, extra)
                )  # written in the background
            if done:
                break
    store.wait()  # raises if the last save failed
    return model


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python custom_loop.py CORPUS.jsonl CHECKPOINTS")
    train(sys.argv[1], Path(sys.argv[2]))
