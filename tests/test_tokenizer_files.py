"""Saved tokenizers in other programs: the start token of training, and chat as in upstream minimind."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import processors

from minimind.config.options import PretrainConfig
from minimind.data.prepare import prepare_data
from minimind.tokenizer import Tokenizer, load_tokenizer
from minimind.tokenizer.files import chatml_template, with_start_token, without_start_token

transformers = pytest.importorskip("transformers")

SHIPPED = load_tokenizer(None)
WEATHER = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"city": {}}}},
}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Köln"}}}
CONVERSATIONS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "你好"}],
    [
        {"role": "user", "content": "1+1?"},
        {"role": "assistant", "content": "\n2"},
        {"role": "user", "content": "Why?"},
        {"role": "assistant", "content": "Counting.", "reasoning_content": "\nThink.\n"},
    ],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"}],
    [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": "Look:", "tool_calls": [CALL, CALL["function"]]},
        {"role": "tool", "content": "sun"},
        {"role": "tool", "content": "rain"},
        {"role": "assistant", "content": "", "tool_calls": [{"name": "weather", "arguments": '{"city": 1}'}]},
        {"role": "tool", "content": "fog"},
        {"role": "assistant", "content": "Fog."},
        {"role": "system", "content": "Stop."},
    ],
]


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    SHIPPED.save(folder, model_max_length=2048)
    return transformers.AutoTokenizer.from_pretrained(folder)


def backend_with(processor) -> tokenizers.Tokenizer:
    backend = tokenizers.Tokenizer.from_str(json.dumps(SHIPPED.rules()))
    backend.post_processor = processor
    return backend


# The start token


def test_transformers_gives_the_ids_of_training_documents(theirs, tmp_path):
    texts = ["hello world", "二〇二四 it's\n\n  x", "def f(): pass"]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = PretrainConfig(
        data=(str(tmp_path / "a.jsonl"),), val_fraction=0.0, max_seq_len=8, cache_dir=str(tmp_path / "c")
    )
    shards = prepare_data(config, SHIPPED).train
    trained = [
        shards.tokens(int(start), int(stop)).tolist()
        for start, stop in zip(shards.offsets[:-1], shards.offsets[1:], strict=True)
    ]
    assert [[*ids, theirs.eos_token_id] for ids in theirs(texts).input_ids] == trained
    assert (theirs.model_max_length, theirs.padding_side) == (2048, "right")
    assert theirs(texts[0], add_special_tokens=False).input_ids == SHIPPED.encode(texts[0])


def test_the_fast_library_alone_adds_it_too(tmp_path):
    SHIPPED.save(tmp_path)
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert fast.encode("hi").ids == [SHIPPED.bos_token_id, *SHIPPED.encode("hi")]
    assert fast.encode("hi", "ho").ids.count(SHIPPED.bos_token_id) == 1


@pytest.mark.parametrize(
    "processor",
    [None, processors.ByteLevel(trim_offsets=False), processors.Sequence([processors.ByteLevel()])],
)
def test_our_own_readers_never_see_it_and_the_fingerprint_stays(processor, tmp_path):
    """Earlier runs and token caches have the fingerprint of the rules without it."""
    backend = tokenizers.Tokenizer.from_str(json.dumps(SHIPPED.rules()))
    if processor is not None:
        backend.post_processor = processor
    before = Tokenizer(backend, bos_token="<|im_start|>", eos_token="<|im_end|>", pad_token="<|endoftext|>")
    before.save(tmp_path)
    after = load_tokenizer(tmp_path)
    assert after.fingerprint == before.fingerprint
    assert after.encode("hi") == before.encode("hi")
    after.save(tmp_path)  # once more adds nothing more
    fast = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    assert fast.encode("hi").ids == [1, *before.encode("hi")]


def test_a_tokenizer_that_adds_it_already_stays_as_it_is(tmp_path):
    processor = processors.TemplateProcessing(
        single="<|im_start|> $A",
        pair="<|im_start|> $A <|im_start|>:1 $B:1",
        special_tokens=[("<|im_start|>", 1)],
    )
    ours = Tokenizer(backend_with(processor), bos_token="<|im_start|>", eos_token="<|im_end|>")
    ours.save(tmp_path)
    written = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    assert written["post_processor"] == ours.rules()["post_processor"]
    assert load_tokenizer(tmp_path).rules()["post_processor"] == ours.rules()["post_processor"]


def test_without_a_start_token_none_is_added(tmp_path):
    Tokenizer(tokenizers.Tokenizer.from_str(json.dumps(SHIPPED.rules())), eos_token="<|im_end|>").save(
        tmp_path
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("hi").input_ids == SHIPPED.encode("hi")


def test_adding_and_removing_are_inverse():
    for processor in (
        None,
        {"type": "ByteLevel"},
        {"type": "Sequence", "processors": [{"type": "ByteLevel"}]},
    ):
        rules = {"post_processor": processor, "model": {}}
        assert without_start_token(with_start_token(rules, "<s>", 3)) == rules


# Chat


def upstream(shared: Path, theirs):
    """The template of upstream minimind, on our tokenizer."""
    config = json.loads((shared / "compat" / "minimind3_tokenizer_config.json").read_text("utf-8"))
    return lambda messages, **options: theirs.apply_chat_template(
        messages, chat_template=config["chat_template"], tokenize=False, **options
    )


@pytest.mark.parametrize("messages", CONVERSATIONS)
def test_chats_read_as_upstream_writes_them(messages, shared, theirs):
    expected = upstream(shared, theirs)
    for options in (
        {},
        {"add_generation_prompt": True},
        {"add_generation_prompt": True, "open_thinking": True},
    ):
        assert theirs.apply_chat_template(messages, tokenize=False, **options) == expected(
            messages, **options
        )


@pytest.mark.parametrize("messages", CONVERSATIONS[:2])
def test_tools_are_described_in_the_system_turn(messages, theirs):
    text = theirs.apply_chat_template(messages, tools=[WEATHER], tokenize=False)
    system, rest = text.split("<|im_end|>\n", 1)
    assert system.startswith(
        "<|im_start|>system\n" + ("Be brief.\n\n# Tools" if len(messages) > 1 else "# Tools")
    )
    described = system.split("<tools>\n")[1].split("\n</tools>")[0]
    assert json.loads(described) == WEATHER
    assert rest == f"<|im_start|>user\n{messages[-1]['content']}<|im_end|>\n"


def test_content_in_parts_is_joined(theirs):
    parts = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    text = theirs.apply_chat_template([{"role": "user", "content": parts}], tokenize=False)
    assert text == "<|im_start|>user\nab<|im_end|>\n"


@pytest.mark.parametrize("thinks", [False, True])
def test_the_answer_follows_the_generation_prompt_and_alone_is_marked_as_generated(thinks, theirs):
    answer = {"role": "assistant", "content": "Two."} | ({"reasoning_content": "1 and 1"} if thinks else {})
    messages = [{"role": "user", "content": "1+1?"}, answer]
    prompt = theirs.apply_chat_template(
        messages[:1], tokenize=False, add_generation_prompt=True, open_thinking=thinks
    )
    assert theirs.apply_chat_template(messages, tokenize=False).startswith(prompt)
    found = theirs.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
    ids, mask = np.array(found["input_ids"]), np.array(found["assistant_masks"], bool)
    expected = "1 and 1\n</think>\n\nTwo.<|im_end|>" if thinks else "Two.<|im_end|>"
    assert theirs.decode(ids[mask]) == expected
    assert (ids == theirs.bos_token_id).sum() == 2  # one a turn, none before


def test_only_chatml_tokenizers_without_a_template_get_ours(tmp_path):
    def loaded(**config: str) -> Tokenizer:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return load_tokenizer(tmp_path)

    (tmp_path / "tokenizer.json").write_text(json.dumps(SHIPPED.rules()))
    assert loaded().chat_template == chatml_template() == SHIPPED.chat_template
    assert loaded(chat_template="{{ messages }}").chat_template == "{{ messages }}"
    assert loaded(eos_token="<|endoftext|>").chat_template is None
