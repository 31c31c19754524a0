"""Text becomes the ids that the tokenizer's author meant: tokenizer.json decides, special tokens are never doubled, and
text that is lost is refused. Oracles: tokenizers.Tokenizer.from_file, transformers and SentencePiece."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoConfig, AutoTokenizer, GenerationConfig

from distill import inputs
from distill.config import ContextDistillationConfig
from distill.data import text_checks
from distill.data.chat_template import check_chat_template
from distill.data.clock import RunClock, current_time
from distill.data.prompts import chat_ids, token_ids
from distill.data.stop_ids import stop_ids, usable_stop_ids
from distill.data.teacher_prefix import ContextPrefixes, Prefix
from distill.data.text_checks import check_texts
from distill.data.tokenizer import load_tokenizer, tokenizer_class_misreads
from distill.data.tokenizer_checks import OTHER_TEXTS, PLAIN_TEXTS, compare_vocabularies
from distill.errors import UserError
from distill.inputs import check_contexts, find_models, read_prompts
from distill.types import Problem, Prompt
from tests.harness import config_for
from tests.helpers import save_tiny_model
from tests.tiny_tokenizer import CHATML, tiny_tokenizer

KEY = "policy.tokenizer.name"
CORPUS = [
    "What is 1+2, please? The first line and the second: x = 10 * (y - 3) / 2; I'LL don't 12345",
    "café 日本語 😀",
] * 9
BOS, EOS, USER = "<|begin|>", "<|end|>", "<|user|>"
DIGITS_IN_THREES = Regex(r"\p{N}{1,3}| ?[^\s\p{N}]+|\s+")


def byte_level(folder: Path, settings: dict[str, Any], model_type: str = "llama", **changes: Any) -> Path:
    """A folder like DeepSeek-R1-Distill-Llama's: byte-level BPE in tokenizer.json, BOS by its post-processor."""
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(DIGITS_IN_THREES, "isolated")
    byte_pairs = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_pairs])
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, initial_alphabet=alphabet, special_tokens=[BOS, EOS], show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(USER, rstrip=True)])
    tokenizer.post_processor = processors.TemplateProcessing(
        single=[BOS, "$A"], pair=[BOS, "$A", BOS, "$B:1"], special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    _settings(folder, **{"bos_token": BOS, "eos_token": EOS} | settings)
    return folder


def _settings(folder: Path, **settings: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def load(folder: Path, key: str = KEY, chat_template: str | None = None) -> Any:
    return load_tokenizer(SimpleNamespace(name=str(folder), folder=folder), None, key, chat_template)


def written(folder: Path) -> Tokenizer:
    """tokenizer.json alone."""
    found = Tokenizer.from_file(str(folder / "tokenizer.json"))
    found.no_padding()
    found.no_truncation()
    return found


def texts(folder: Path) -> list[str]:
    tokens = [token.content for token in written(folder).get_added_tokens_decoder().values()]
    return [*PLAIN_TEXTS, *OTHER_TEXTS, *(f"one {token} two{token}\n three" for token in tokens)]


def assert_reads_as_written(folder: Path) -> Any:
    """Ids and decoded text are those of tokenizer.json alone."""
    tokenizer, author = load(folder), written(folder)
    expected = [encoding.ids for encoding in author.encode_batch(texts(folder), add_special_tokens=False)]
    assert token_ids(tokenizer, texts(folder)) == expected
    for text in (*PLAIN_TEXTS, *OTHER_TEXTS):
        assert tokenizer.decode(token_ids(tokenizer, [text])[0]) == text
    return tokenizer


# ---- tokenizer.json decides ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_spaces_stay_under_a_llama_class_over_a_byte_level_tokenizer_json(
    tmp_path: Path, model_type: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = byte_level(tmp_path, {"tokenizer_class": "LlamaTokenizerFast"}, model_type)
    by_transformers = AutoTokenizer.from_pretrained(folder)
    ids = token_ids(by_transformers, ["What is 1+2, please? 123"])
    assert ids != [written(folder).encode("What is 1+2, please? 123", add_special_tokens=False).ids], "it needs no help"
    tokenizer = assert_reads_as_written(folder)
    assert tokenizer.decode(token_ids(tokenizer, ["What is 1+2, please?"])[0]) == "What is 1+2, please?"
    (warning,) = [record.getMessage() for record in caplog.records]
    assert warning.startswith(f"{KEY}={folder} has tokenizer_class=LlamaTokenizerFast in its tokenizer_config.json")
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
    assert tokenizer.get_vocab() == written(folder).get_vocab(), "no token that the class has by default"
    assert tokenizer_class_misreads(folder)


def test_a_class_that_reads_as_tokenizer_json_does_is_kept_without_a_warning(tmp_path: Path, caplog: Any) -> None:
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
        {"tokenizer_class": "GemmaTokenizerFast"},  # its unknown token is missing: encoding fails
        {"tokenizer_class": "CodeLlamaTokenizerFast", "legacy": True},
        {"tokenizer_class": "T5TokenizerFast"},  # it can't be made from these files
        {"tokenizer_class": "ByT5Tokenizer"},  # it has no backend
        {"added_tokens_decoder": {"330": {"content": USER, "rstrip": False, "special": True}}},
    ],
    ids=lambda settings: settings.get("tokenizer_class", "flags of an added token"),
)
def test_no_class_and_no_setting_changes_the_ids_of_tokenizer_json(
    tmp_path: Path, settings: dict[str, Any], caplog: Any
) -> None:
    assert_reads_as_written(byte_level(tmp_path, settings))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "tokenizer.json is used" in caplog.text and tokenizer_class_misreads(tmp_path)


