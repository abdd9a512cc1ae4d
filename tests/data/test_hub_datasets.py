"""Data sets saved on the disk and on the Hub, and conversations."""

from __future__ import annotations

import json
import sys
import types
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from minimind import ConfigError, DataError, PretrainConfig, load_tokenizer
from minimind.data import hub
from minimind.data.chat import ChatRenderer, ChatText
from minimind.data.prepare import PreparedData, prepare_data
from minimind.data.sources import find_sources, read_sources
from minimind.tokenizer import Tokenizer

TEXTS = [f"document {number} of a small corpus" for number in range(40)]


def prepare(tmp_path: Path, *data: str, **options: Any) -> PreparedData:
    options = {"val_fraction": 0.0, "max_seq_len": 8, "cache_dir": str(tmp_path / "cache"), **options}
    return prepare_data(PretrainConfig(data=data, **options), load_tokenizer())


def documents(data: PreparedData) -> list[str]:
    """The documents as text, special tokens included."""
    tokenizer, shards = load_tokenizer(), data.train
    ids = shards.tokens(0, shards.num_tokens).tolist()
    text = tokenizer.decode(ids, skip_special_tokens=False)
    return text.removeprefix("<|im_start|>").removesuffix("<|im_end|>").split("<|im_end|><|im_start|>")


def save_dataset(folder: Path, texts: list[str], shards: int = 2) -> None:
    """Write what `datasets.Dataset.save_to_disk` writes."""
    folder.mkdir(parents=True)
    files = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    for number, name in enumerate(files):
        part = texts[number * len(texts) // shards : (number + 1) * len(texts) // shards]
        table = pyarrow.table({"id": range(len(part)), "text": part})
        with pyarrow.OSFile(str(folder / name), "wb") as sink:
            with pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=7)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in files]}))
    # In one line, so that it looks like a file of documents with the field.
    (folder / "dataset_info.json").write_text(json.dumps({"features": {"text": "string"}}))


def test_a_saved_data_set_is_read_without_what_lies_beside_it(tmp_path: Path) -> None:
    save_dataset(tmp_path / "saved", TEXTS)
    (tmp_path / "saved" / "cache-1234.arrow").write_bytes(b"a result of map()")
    data = prepare(tmp_path, str(tmp_path / "saved"))
    assert documents(data) == TEXTS
    assert data.report.skipped_files == {"other file of a saved data set": 1}
    with pytest.raises(DataError, match=r"has no column 'body'; set --text-key to one of id, text"):
        prepare(tmp_path, str(tmp_path / "saved"), text_key="body")
    (tmp_path / "saved" / "data-00001-of-00002.arrow").write_bytes(b"x" * 100)
    with pytest.raises(DataError, match=r"data-00001-of-00002.arrow is not a valid Arrow file"):
        prepare(tmp_path, str(tmp_path / "saved"))
    (tmp_path / "saved" / "data-00001-of-00002.arrow").unlink()
    with pytest.raises(DataError, match=r"data-00001-of-00002.arrow is missing; save or copy"):
        prepare(tmp_path, str(tmp_path / "saved"))


def test_the_training_split_of_several_is_read(tmp_path: Path) -> None:
    for split in ("train", "test"):
        save_dataset(tmp_path / "saved" / split, [f"{split} {text}" for text in TEXTS])
    (tmp_path / "saved" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    skipped: Counter[str] = Counter()
    files = find_sources([str(tmp_path / "saved")], "--data", skipped)
    assert {path.parent.name for path in files if isinstance(path, Path)} == {"train"}
    assert list(skipped) == [f"split of a saved data set: {tmp_path / 'saved' / 'test'}"]
    (tmp_path / "saved" / "train").rename(tmp_path / "saved" / "dev")
    with pytest.raises(DataError, match="has the splits dev, test; name one of their folders"):
        find_sources([str(tmp_path / "saved")], "--data")


def test_an_arrow_file_with_random_access_is_read(tmp_path: Path) -> None:
    table = pyarrow.table({"text": TEXTS})
    with pyarrow.OSFile(str(tmp_path / "a.arrow"), "wb") as sink:
        with pyarrow.ipc.new_file(sink, table.schema) as writer:
            writer.write_table(table)
    assert documents(prepare(tmp_path, str(tmp_path / "a.arrow"))) == TEXTS


class Rows:
    """Stands in for `datasets.IterableDataset`."""

    num_shards, column_names = 4, ["text", "id"]

    def __init__(self, package: Package, shard: int | None = None) -> None:
        self.package, self.number = package, shard

    def shard(self, num_shards: int, index: int) -> Rows:
        assert num_shards == self.num_shards
        return Rows(self.package, index)

    def select_columns(self, names: list[str]) -> Rows:
        return self

    def __iter__(self) -> Iterator[dict[str, Any]]:
        assert self.number is not None
        self.package.read.append(self.number)
        for number, text in enumerate(TEXTS[self.number * 10 : self.number * 10 + 10]):
            if self.number == self.package.failing and number == 5:
                raise OSError("the connection was lost")
            yield {"text": text, "id": number}


class Package(types.ModuleType):
    """Stands in for the package datasets; `commit` is None without a network."""

    commit: str | None = "1234567890"
    failing = -1

    def __init__(self) -> None:
        super().__init__("datasets")
        self.read: list[int] = []
        self.asked: list[Any] = []

    def load_dataset(self, name: str, config: str | None, **options: Any) -> Rows:
        if options["split"] == "dev":
            raise ValueError("Bad split: dev. Available splits: ['train']")
        self.asked.append((name, config, options["split"], options["revision"]))
        assert options["streaming"]
        return Rows(self)


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch) -> Package:
    package = Package()

    class HfApi:
        def dataset_info(self, name: str, revision: str | None) -> Any:
            if package.commit is None:
                raise OSError("no network")
            return types.SimpleNamespace(sha=package.commit)

    monkeypatch.setitem(sys.modules, "datasets", package)
    monkeypatch.setattr("huggingface_hub.HfApi", HfApi)
    return package


