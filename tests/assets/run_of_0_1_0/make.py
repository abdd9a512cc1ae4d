"""Made this folder with minimind 0.1.0; kept to show how, not run again.

python make.py 13 wrote `run`; without a step, in another folder, metrics.jsonl became `uninterrupted.jsonl`.
"""

import sys

import minimind

config = minimind.PretrainConfig(
    data=("corpus.jsonl",),
    val_fraction=0.1,
    tokenizer="tok",
    cache_dir="cache",
    max_seq_len=32,
    hidden_size=16,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    batch_size=4,
    epochs=4,
    max_steps=24,
    warmup_steps=2,
    lr_schedule="wsd",
    decay_steps=6,
    dropout=0.1,
    log_interval=1,
    eval_interval=4,
    save_interval=5,
    keep_checkpoints=1,
    mixed_precision="no",
    compile=False,
    output_dir="run",
    tracker=("tensorboard",),
)
minimind.pretrain(config, stop_after=int(sys.argv[1]) if len(sys.argv) > 1 else None)
