"""One call from a configuration to a trained model."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from .batch_plan import BatchPlan, count_steps, plan_batches
from .checkpoint import CheckpointStore
from .config import PretrainConfig
from .data.loader import Loader, MicroBatch, evaluation_batches
from .data.prepare import PreparedData, prepare_data
from .environment import describe_environment
from .errors import ConfigError
from .formats.qwen3 import load_config, load_model, save_weights
from .generation import generate
from .launch import close_accelerator, is_main_process, start_accelerator, wants_compile
from .model_config import MiniMindConfig
from .modeling.transformer import MiniMindForCausalLM
from .optim import build_optimizer
from .progress import Progress
from .run_folder import RunFolder
from .schedule import learning_rates
from .throughput import Meter, device_peak_flops
from .tokenizer import Tokenizer, check_vocab, load_tokenizer
from .train import Run, TrainState, train, validate
from .trackers import Trackers, check_trackers
