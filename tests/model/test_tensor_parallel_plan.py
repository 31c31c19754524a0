"""Check of a tensor-parallel plan: every module has one correct style, in every layer."""

from __future__ import annotations

import pytest

from distill.errors import UserError
from distill.model.tensor_parallel import check_plan
from tests.helpers import tiny_config


def _own_plan(change: dict[str, str | None] | None = None) -> dict[str, str]:
    """Return Qwen3's plan with the entries of ``change`` replaced, or removed (None)."""
    plan = dict(tiny_config("qwen3", True).base_model_tp_plan) | (change or {})
    return {pattern: style for pattern, style in plan.items() if style is not None}


_COMPLETE_MLP: dict[str, str | None] = {f"layers.*.mlp.{name}_proj": None for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("plan", "value", "part"),
    [
        ({"model.layers.*.mlp.up_proj": "colwise"}, "model.layers.*.mlp.up_proj", "qwen3"),
        ({"layers.*.mlp": "colwise"}, "layers.*.mlp", "qwen3"),
        ({"layers.*.mlp.up_proj": "sequence"}, "sequence", "colwise, rowwise"),
        (_own_plan({"layers.*.self_attn.k_proj": None}), "layers.*.self_attn.k_proj", "k_proj: colwise"),
        (_own_plan({"layers.*.self_attn.o_proj": "colwise"}), "layers.*.self_attn.o_proj", "o_proj: rowwise"),
        (_own_plan({"layers.*.self_attn.q_norm": None}), "layers.*.self_attn.q_norm", "q_norm: replicated_with_grad"),
        (
            _own_plan(_COMPLETE_MLP) | {"layers.*.mlp.down_proj": "rowwise"},
            "layers.*.mlp.gate_proj",
            "gate_proj: colwise",
        ),
        (
            _own_plan({"layers.*.input_layernorm": "replicated_with_grad_allreduce"}),
            "layers.*.input_layernorm",
            "entry layers.*.input_layernorm",
        ),
        # The first entry for a module counts, so each layer and each entry is checked.
        ({"layers.1.self_attn.o_proj": "colwise"} | _own_plan(), "layers.1.self_attn.o_proj", "rowwise"),
        (_own_plan() | {"layers.1.self_attn.o_proj": "colwise"}, "layers.1.self_attn.o_proj", "rowwise"),
        (_own_plan() | {"layers.2.self_attn.o_proj": "rowwise"}, "layers.2.self_attn.o_proj", "no module"),
        (
            _own_plan(_COMPLETE_MLP) | {"layers.1.mlp.up_proj": "colwise", "layers.1.mlp.gate_proj": "colwise"},
            "layers.1.mlp.down_proj",
            "down_proj: rowwise",
        ),
        (_own_plan({"layers.*.mlp": "replicated_with_grad_allreduce"}), "layers.*.mlp", "entry layers.*.mlp"),
        (_own_plan({"norm": "replicated_with_grad_allreduce"}), "norm", "entry norm"),
        (_own_plan({"lm_head": "rowwise"}), "lm_head", "lm_head: colwise"),
        (_own_plan({"embed_tokens": "replicated_with_grad_allreduce"}), "embed_tokens", "embed_tokens: rowwise"),
    ],
)
def test_an_incorrect_tensor_parallel_plan_is_refused(plan: dict[str, str], value: str, part: str) -> None:
    with pytest.raises(UserError) as refused:
        check_plan(tiny_config("qwen3", True), plan, "a model")
    assert refused.value.key == "policy.dtensor_cfg.custom_parallel_plan"
    assert refused.value.value == value
    assert part in str(refused.value)


def test_a_tensor_parallel_plan_may_leave_a_block_unsplit() -> None:
    for family in ("llama", "qwen2", "qwen3", "gemma3_text"):
        assert check_plan(tiny_config(family, True), None, "a model")["layers.*.self_attn.q_proj"] == "colwise"
    config = tiny_config("qwen3", True)
    assert not [name for name in check_plan(config, _own_plan(_COMPLETE_MLP), "a model") if ".mlp." in name]
    by_layer = {p.replace("*", str(i)): s for p, s in _own_plan().items() for i in range(2)}
    check_plan(config, by_layer, "a model")
    one_layer = {p.replace("*", "1"): style for p, style in _own_plan().items()}
    del one_layer["embed_tokens"]
    assert check_plan(config, one_layer | {"embed_tokens": "rowwise", "lm_head": "colwise"}, "a model") == one_layer


STYLES = ("colwise", "rowwise", "replicated_with_grad_allreduce")


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3_text"])
@pytest.mark.parametrize("transformers_plan", [True, False])
def test_every_module_has_exactly_one_accepted_style(family: str, transformers_plan: bool) -> None:
    """Of all plans with one changed or removed entry, none passes, even without a plan of the model class."""
    config = tiny_config(family, True)
    plan = check_plan(config, None, "a model")
    if not transformers_plan:
        config.base_model_tp_plan = None
    assert check_plan(config, plan, "a model") == plan
    others = {f"layers.*.{name}_layernorm" for name in ("input", "post_attention")} | {"norm", "layers.*.mlp.act_fn"}
    for pattern in [*plan, *others]:
        for style in STYLES:
            if plan.get(pattern) != style:
                with pytest.raises(UserError) as refused:
                    check_plan(config, plan | {pattern: style}, "a model")
                assert (refused.value.key, refused.value.value) == ("policy.dtensor_cfg.custom_parallel_plan", pattern)
        if pattern in plan:
            with pytest.raises(UserError) as refused:
                check_plan(config, {p: style for p, style in plan.items() if p != pattern}, "a model")
            assert refused.value.value == pattern