def test_control_tokens_are_never_split_truncation_is_off_and_dropout_too(tmp_path: Path, caplog: Any) -> None:
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


def test_special_tokens_of_a_class_are_used_where_tokenizer_json_has_them(tmp_path: Path, caplog: Any) -> None:
    folder = byte_level(tmp_path, {})
    content = (folder / "tokenizer.json").read_text().replace(EOS, "</s>")
    (folder / "tokenizer.json").write_text(content)
    _settings(folder, tokenizer_class="LlamaTokenizer", pad_token="<|pad|>")
    tokenizer = load(folder)
    assert (tokenizer.eos_token, tokenizer.eos_token_id) == ("</s>", written(folder).token_to_id("</s>"))
    assert tokenizer.bos_token is None, "<s> would be a new token"
    assert set(tokenizer.get_vocab()) - set(written(folder).get_vocab()) == {"<|pad|>"}
    assert tokenizer.pad_token_id == len(written(folder).get_vocab())
    assert "adds special tokens that its tokenizer.json lacks (<|pad|>)" in caplog.text


# ---- text that is lost -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {"pre_tokenizer": pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), pre_tokenizers.ByteLevel(False)])},
        {"decoder": decoders.Fuse()},
        {"model": models.WordLevel({"What": 0, "is": 1, "<unk>": 2, BOS: 3}, unk_token="<unk>")},
        {"model": models.BPE({"W": 0, "h": 1, "a": 2, "t": 3, BOS: 4}, [])},  # it drops all else without a word
    ],
    ids=["spaces gone", "marks of bytes", "unknown words", "dropped characters"],
)
def test_a_tokenizer_that_loses_plain_text_is_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    byte_level(tmp_path, {}, **changes)
    with pytest.raises(UserError, match=r"^teacher\.tokenizer\.name=.* has a tokenizer that loses text \('What is 1\+"):
        load(tmp_path, "teacher.tokenizer.name")


@pytest.mark.parametrize(
    "normalizer",
    [
        normalizers.NFC(),
        normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]),
        normalizers.Sequence([normalizers.NFKC(), normalizers.Replace("...", "…")]),
    ],
)
def test_text_is_compared_after_the_tokenizers_own_normaliser(tmp_path: Path, normalizer: Any, caplog: Any) -> None:
    tokenizer = load(byte_level(tmp_path, {}, normalizer=normalizer))
    (ids,) = token_ids(tokenizer, ["ÉTÉ"])
    assert tokenizer.decode(ids) == normalizer.normalize_str("ÉTÉ")
    assert not caplog.records