def test_a_data_set_of_the_hub_is_tokenized_once_and_named_by_its_commit(
    tmp_path: Path, package: Package
) -> None:
    data = prepare(tmp_path, "hf://owner/name")
    assert documents(data) == TEXTS
    assert set(package.asked) == {("owner/name", None, "train", "1234567890")}
    assert data.report.sources[0].name == "hf://owner/name@12345678:train 1/4"
    # Downloaded shards are removed when they are tokenized.
    assert [path.suffix for path in (tmp_path / "cache").glob("hub-*")] == [".json"]
    again = prepare(tmp_path, "hf://owner/name")
    assert (again.built, again.fingerprint, package.read) == (False, data.fingerprint, [0, 1, 2, 3])
    # Without a network the last commit counts; another one is other data.
    package.commit = None
    with pytest.warns(UserWarning, match="cannot be reached, so the commit 12345678 of the last use counts"):
        assert not prepare(tmp_path, "hf://owner/name").built
    package.commit = "another"
    assert prepare(tmp_path, "hf://owner/name").built


def test_an_interrupted_download_continues_with_the_missing_shards(tmp_path: Path, package: Package) -> None:
    package.failing = 2
    with pytest.raises(DataError, match=r"hf://owner/name@12345678:train 3/4 could not be read \(the conn"):
        prepare(tmp_path, "hf://owner/name")
    package.failing = -1
    assert documents(prepare(tmp_path, "hf://owner/name")) == TEXTS
    assert package.read == [0, 1, 2, 2, 3]


def test_names_weights_and_splits_of_the_hub(tmp_path: Path, package: Package) -> None:
    def shards(*values: str) -> list[Any]:
        return read_sources(values, cache_dir=tmp_path)

    (plain,) = shards("hf://owner/name@v1.0/sub-set:validation")
    assert (plain.weight, len(plain.files)) == (None, 4)
    assert package.asked == [("owner/name", "sub-set", "validation", "1234567890")]
    first, second = shards("hf://owner/name:0.5", "hf://owner/name:test:1.5")
    assert (first.weight, second.weight) == (0.25, 0.75)
    assert [asked[2] for asked in package.asked[1:]] == ["train", "test"]
    with pytest.raises(DataError, match="is not the name of a data set; write hf://owner/name,"):
        shards("hf://name")
    with pytest.raises(DataError, match=r"hf://owner/name:dev cannot be used: Bad split: dev. Available"):
        shards("hf://owner/name:dev")
    package.commit = None
    with pytest.raises(DataError, match=r"hf://owner/new cannot be found \(no network\); check the name"):
        shards("hf://owner/new")
    with pytest.raises(DataError, match="cannot be read by this command"):
        read_sources(["hf://owner/name"])


def test_a_missing_column_and_a_missing_package_are_named(
    tmp_path: Path, package: Package, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match=r"has no column 'body'; set --text-key to one of text, id"):
        prepare(tmp_path, "hf://owner/name", text_key="body")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="needs the package datasets, which is not installed; pip"):
        prepare(tmp_path, "hf://owner/name")


