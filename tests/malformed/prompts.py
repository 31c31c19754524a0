"""Malformed prompt files, teacher templates and chat templates."""

from __future__ import annotations

import json
import os

from tests.malformed.case import CANARY, Case, Workshop, way

PLACEHOLDERS = ["{x}", "{x.__class__}", "{problem!r}", "{x:>99999999}", "{problem}", "{x[0]}"]


@way
def _bad_prompt_file(shop: Workshop) -> Case:
    wrong = shop.rng.choice(PLACEHOLDERS)
    text = shop.rng.choice([f"{{}} {wrong}", f"{wrong} {{}}", wrong, f"{{}}\n{wrong}\n{{}}", "", "none", "{} {}"])
    path = shop.file("prompt.txt", text)
    return shop.case("prompt.txt", f"data.default.prompt_file={path}", detail=text)


@way
def _unreadable_prompt_file(shop: Workshop) -> Case:
    key = shop.rng.choice(["prompt_file", "system_prompt_file"])
    kind = shop.rng.randrange(5)
    path = shop.folder / "prompt.txt"
    if kind == 0:
        path.write_bytes(b"{} \xff\xfe")
    elif kind == 1:
        path.mkdir()
    elif kind == 2:
        os.mkfifo(path)
    elif kind == 3:
        path.write_bytes("{}".encode("utf-16"))
    return shop.case("prompt.txt", f"data.default.{key}={path}", detail=str(kind))


@way
def _bad_teacher_template(shop: Workshop) -> Case:
    key = "distillation.context_distillation.teacher_prefix_template"
    wrong = shop.rng.choice(
        [
            "{problem.__class__}",
            "{problem!r}",
            "{problem:>99999999}",
            "{problem[0]}",
            "{trace.__init__.__globals__}",
            "{hint}",
        ]
    )
    texts = [f"Hint: {{problem}} {wrong}", f"{wrong} {{problem}}", f"{{trace}} {wrong}", "{trace}", "no"]
    text = shop.rng.choice(texts)
    return shop.context(key, f"{key}={text}")


@way
def _template_that_fills_the_window(shop: Workshop) -> Case:
    key = "distillation.context_distillation.teacher_prefix_template"
    return shop.context(key, f"{key}={{problem}} " + "and so on " * shop.rng.randrange(60, 4000))


@way
def _bad_chat_template(shop: Workshop) -> Case:
    model = shop.model()
    canary = shop.root / CANARY
    text = shop.rng.choice(
        [
            "{% for message in messages %}",
            "{{ messages + 1 }}",
            "{{ 1 / 0 }}",
            "{{ nothing.at.all }}",
            "{{ messages[7]['content'] }}",
            "{{ raise_exception('no') }}",
            "{% for i in range(1000000000) %}x{% endfor %}",
            "{% include 'other' %}",
            "{{ ''.__class__.__mro__[1].__subclasses__() }}",
            "{{ messages.__class__.__init__.__globals__ }}",
            f"{{{{ cycler.__init__.__globals__.os.system('touch {canary}') }}}}",
            "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
            "{{ 'x' | nofilter }}",
            "{{ messages | sum }}",
            "{{ '%d' % 'a' }}",
            "{% set messages = 3 %}{% for m in messages %}{% endfor %}",
        ]
    )
    where = shop.rng.choice(["chat_template.jinja", "tokenizer_config.json"])
    (model / "chat_template.jinja").unlink(missing_ok=True)
    if where == "chat_template.jinja":
        (model / where).write_text(text)
    else:
        settings = json.loads((model / where).read_text())
        (model / where).write_text(json.dumps({**settings, "chat_template": text}))
    return shop.case("chat template", f"policy.model_name={model}", detail=f"{where}: {text}")


@way
def _bad_chat_template_kwargs(shop: Workshop) -> Case:
    kwargs = shop.rng.choice(
        [
            "{tokenize: true}",
            "{add_generation_prompt: false}",
            "{continue_final_message: true}",
            "{conversation: []}",
            "{chat_template: '{{ 1 / 0 }}'}",
            "{chat_template: 3}",
            "{messages: 3}",
            "{tools: 3}",
            "{self: 3}",
        ]
    )
    key = "policy.tokenizer.chat_template_kwargs"
    return shop.case(key, f"{key}={kwargs}")
