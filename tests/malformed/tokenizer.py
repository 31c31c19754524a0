"""Malformed tokenizers: text not preserved, ids without an embedding, chat templates, stop ids."""

from __future__ import annotations

import json
from typing import Any

from tests.malformed.case import Case, Workshop, way
from tests.malformed.data import json_lines, problem_rows
from tests.malformed.models import model_case
from tests.tiny_tokenizer import CHATML, tiny_tokenizer

PAST = tuple(f"<|extra{i}|>" for i in range(200))
"""More tokens than the tiny models' 384 embeddings: the last tokens have no embedding."""


def _owned(shop: Workshop, key: str, value: Any) -> Case:
    owner = shop.rng.choice(["policy", "teacher"])
    return shop.case(f"{owner}.{key}", f"{owner}.{key}={value}")


@way
def _tokenizer_that_loses_text(shop: Workshop) -> Case:
    model = shop.model()
    written = json.loads((model / "tokenizer.json").read_text())
    byte_level = written["pre_tokenizer"]
    kind = shop.rng.randrange(5)
    if kind == 0:  # spaces vanish
        written["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [{"type": "WhitespaceSplit"}, byte_level]}
    elif kind == 1:  # marks of bytes stay in the text
        written["decoder"] = None
    elif kind == 2:  # spaces become the byte-level mark and are not restored
        written["decoder"] = {"type": "Replace", "pattern": {"String": "Ġ"}, "content": ""}
    elif kind == 3:  # characters that the vocabulary lacks are dropped silently
        for token in shop.rng.choice(["Ġ", "Ċ", "123", "eW"]):
            written["model"]["vocab"].pop(token)
    else:  # or become the unknown token
        vocab = {token: i for i, token in enumerate(["<unk>", "What", "is", "+", "?"])}
        written["model"] = {"type": "WordLevel", "vocab": vocab, "unk_token": "<unk>"}
        written["pre_tokenizer"] = {"type": "Whitespace"}
    (model / "tokenizer.json").write_text(json.dumps(written))
    return model_case(shop, "tokenizer.name", model, f"loses text {kind}")


@way
def _tokenizer_of_files_that_lose_text(shop: Workshop) -> Case:
    """Without tokenizer.json, a class for SentencePiece reads byte-level vocabulary and merges."""
    model = shop.model()
    written = json.loads((model / "tokenizer.json").read_text())
    (model / "tokenizer.json").unlink()
    (model / "vocab.json").write_text(json.dumps(written["model"]["vocab"]))
    (model / "merges.txt").write_text("#version: 0.2\n")
    settings = json.loads((model / "tokenizer_config.json").read_text())
    name = shop.rng.choice(["LlamaTokenizer", "LlamaTokenizerFast", "GemmaTokenizer", "PreTrainedTokenizerFast"])
    (model / "tokenizer_config.json").write_text(json.dumps({**settings, "tokenizer_class": name}))
    return model_case(shop, "tokenizer.name", model, name)


@way
def _chat_template_that_is_no_file(shop: Workshop) -> Case:
    missing, folder = shop.folder / "missing.jinja", shop.folder
    template = '"{% for m in messages %}{{ m.content }}{% endfor %}"'
    path = shop.rng.choice([missing, folder, template, "''", "/dev/null/x", "x" * 300])
    return _owned(shop, "tokenizer.chat_template", path)


@way
def _chat_template_that_is_no_template(shop: Workshop) -> Case:
    content: Any = shop.rng.choice(
        [
            *(
                "{% for m in messages %}{{ m.content }}",
                "{{ messages[0] ",
                "line\n\n{% endif %}",
                "{% if %}{% endif %}",
            ),
            *("{{ messages | nofilter }}", "{% nothing %}", "{{ " + "(" * 5000, shop.noise(200)),
        ]
    )
    path = shop.file("template.jinja", content)
    return _owned(shop, "tokenizer.chat_template", path)


@way
def _chat_template_without_the_message(shop: Workshop) -> Case:
    content = shop.rng.choice(
        [
            *("", "Solve: {}", "{{ bos_token }}", "{% for m in messages %}{{ m.role }}{% endfor %}"),
            *("{{ messages[0].content[0].text }}", "{% if messages|length > 1 %}{{ messages[0].content }}{% endif %}"),
        ]
    )
    if shop.rng.random() < 0.5:
        return _owned(shop, "tokenizer.chat_template", shop.file("template.jinja", content))
    model = shop.model()
    (model / "chat_template.jinja").write_text(content)
    return shop.case("policy.tokenizer", f"policy.model_name={model}", detail=f"own: {content!r}")


def _past_the_embeddings(shop: Workshop, template: str = CHATML) -> tuple[str, str]:
    """Return overrides for a tokenizer with more ids than embeddings."""
    folder = shop.folder / "tokenizer"
    tiny_tokenizer(chat_template=template, extra=PAST).save_pretrained(folder)
    return f"policy.tokenizer.name={folder}", f"teacher.tokenizer.name={folder}"


@way
def _problem_with_an_id_past_the_embeddings(shop: Workshop) -> Case:
    rows = problem_rows(shop)
    rows[shop.rng.randrange(len(rows))]["question"] += f" {shop.rng.choice(PAST[123:])}"
    path = shop.file("past.jsonl", json_lines(rows))
    return shop.case("past.jsonl", *_past_the_embeddings(shop), f"data.train.data_path={path}")


@way
def _template_with_an_id_past_the_embeddings(shop: Workshop) -> Case:
    return shop.case("data.train", *_past_the_embeddings(shop, CHATML + PAST[-1]))


@way
def _context_with_an_id_past_the_embeddings(shop: Workshop) -> Case:
    context = "distillation.context_distillation"
    if shop.rng.random() < 0.5:
        words: tuple[str, ...] = (f'{context}.teacher_prefix_template="{PAST[-1]} {{problem}}"',)
    else:
        rows = [{**row, "solution": f"<think>{PAST[-1]}</think>"} for row in problem_rows(shop)]
        path = shop.file("hints.jsonl", json_lines(rows))
        words = (
            *(f"data.train.data_path={path}", f"{context}.trace_source=static_dataset"),
            *(
                f"{context}.static_trace.answer_column=solution",
                f'{context}.teacher_prefix_template="{{problem}} {{trace}}"',
            ),
        )
    student = f"policy.model_name={shop.root}/student"
    return shop.context("context", student, *_past_the_embeddings(shop), *words)


@way
def _stop_ids_of_config_json(shop: Workshop) -> Case:
    """The stop ids of config.json are read if generation_config.json is missing."""
    model = shop.model()
    (model / "generation_config.json").unlink()
    config = json.loads((model / "config.json").read_text())
    eos = shop.rng.choice(["<|im_end|>", -7, [1.5], [[2]], {"a": 1}, [3, True], [-1]])
    (model / "config.json").write_text(json.dumps({**config, "eos_token_id": eos}))
    return model_case(shop, "config.json", model, f"eos_token_id {eos}")