def test_the_package_itself_streams_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    from pyarrow import parquet

    (tmp_path / "repository").mkdir()
    for number in range(2):
        table = pyarrow.table({"text": TEXTS[number * 20 : number * 20 + 20], "id": range(20)})
        parquet.write_table(table, tmp_path / "repository" / f"train-{number}.parquet")
    load = datasets.load_dataset
    monkeypatch.setattr(
        datasets,
        "load_dataset",
        lambda name, config, revision, **options: load(str(tmp_path / "repository"), config, **options),
    )
    monkeypatch.setattr(
        "huggingface_hub.HfApi.dataset_info", lambda *_, **__: types.SimpleNamespace(sha="abcdef0123")
    )
    assert documents(prepare(tmp_path, "hf://owner/name")) == TEXTS


MESSAGES = [
    {"role": "user", "content": "What ends a turn?"},
    {"role": "assistant", "content": "<|im_end|> does."},
]


def test_special_tokens_of_the_template_are_ids_and_those_of_a_message_are_text() -> None:
    tokenizer = load_tokenizer()
    tokenizer.chat_template = None
    renderer = ChatRenderer(tokenizer)
    assert renderer.description == "ChatML"
    text = renderer.render(MESSAGES)
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    # Every document begins with the start and ends with the end token anyway.
    assert text.parts == ("user\nWhat ends a turn?", end, "\n", start, "assistant\n<|im_end|> does.")
    assert text == "user\nWhat ends a turn?<|im_end|>\n<|im_start|>assistant\n<|im_end|> does."
    sharegpt = [{"from": "human", "value": "What ends a turn?"}, {"from": "gpt", "value": "<|im_end|> does."}]
    assert renderer.render(sharegpt).parts == text.parts
    for wrong in ("text", [], [3], [{"role": "user", "content": 3}], [{"content": "x"}]):
        with pytest.raises(ValueError, match="message"):
            renderer.render(wrong)


def test_the_template_of_the_tokenizer_is_used() -> None:
    backend = Backend(models.WordLevel({"<s>": 0, "</s>": 1, "[unk]": 2, "hello": 3}, unk_token="[unk]"))
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no tools') }}"
        "{% endif %}{{ m.content | tojson }}{% endfor %}{{ eos_token }}\n"
    )
    tokenizer = Tokenizer(backend, eos_token="</s>", bos_token="<s>", chat_template=template)
    renderer = ChatRenderer(tokenizer)
    assert renderer.render([{"role": "user", "content": "hello"}]).parts == ('"hello"',)
    with pytest.raises(ValueError, match=r"the chat template refuses the messages \(no tools\)"):
        renderer.render([{"role": "tool", "content": "x"}])
    tokenizer.chat_template = "{% for %}"
    with pytest.raises(ConfigError, match="is no valid Jinja template"):
        ChatRenderer(tokenizer)
    tokenizer.chat_template = None
    with pytest.raises(ConfigError, match="the tokenizer has no chat template; add one"):
        ChatRenderer(tokenizer)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_conversations_are_documents_and_the_report_says_so(tmp_path: Path, suffix: str) -> None:
    rows = [{"messages": MESSAGES} for _ in range(9)]
    path = tmp_path / f"chat{suffix}"
    if suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(DataError, match=r"no 'text' field \(--text-key names the field; --text-key mess"):
            prepare(tmp_path, str(path))
    else:
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    tokenizer = load_tokenizer()
    renderer = ChatRenderer(tokenizer)
    expected = [tokenizer.bos_token_id]
    for part in renderer.render(MESSAGES).parts:
        expected += tokenizer.encode(part) if isinstance(part, str) else [part]
    expected.append(tokenizer.eos_token_id)
    data = prepare(tmp_path, str(path), text_key="messages")
    assert data.train.tokens(0, data.train.num_tokens).tolist() == 9 * expected
    assert f"9 conversations were rendered by {renderer.description}." in data.report.notes
    # Another template is other data.
    assert not prepare(tmp_path, str(path), text_key="messages").built
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    config = PretrainConfig(
        data=(str(path),),
        text_key="messages",
        cache_dir=str(tmp_path / "cache"),
        val_fraction=0.0,
        max_seq_len=8,
    )
    other = prepare_data(config, tokenizer)
    assert other.built
    assert other.fingerprint != data.fingerprint


def test_a_conversation_is_text() -> None:
    text = ChatText.of(["a", 7, "b"], {7: "<x>"})
    assert (text, text.parts) == ("a<x>b", ("a", 7, "b"))
    assert hub.is_hub("hf://a/b")
    assert not hub.is_hub("hf:/a/b")