def test_characters_that_a_vocabulary_lacks_are_a_warning_not_a_refusal(tmp_path: Path, caplog: Any) -> None:
    alphabet = {chr(c): c for c in range(128)} | {"▁": 128, "<unk>": 129, BOS: 130}
    marks: dict[str, Any] = {
        "pre_tokenizer": pre_tokenizers.Metaspace(split=False),
        "decoder": decoders.Metaspace(),
        "model": models.BPE(alphabet, [], unk_token="<unk>"),
    }
    tokenizer = load(byte_level(tmp_path, {"unk_token": "<unk>"}, **marks))
    assert "does not keep" in caplog.text and "comes back as" in caplog.text
    caplog.clear()
    prompts = [_prompt(tokenizer, i, text) for i, text in enumerate(["plain", "grün", "A 😀"])]
    check_texts(prompts, tokenizer, 10_000, "data.train")
    unknown, changed = [record.getMessage() for record in caplog.records]
    assert unknown.startswith("data.train: 2 prompts have characters that the vocabulary lacks")
    assert "problem 2 (file.jsonl: 'grün')" in unknown and "'<unk>'" in unknown
    assert "2 of the first 3 problems" in changed and "'grün' comes back as 'gr<unk>n'" in changed


def _prompt(tokenizer: Any, i: int, text: str, **columns: str) -> Prompt:
    return Prompt(i, tuple(token_ids(tokenizer, [text])[0]), Problem(text, source="file.jsonl", columns=columns))


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
    _settings(folder, **settings)
    return folder


def test_a_sentencepiece_model_is_read_as_sentencepiece_reads_it_with_bos_before_bare_text(tmp_path: Path) -> None:
    from sentencepiece import SentencePieceProcessor

    folder = sentencepiece_folder(tmp_path, tokenizer_class="LlamaTokenizer")
    tokenizer, author = load(folder), SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    assert token_ids(tokenizer, PLAIN_TEXTS) == author.encode(list(PLAIN_TEXTS))
    assert token_ids(tokenizer, ["a b"], special_tokens=True) == [[author.bos_id(), *author.encode("a b")]]
    _settings(folder, tokenizer_class="LlamaTokenizer", add_bos_token=False)
    assert token_ids(load(folder), ["a b"], special_tokens=True) == [author.encode("a b")]


def test_a_sentencepiece_model_under_another_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"has a tokenizer\.model that transformers' TokenizersBackend reads diff"):
        load(sentencepiece_folder(tmp_path))


