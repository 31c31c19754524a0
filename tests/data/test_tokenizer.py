"""Loaded tokenizers have the ids of tokenizer.json, add special tokens once, and preserve text.

Expected ids come from tokenizers.Tokenizer.from_file, transformers and SentencePiece.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import AutoTokenizer

from distill.config import ContextDistillationConfig
from distill.data.rendering import chat_ids, token_ids
from distill.data.teacher_prefix import ContextPrefixes, Prefix
from distill.data.tokenizer import tokenizer_class_misreads
from distill.data.tokenizer_checks import OTHER_TEXTS, PLAIN_TEXTS
from distill.errors import UserError
from distill.types import Problem, Prompt
from tests.data.byte_level import BOS, CORPUS, EOS, KEY, USER, byte_level, load, write_settings
from tests.tiny_tokenizer import CHATML


def written(folder: Path) -> Tokenizer:
    """Return the tokenizer of tokenizer.json alone."""
    found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.no_padding()
    found.no_truncation()
    return found


def texts(folder: Path) -> list[str]:
    """Return the fixed texts, and each added token between words."""
    tokens = [token.content for token in written(folder).get_added_tokens_decoder().values()]
    return [*PLAIN_TEXTS, *OTHER_TEXTS, *(f"one {token} two{token}\n three" for token in tokens)]


def assert_reads_as_written(folder: Path) -> Any:
    """Check that ids and decoded text are those of tokenizer.json alone; return the loaded tokenizer."""
    tokenizer, author = load(folder), written(folder)
    expected = [encoding.ids for encoding in author.encode_batch(texts(folder), add_special_tokens=False)]
    assert token_ids(tokenizer, texts(folder)) == expected
    for text in (*PLAIN_TEXTS, *OTHER_TEXTS):
        assert tokenizer.decode(token_ids(tokenizer, [text])[0]) == text
    return tokenizer


# ---- tokenizer.json decides ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_a_llama_class_does_not_change_a_byte_level_tokenizer_json(
    tmp_path: Path, model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = byte_level(tmp_path, {"tokenizer_class": "LlamaTokenizerFast"}, model_type)
    by_transformers = AutoTokenizer.from_pretrained(folder)
    ids = token_ids(by_transformers, ["What is 1+2, please? 123"])
    assert ids != [written(folder).encode("What is 1+2, please? 123", add_special_tokens=False).ids], (
        "transformers reads it correctly"
    )
    tokenizer = assert_reads_as_written(folder)
    assert tokenizer.decode(token_ids(tokenizer, ["What is 1+2, please?"])[0]) == "What is 1+2, please?"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"{KEY}={folder}: ") and "tokenizer_class=LlamaTokenizerFast" in warning
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
    assert tokenizer.get_vocab() == written(folder).get_vocab(), "a default token of the class was added"
    assert tokenizer_class_misreads(folder)


def test_a_class_with_the_ids_of_tokenizer_json_gives_no_warning(tmp_path: Path, caplog: Any) -> None:
    for name in ("PreTrainedTokenizerFast", "TokenizersBackend", "NoSuchTokenizer"):
        folder = byte_level(tmp_path, {"tokenizer_class": name})
        assert_reads_as_written(folder)
        assert not tokenizer_class_misreads(folder)
    assert not caplog.records


@pytest.mark.parametrize(
    "settings",
    [
        {"tokenizer_class": "GPT2TokenizerFast", "add_prefix_space": True},
        {"tokenizer_class": "Qwen2Tokenizer"},
        {"tokenizer_class": "GemmaTokenizerFast"},  # the vocabulary lacks its unknown token: encoding fails
        {"tokenizer_class": "CodeLlamaTokenizerFast", "legacy": True},
        {"tokenizer_class": "T5TokenizerFast"},  # cannot be loaded from these files
        {"tokenizer_class": "ByT5Tokenizer"},  # has no backend
        {"added_tokens_decoder": {"330": {"content": USER, "rstrip": False, "special": True}}},
    ],
    ids=lambda settings: settings.get("tokenizer_class", "flags of an added token"),
)
def test_tokenizer_class_and_settings_do_not_change_the_ids_of_tokenizer_json(
    tmp_path: Path, settings: dict[str, Any], caplog: Any
) -> None:
    assert_reads_as_written(byte_level(tmp_path, settings))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "is used" in caplog.text and tokenizer_class_misreads(tmp_path)


def test_token_splitting_truncation_and_dropout_of_the_files_are_not_applied(tmp_path: Path, caplog: Any) -> None:
    folder = byte_level(tmp_path, {"split_special_tokens": True, "model_max_length": 3})
    content = json.loads((folder / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert_reads_as_written(folder)
    assert "split_special_tokens=true" in caplog.text
    expected = token_ids(load(folder), texts(folder))
    content["model"]["dropout"] = 0.9
    (folder / "tokenizer.json").write_text(json.dumps(content))
    assert token_ids(load(folder), texts(folder)) == expected
    assert "BPE dropout" in caplog.text


def test_default_special_tokens_of_a_class_are_used_if_tokenizer_json_has_them(tmp_path: Path, caplog: Any) -> None:
    folder = byte_level(tmp_path, {})
    content = (folder / "tokenizer.json").read_text().replace(EOS, "</s>")
    (folder / "tokenizer.json").write_text(content)
    write_settings(folder, tokenizer_class="LlamaTokenizer", pad_token="<|pad|>")
    tokenizer = load(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", written(folder).token_to_id("</s>"))
    assert tokenizer.bos_token is None, "tokenizer.json has no <s>"
    assert set(tokenizer.get_vocab()) - set(written(folder).get_vocab()) == {"<|pad|>"}
    assert tokenizer.pad_token_id == len(written(folder).get_vocab())
    assert "(<|pad|>)" in caplog.text


# ---- text that is not preserved --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])},
        {"decoder": decoders.Fuse()},
        {"model": models.WordLevel({"What": 0, "is": 1, "<unk>": 2, BOS: 3}, unk_token="<unk>")},
        {"model": models.BPE({"W": 0, "h": 1, "a": 2, "t": 3, BOS: 4}, [])},  # drops all other characters silently
    ],
    ids=["no spaces", "byte-level marks", "unknown words", "dropped characters"],
)
def test_a_tokenizer_that_does_not_preserve_plain_text_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    byte_level(tmp_path, {}, **changes)
    with pytest.raises(UserError, match=r"'What is 1\+2") as caught:
        load(tmp_path, "teacher.tokenizer.name")
    assert (caught.value.key, caught.value.value) == ("teacher.tokenizer.name", str(tmp_path))


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.NFC(),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("...", "…")]),
    ],
)
def test_text_is_compared_after_the_tokenizers_normalizer(tmp_path: Path, normalizer: Any, caplog: Any) -> None:
    tokenizer = load(byte_level(tmp_path, {}, normalizer=normalizer))
    (ids,) = token_ids(tokenizer, ["ÉTÉ"])
    assert tokenizer.decode(ids) == normalizer.normalize_str("ÉTÉ")
    assert not caplog.records


# ---- folders without tokenizer.json ----------------------------------------------------------------------------------


def sentencepiece_folder(folder: Path, **settings: Any) -> Path:
    spm = pytest.importorskip("sentencepiece")
    (folder / "corpus.txt").write_text("\n".join(CORPUS))
    spm.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"), model_prefix=str(folder / "tokenizer"), vocab_size=340, model_type="bpe",
        byte_fallback=True, normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
        hard_vocab_limit=False,
    )  # fmt: skip
    (folder / "config.json").write_text('{"model_type": "llama"}')
    write_settings(folder, **settings)
    return folder


def test_a_sentencepiece_model_has_the_ids_of_sentencepiece_and_bos_before_bare_text(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    folder = sentencepiece_folder(tmp_path, tokenizer_class="LlamaTokenizer")
    tokenizer, author = load(folder), SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert token_ids(tokenizer, PLAIN_TEXTS) == author.encode(list(PLAIN_TEXTS))
    assert token_ids(tokenizer, ["a b"], special_tokens=True) == [[author.bos_id(), *author.encode("a b")]]
    write_settings(folder, tokenizer_class="LlamaTokenizer", add_bos_token=False)
    assert token_ids(load(folder), ["a b"], special_tokens=True) == [author.encode("a b")]


def test_a_sentencepiece_model_with_the_wrong_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"tokenizer\.model") as caught:
        load(sentencepiece_folder(tmp_path))
    assert caught.value.key == KEY and "TokenizersBackend" in caught.value.problem


def test_vocabulary_and_merges_without_tokenizer_json_are_loaded_with_a_warning(tmp_path: Path, caplog: Any) -> None:
    content = json.loads((byte_level(tmp_path, {}) / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    write_settings(tmp_path, tokenizer_class="GPT2Tokenizer")
    tokenizer = load(tmp_path)
    assert tokenizer.decode(token_ids(tokenizer, [PLAIN_TEXTS[0]])[0]) == PLAIN_TEXTS[0]
    assert "GPT2Tokenizer" in caplog.text
    write_settings(tmp_path, tokenizer_class="LlamaTokenizerFast")
    with pytest.raises(UserError) as caught:  # this class reads spaces differently
        load(tmp_path)
    assert caught.value.key == KEY
    assert not tokenizer_class_misreads(tmp_path)


# ---- special tokens --------------------------------------------------------------------------------------------------

ADDS = {
    "nothing": ("$A", "$A $B"),
    "bos": (f"{BOS} $A", f"{BOS} $A {BOS} $B"),
    "eos": (f"$A {EOS}", f"$A {EOS} $B {EOS}"),
    "both": (f"{BOS} $A {EOS}", f"{BOS} $A {EOS} $B {EOS}"),
}


@pytest.mark.parametrize("adds", ADDS)
@pytest.mark.parametrize("settings", [{}, {"add_bos_token": True}, {"add_eos_token": True}, {"add_bos_token": None}])
def test_bare_text_begins_with_bos_once_and_never_ends_with_eos(
    tmp_path: Path, adds: str, settings: dict[str, Any]
) -> None:
    special = [(BOS, 0), (EOS, 1)]
    single, pair = ADDS[adds]
    post = processors.TemplateProcessing(single=single, pair=pair, special_tokens=special)
    tokenizer = load(byte_level(tmp_path, settings, post_processor=post))
    opening = [0] if adds in ("bos", "both") or settings.get("add_bos_token") else []
    (bare,) = token_ids(tokenizer, ["What is"])
    for text in ("What is", f"{BOS}What is"):
        expected = [opening + bare] if text == "What is" else [[0, *bare]]
        assert token_ids(tokenizer, [text], special_tokens=True) == expected
        assert chat_ids(tokenizer, [[{"role": "user", "content": text}]]) == expected
    context = ContextDistillationConfig(enabled=True, chat_template=False, teacher_prefix_template="What {problem}")
    prefix = ContextPrefixes(tokenizer, context, 100).prefix_of(Prompt(0, (), Problem("is")))
    assert isinstance(prefix, Prefix) and [*prefix.token_ids] == opening + bare


def test_a_post_processor_that_adds_bos_against_the_settings_is_logged(tmp_path: Path, caplog: Any) -> None:
    tokenizer = load(byte_level(tmp_path, {"add_bos_token": False}))
    assert token_ids(tokenizer, ["a"], special_tokens=True)[0][0] == tokenizer.bos_token_id
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "add_bos_token=false" in warning and BOS in warning
    caplog.clear()
    load(byte_level(tmp_path, {"add_bos_token": False}, post_processor=processors.ByteLevel(trim_offsets=False)))
    assert not caplog.records


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML])
def test_chat_prompts_have_the_special_tokens_of_the_template_only(tmp_path: Path, template: str) -> None:
    tokenizer = load(byte_level(tmp_path, {"chat_template": template, "add_bos_token": True}))
    chats = [[{"role": "user", "content": text}] for text in ("What is 1+2?", "a\n\nb ")]
    oracle = tokenizer.apply_chat_template(chats, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert chat_ids(tokenizer, chats) == oracle
    assert [ids.count(0) for ids in oracle] == [int("bos_token" in template)] * 2