def test_vocabulary_and_merges_without_tokenizer_json_are_read_with_a_warning_or_refused(
    tmp_path: Path, caplog: Any
) -> None:
    content = json.loads((byte_level(tmp_path, {}) / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "vocab.json").write_text(json.dumps(content["model"]["vocab"]))
    merges = (merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"])
    (tmp_path / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges))
    _settings(tmp_path, tokenizer_class="GPT2Tokenizer")
    tokenizer = load(tmp_path)
    assert tokenizer.decode(token_ids(tokenizer, [PLAIN_TEXTS[0]])[0]) == PLAIN_TEXTS[0]
    assert "has no tokenizer.json: transformers' GPT2Tokenizer" in caplog.text
    _settings(tmp_path, tokenizer_class="LlamaTokenizerFast")
    with pytest.raises(UserError, match="loses text"):
        load(tmp_path)
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


def test_a_post_processor_that_adds_bos_against_the_settings_is_named_in_a_warning(tmp_path: Path, caplog: Any) -> None:
    tokenizer = load(byte_level(tmp_path, {"add_bos_token": False}))
    assert token_ids(tokenizer, ["a"], special_tokens=True)[0][0] == tokenizer.bos_token_id
    (warning,) = [record.getMessage() for record in caplog.records]
    assert "has add_bos_token=false" in warning and f"puts {BOS} before bare text" in warning
    caplog.clear()
    load(byte_level(tmp_path, {"add_bos_token": False}, post_processor=processors.ByteLevel(trim_offsets=False)))
    assert not caplog.records


@pytest.mark.parametrize("template", [CHATML, "{{ bos_token }}" + CHATML])
def test_a_chat_template_writes_all_special_tokens_itself_as_in_transformers(tmp_path: Path, template: str) -> None:
    tokenizer = load(byte_level(tmp_path, {"chat_template": template, "add_bos_token": True}))
    chats = [[{"role": "user", "content": text}] for text in ("What is 1+2?", "a\n\nb ")]
    oracle = tokenizer.apply_chat_template(chats, tokenize=True, add_generation_prompt=True, return_dict=False)
    assert chat_ids(tokenizer, chats) == oracle
    assert [ids.count(0) for ids in oracle] == [int("bos_token" in template)] * 2


# ---- stop ids --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("generation", "config", "expected"),
    [
        ({"eos_token_id": [3, 4]}, {"eos_token_id": 5}, {3, 4}),
        ({"eos_token_id": 3}, {}, {3}),
        ({}, {"eos_token_id": 5}, set()),  # transformers reads config.json only where the other file is missing
        (None, {"eos_token_id": [5, 6]}, {5, 6}),
        (None, {"eos_token_id": None}, set()),
    ],
)
def test_stop_ids_are_those_of_transformers_and_the_tokenizers_eos(
    tmp_path: Path, generation: dict[str, Any] | None, config: dict[str, Any], expected: set[int]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if generation is not None:
        (tmp_path / "generation_config.json").write_text(json.dumps(generation))
        oracle = GenerationConfig.from_pretrained(tmp_path)
    else:
        oracle = GenerationConfig.from_model_config(AutoConfig.from_pretrained(tmp_path))
    theirs = oracle.eos_token_id if isinstance(oracle.eos_token_id, list) else [oracle.eos_token_id]
    assert {*theirs} - {None} == expected
    files: Any = SimpleNamespace(name="m", folder=tmp_path)
    assert stop_ids(files, tiny_tokenizer()) == tuple(sorted({*expected, 258}))


def test_stop_ids_of_a_text_configuration_are_read(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": 7}}')
    files: Any = SimpleNamespace(name="m", folder=tmp_path)
    assert stop_ids(files, tiny_tokenizer()) == (7, 258)
    (tmp_path / "config.json").write_text('{"text_config": {"eos_token_id": "x"}}')
    with pytest.raises(UserError, match=r"config\.json has eos_token_id=x, which is no id of a token"):
        stop_ids(files, tiny_tokenizer())


def test_stop_ids_without_a_row_of_ordinary_text_or_missing_are_named_in_warnings(caplog: Any) -> None:
    tokenizer = tiny_tokenizer()
    plus = tokenizer.convert_tokens_to_ids("+")
    assert usable_stop_ids((256, 258, 259), tokenizer, 261, "m") == (256, 258, 259) and not caplog.records
    assert usable_stop_ids((plus, 258, 300), tokenizer, 261, "m") == (plus, 258)
    beyond, text = [record.getMessage() for record in caplog.records]
    assert "stop ids [300] are past its vocabulary of 261" in beyond
    assert f"stop ids [{plus}] are ordinary text ('+')" in text
    caplog.clear()
    assert usable_stop_ids((), tokenizer, 261, "m") == ()
    assert "m has no stop id" in caplog.text


# ---- chat templates --------------------------------------------------------------------------------------------------


def test_the_users_chat_template_is_used_by_the_student_and_by_itself_as_teacher(tmp_path: Path) -> None:
    for name in ("student", "other"):
        save_tiny_model(tmp_path / name, "qwen3")
        tiny_tokenizer(chat_template=f"{name}: {{{{ messages[0].content }}}}").save_pretrained(tmp_path / name)
    for name in ("mine", "theirs"):
        (tmp_path / f"{name}.jinja").write_text(f"\ufeff{name}: {{{{ messages[0].content }}}}\n")
    context = "distillation.context_distillation"
    mine, theirs = (f"{who}.tokenizer.chat_template={tmp_path}/{file}.jinja" for who, file in
                    (("policy", "mine"), ("teacher", "theirs")))  # fmt: skip
    for mode in ("frozen", "self_frozen"):
        for teacher, keys, writes in (
            ("student", (), ("student", "student")),
            ("student", (mine,), ("mine", "mine")),
            ("student", (theirs,), ("student", "theirs")),
            ("student", (mine, theirs), ("mine", "theirs")),
            ("other", (mine,), ("mine", "other")),
            ("other", (mine, theirs), ("mine", "theirs")),
            ("student", ("policy.tokenizer.chat_template=default",), ("student", "student")),
        ):
            if mode != "frozen" and (teacher == "other" or not keys or "default" in keys[0]):
                continue
            words = (f"{context}.enabled=true", f"{context}.mode={mode}", f"{context}.chat_template=true")
            template = f"{context}.teacher_prefix_template={{problem}}"
            models_ = find_models(config_for(tmp_path / "student", tmp_path / teacher, *words, template, *keys))
            chat = [[{"role": "user", "content": "1+1"}]]
            read = [models_.tokenizer, models_.teachers_tokenizer]
            assert [t.decode(chat_ids(t, chat)[0]) for t in read] == [f"{name}: 1+1" for name in writes]


@pytest.mark.parametrize(
    ("content", "fault"),
    [
        (b"one\n{% for m in messages %}\n{{ m.content ", "is no Jinja template in line 3"),
        (b"\xff\xfe{{ messages }}", "is not a readable UTF-8 text file"),
        (b"Solve: {}", r"leaves out the user's message \('What is 1\+2\?' becomes 'Solve: \{\}'\)"),
        (None, "does not exist"),
    ],
)
def test_a_chat_template_file_that_is_none_is_refused_with_its_line(
    tmp_path: Path, content: bytes | None, fault: str
) -> None:
    tiny_tokenizer().save_pretrained(tmp_path)
    if content is not None:
        (tmp_path / "own.jinja").write_bytes(content)
    with pytest.raises(UserError, match=rf"^policy\.tokenizer\.chat_template=.*own\.jinja {fault}"):
        load(tmp_path, chat_template=str(tmp_path / "own.jinja"))


def test_a_teacher_with_the_students_tokenizer_files_shares_its_tokenizer_but_not_its_stop_ids(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = []

    def load_and_count(*given: Any) -> Any:
        loaded.append(given)
        return load_tokenizer(*given)

    monkeypatch.setattr(inputs, "load_tokenizer", load_and_count)
    for name, stop in (("student", 258), ("teacher", 256)):
        save_tiny_model(tmp_path / name, "qwen3")
        tiny_tokenizer().save_pretrained(tmp_path / name)
        (tmp_path / name / "generation_config.json").write_text(json.dumps({"eos_token_id": stop}))
    config = config_for(tmp_path / "student", tmp_path / "teacher", "distillation.context_distillation.mode=frozen")
    found = find_models(config)
    assert found.stop_token_ids == (256, 258) and found.teachers_tokenizer is found.tokenizer and len(loaded) == 1
    (tmp_path / "teacher/chat_template.jinja").write_text("T {{ messages[0].content }}")
    assert find_models(config).teachers_tokenizer.chat_template == "T {{ messages[0].content }}"
    assert len(loaded) == 3


MESSAGES = "{% for m in messages %}CONTENT{% endfor %}"


@pytest.mark.parametrize(
    "content", ["{{ m.content.split()|join('\n') }}", "{{ m.content.replace(' ', '') }}", "{{ m.content.upper() }}"]
)
def test_a_chat_template_may_change_white_space_and_case(tmp_path: Path, content: str) -> None:
    tokenizer = tiny_tokenizer(chat_template=MESSAGES.replace("CONTENT", content))
    check_chat_template(tokenizer, "policy.tokenizer.name=x", "policy.tokenizer.chat_template")


def test_a_chat_template_is_checked_with_the_recipes_arguments(tmp_path: Path) -> None:
    template = MESSAGES.replace("CONTENT", "{% if mode == 'solve' %}{{ m.content }}{% endif %}")
    save_tiny_model(tmp_path / "own", "qwen3")
    tiny_tokenizer(chat_template=template).save_pretrained(tmp_path / "own")
    (tmp_path / "template.jinja").write_text(template)
    solve, other = "tokenizer.chat_template_kwargs={mode: solve}", "tokenizer.chat_template_kwargs={mode: other}"
    context = [f"distillation.context_distillation.{word}" for word in ("enabled=true", "chat_template=true")]
    context.append("distillation.context_distillation.teacher_prefix_template={problem}")
    for key in ((), (f"policy.tokenizer.chat_template={tmp_path}/template.jinja",)):
        words = ("distillation.allow_degenerate=true", *key)
        find_models(config_for(tmp_path / "own", tmp_path / "own", f"policy.{solve}", *words))
        with pytest.raises(UserError, match="leaves out the user's message"):
            find_models(config_for(tmp_path / "own", tmp_path / "own", f"policy.{other}", *words))
        with pytest.raises(UserError, match=r"teacher\.tokenizer.*leaves out the user's message"):
            find_models(
                config_for(tmp_path / "own", tmp_path / "own", f"policy.{solve}", f"teacher.{other}", *words, *context)
            )


def test_of_named_templates_the_default_is_used_and_a_folder_without_a_template_is_logged(
    tmp_path: Path, caplog: Any
) -> None:
    save_tiny_model(tmp_path / "m", "qwen3")
    named = {"default": "D {{ messages[0].content }}", "tool_use": "T {{ messages[0].content }}"}
    tiny_tokenizer(chat_template=None).save_pretrained(tmp_path / "m")
    listed = [{"name": name, "template": text} for name, text in named.items()]
    settings = json.loads((tmp_path / "m/tokenizer_config.json").read_text())
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": listed}))
    config = config_for(tmp_path / "m", tmp_path / "m", "distillation.allow_degenerate=true")
    tokenizer = find_models(config).tokenizer
    assert tokenizer.decode(chat_ids(tokenizer, [[{"role": "user", "content": "a"}]])[0]) == "D a"
    (tmp_path / "m/tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "m/chat_template.json").write_text(json.dumps({"chat_template": CHATML}))
    caplog.clear()
    with caplog.at_level("INFO"):
        assert find_models(config).tokenizer.chat_template is None
    (line,) = [record.getMessage() for record in caplog.records if "chat template" in record.getMessage()]
    assert "has no chat template (transformers reads chat_template.json for processors only)" in line


# ---- two tokenizers, and the user's texts ----------------------------------------------------------------------------


def test_vocabularies_are_compared_by_content(caplog: Any) -> None:
    same, other = tiny_tokenizer(), tiny_tokenizer(extra=("<|other|>",))
    compare_vocabularies(same, tiny_tokenizer(), "a", "b")
    assert not caplog.records
    with pytest.raises(
        UserError, match=r"policy\.model_name=a and teacher\.model_name=b have different tokenizers \(1 "
    ):
        compare_vocabularies(same, other, "a", "b")


def test_the_same_vocabulary_under_another_pre_tokenizer_is_a_warning(tmp_path: Path, caplog: Any) -> None:
    student = load(byte_level(tmp_path / "a", {}))
    single_digits = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False, use_regex=False)]
    )
    teacher = load(byte_level(tmp_path / "b", {}))
    teacher.backend_tokenizer.pre_tokenizer = single_digits
    assert student.get_vocab() == teacher.get_vocab()
    compare_vocabularies(student, teacher, "a", "b")
    assert "have the same tokens and split text differently" in caplog.text


def _past_the_embeddings(root: Path) -> tuple[str, ...]:
    """A tiny model of 384 rows and overrides for a tokenizer of 400 ids."""
    save_tiny_model(root / "m", "qwen3")
    tiny_tokenizer(extra=tuple(f"<x{i}>" for i in range(139))).save_pretrained(root / "t")
    return f"policy.tokenizer.name={root}/t", f"teacher.tokenizer.name={root}/t"


def test_an_id_past_the_embeddings_is_refused_with_its_row(tmp_path: Path) -> None:
    names = _past_the_embeddings(tmp_path)
    for last, refused in (("<x122>", False), ("<x123>", True)):  # 261 + 122 = 383, the last row
        rows = "".join(json.dumps({"input": f"What is {text}?"}) + "\n" for text in ("1", "2", last))
        (tmp_path / "rows.jsonl").write_text(rows)
        few = ("distillation.allow_degenerate=true", "distillation.num_prompts_per_step=1",
               "policy.train_global_batch_size=1")  # fmt: skip
        config = config_for(tmp_path / "m", tmp_path / "m", *names, *few)
        train = (replace(config.data.train[0], data_path=f"{tmp_path}/rows.jsonl", output_key=None, prompt_file=None),)
        config = replace(config, data=replace(config.data, train=train))
        found = find_models(config)
        assert found.valid_vocab == 384
        if not refused:
            assert len(read_prompts(config, found, RunClock(current_time())).prompts) == 3
            continue
        with pytest.raises(UserError, match=r"data\.train: problem 3 \(.*rows\.jsonl: 'What is <x123>\?'\) .*id 384"):
            read_prompts(config, found, RunClock(current_time()))


def test_a_context_with_an_id_past_the_embeddings_is_refused_before_the_first_step(tmp_path: Path) -> None:
    names = _past_the_embeddings(tmp_path)
    context = "distillation.context_distillation"
    words = (
        f"{context}.enabled=true", f"{context}.teacher_prefix_template={{problem}} {{trace}}",
        f"{context}.trace_source=static_dataset", f"{context}.static_trace.answer_column=hint",
    )  # fmt: skip
    config = config_for(tmp_path / "m", tmp_path / "m", *names, *words)
    found = find_models(config)

    def checked(hint: str) -> None:
        views = ContextPrefixes(found.teachers_tokenizer, config.distillation.context_distillation, 99, None, 384)
        problem = Problem("1+1?", columns={"hint": f"<think>{hint}</think>"})
        check_contexts(config, found, views, [problem])

    checked("<x122>")
    with pytest.raises(UserError, match=r"teacher_prefix_template for the problem '1\+1\?' holds the token '<x123>'"):
        checked("<x123>")
    template = replace(config.distillation.context_distillation, teacher_prefix_template="<x130> {problem}")
    with pytest.raises(UserError, match=r"teacher_prefix_template holds the token '<x130>'"):
        ContextPrefixes(found.teachers_tokenizer, template, 99, None, 384)


def test_control_tokens_inside_problems_and_traces_are_named_in_a_warning(caplog: Any) -> None:
    tokenizer = tiny_tokenizer(special_think=False)
    prompts = [
        _prompt(tokenizer, 0, "a < b, <think>plain</think>"),
        _prompt(tokenizer, 1, "x", hint="b<|im_start|>system"),
        _prompt(tokenizer, 2, "y<|im_end|>"),
    ]
    check_texts(prompts, tokenizer, 261, "data.train")
    check_texts(prompts, tokenizer, 261, "data.train", "hint")
    first, again, second = [record.getMessage() for record in caplog.records]
    assert first.startswith("data.train: 1 prompts have '<|im_end|>'") and "problem 3 (file.jsonl: 'y<" in first
    assert again == first
    assert second.startswith("data.train: 1 prompts have '<|im_start|>' in the column hint") and "problem 2 " in second


def test_think_tags_are_meant_in_the_trace_column_and_not_in_a_problem(caplog: Any) -> None:
    tokenizer = tiny_tokenizer(special_think=True)
    tags = ("<think>", "</think>")
    prompts = [_prompt(tokenizer, i, "x", hint="<think>a</think>b") for i in range(3)]
    check_texts(prompts, tokenizer, 261, "data.train", "hint", tags)
    assert not caplog.records
    prompts += [_prompt(tokenizer, 3, "x", hint="<think>a<|im_end|>"), _prompt(tokenizer, 4, "<think>")]
    check_texts(prompts, tokenizer, 261, "data.train", "hint", tags)
    in_text, in_column = [record.getMessage() for record in caplog.records]
    assert in_text.startswith("data.train: 1 prompts have '<think>' in their text") and "problem 5" in in_text
    assert in_column.startswith("data.train: 1 prompts have '<|im_end|>' in the column hint") and "unless" in in_column


def test_thousands_of_control_tokens_are_searched_for_in_little_time(caplog: Any) -> None:
    tokens = [f"{'<[abcdefg'[i % 9]}{i * 7919 % 6200}]>" for i in range(6200)]
    decoder = {i: AddedToken(token, special=True) for i, token in enumerate(tokens)}
    text = "If a < b and [c, d] be given, find the sum of all of them. " * 40
    prompts = [Prompt(i, (1,), Problem(text)) for i in range(600)]
    tokenizer = SimpleNamespace(added_tokens_decoder=decoder)
    begun = time.process_time()
    text_checks._warn_of_control_tokens(prompts, tokenizer, "data.train", None, ("<think>", "</think>"))
    assert time.process_time() - begun < 2.5
