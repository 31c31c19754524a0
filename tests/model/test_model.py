"""Loading without a whole model in memory, the packed path against the plain one, weights in host memory."""

from __future__ import annotations

import json
import re
import threading
import time
import weakref
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM

from distill.batching.plan import PackingConfig, plan, view_of
from distill.distributed.world import World
from distill.errors import UserError
from distill.metrics.step import Metrics
from distill.model import hf_config, hf_files, hf_load
from distill.model.host_offload import FrozenOffload, OptimizerOffload
from distill.model.sharded import ShardedLM, Sharding, load_sharded
from distill.model.student import Student, build_scheduler
from distill.model.teacher import ShardedTeacher
from distill.model.teacher_check import plain_logits, verify_teacher
from distill.model.tensor_parallel import check_plan
from distill.model.weights import GatheredWeights
from tests.harness import config_for, fixed_rollouts
from tests.helpers import run_ranks, save_tiny_model, tiny_config

SEQUENCES = [((5, 6, 7), tuple(range(8, 30))), ((11,), (13, 14, 15, 16)), ((1, 2), (3,))]
SHAPES = [("llama", False), ("qwen3", True), ("qwen2", False), ("gemma3_text", True)]
_BIG = dict(vocab=20_000, hidden=1024, layers=4)


def _on_two_ranks(root: str) -> dict[str, Any]:
    """What needs a sharded model, in one world: logits, gathered weights, proof, memory at its peak."""
    world = World()
    world.build_mesh("cpu", tp=1, cp=1)
    found: dict[str, Any] = {}
    for family, tied in SHAPES:
        folder = f"{root}/{family}"
        files = hf_files.find_model(folder, "policy.model_name")
        model = _load(files, world, torch.float32)
        view = view_of(SEQUENCES)
        with torch.no_grad():
            logits = model(view, lambda hidden, head: hidden @ head.t())
        found[family] = (
            logits,
            {
                n: t.clone()
                for n, t in GatheredWeights(model.named_hf_parameters(), torch.float32, 4096, world.replica_mesh)
            },
        )
        found[f"{family} tied"] = model.causal_lm.lm_head.weight is model.causal_lm.model.embed_tokens.weight
        assert found[f"{family} tied"] == tied
    found["gathered"] = _gathered_after_a_forward(f"{root}/qwen3", world)
    found["proof"] = _proofs(f"{root}/qwen3", world)
    found["rows alive"] = _rows_alive(f"{root}/qwen3", world)
    found["memory"] = _peak_while_loading(f"{root}/big", world)
    world.close()
    return found


def _load(
    files: hf_files.ModelFiles, world: World, dtype: torch.dtype, trainable: bool = False, again: bool = True
) -> ShardedLM:
    sharding = Sharding(world.shard_mesh, reshard_after_forward=again)
    return load_sharded(files, "policy.model_name", world, sharding, dtype, dtype, trainable)


def _gathered_after_a_forward(folder: str, world: World) -> tuple[int, int]:
    """How many weights are whole on a rank after a forward without backward, and after they were let go."""
    files = hf_files.find_model(folder, "policy.model_name")
    model = _load(files, world, torch.float32, trainable=True, again=False)

    def gathered() -> int:
        return sum(not isinstance(parameter, DTensor) for _, parameter in model.named_hf_parameters())

    with torch.no_grad():
        model(view_of(SEQUENCES), lambda hidden, head: hidden)
    before = gathered()
    model.reshard_all()
    return before, gathered()


def _proofs(folder: str, world: World) -> tuple[float, str, bool]:
    config = config_for(Path(folder), Path(folder), "distillation.allow_degenerate=true", ranks=2)
    teacher = ShardedTeacher(config, hf_files.find_model(folder, "teacher.model_name"), world, 384)
    sequences = [tuple(range(40)), tuple(range(50, 90))]
    right = verify_teacher(teacher, sequences)
    teacher.offload()
    with torch.no_grad():
        weight = teacher.model.causal_lm.model.layers[1].self_attn.k_norm.weight
        weight.to_local().mul_(1.05)
    try:
        verify_teacher(teacher, sequences)
    except RuntimeError as error:
        return right, str(error), True
    return right, "", False


def _rows_alive(folder: str, world: World) -> list[int]:
    """How many of the teacher's hidden rows and heads live once they are made, after the training, after the step."""
    settings = ("distillation.topk_logits_k=0", "distillation.allow_degenerate=true")
    config = config_for(Path(folder), Path(folder), *settings, ranks=2)
    files = hf_files.find_model(folder, "teacher.model_name")
    teacher, student = ShardedTeacher(config, files, world, 384), Student(config, files, world, 384, (3,))
    packing = PackingConfig(4, sequences=1, tokens=None)
    batches = plan(fixed_rollouts(4), world.layout, packing, seed=0, step=0)
    targets = [[teacher.targets(micro_batch) for micro_batch in batch] for batch in batches]
    made = {id(t): weakref.ref(t) for said in targets for rows in said for t in vars(rows).values()}

    def alive() -> int:
        return sum(tensor() is not None for tensor in made.values())

    counts = [alive()]
    for batch in batches:
        student.train(batch, targets.pop(0), Metrics())
    counts.append(alive())
    teacher.after_step(student)
    return [*counts, alive()]


def _peak_while_loading(folder: str, world: World) -> tuple[int, int]:
    """Bytes that loading added to this process's own memory at its highest, and bytes of the whole model."""
    files = hf_files.find_model(folder, "policy.model_name")
    before, highest, stop = _own_memory(), 0, threading.Event()

    def watch() -> None:
        nonlocal highest
        while not stop.is_set():
            highest = max(highest, _own_memory())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    model = _load(files, world, torch.float32)
    stop.set()
    watcher.join()
    return highest - before, sum(4 * p.numel() for _, p in model.named_hf_parameters())


def _own_memory() -> int:
    """Anonymous memory in bytes: pages of mapped files are the page cache's."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssAnon"))


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    for family, tied in SHAPES:
        save_tiny_model(root / family, family, tied, seed=1)
    save_tiny_model(root / "big", "llama", False, **_BIG)
    return root


@pytest.fixture(scope="module")
def seen(root: Path) -> list[dict[str, Any]]:
    return run_ranks(2, _on_two_ranks, str(root))


@pytest.mark.slow
@pytest.mark.parametrize("family", [family for family, _ in SHAPES])
def test_sharded_and_packed_is_the_plain_model(root, seen, family) -> None:
    plain = AutoModelForCausalLM.from_pretrained(root / family, dtype=torch.float32, attn_implementation="eager")
    rows = []
    with torch.no_grad():
        for prefix, response in SEQUENCES:
            rows.append(plain(input_ids=torch.tensor([prefix + response])).logits[0, len(prefix) - 1 : -1])
    for rank in seen:
        assert (rank[family][0] - torch.cat(rows)).abs().max() < 1e-4
        whole = dict(plain.named_parameters())
        assert rank[family][1].keys() == whole.keys()
        assert all(torch.equal(tensor, whole[name]) for name, tensor in rank[family][1].items())


@pytest.mark.slow
def test_no_rank_ever_holds_the_whole_model_while_loading(seen) -> None:
    for rank in seen:
        peak, whole = rank["memory"]
        # Its half, one tensor on its way (the embedding's half: 1/6 of the model), and the allocator's rounding.
        assert peak < 0.7 * whole, f"loading took {peak / whole:.2f} of the whole model"


@pytest.mark.slow
def test_gathered_weights_are_let_go_in_every_layer(seen) -> None:
    for rank in seen:
        before, after = rank["gathered"]
        assert before > 20 and after == 0, (before, after)


@pytest.mark.slow
def test_the_proof_passes_a_right_teacher_and_catches_a_wrong_one(seen) -> None:
    for rank in seen:
        right, message, caught = rank["proof"]
        assert right < 1e-5
        assert caught and "0.001" in message


@pytest.mark.slow
def test_nothing_of_the_teachers_rows_outlives_the_step(seen) -> None:
    """The hidden rows of two micro-batches a rank, and the head that they share until ``after_step``."""
    for rank in seen:
        assert rank["rows alive"] == [3, 1, 0]


def test_the_streamed_plain_model_is_the_plain_model(root) -> None:
    for family in ("llama", "qwen3", "gemma3_text"):
        files = hf_files.find_model(str(root / family), "policy.model_name")
        config = hf_config.model_config(files, "policy.model_name")
        sequences = [(1, 2, 3, 4), (9, 8, 7, 6)]
        streamed = plain_logits(files, config, sequences, torch.float32, torch.device("cpu"))
        plain = AutoModelForCausalLM.from_pretrained(root / family, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            assert torch.equal(streamed, plain(input_ids=torch.tensor(sequences)).logits)


def _refusal(folder: Path, **config: Any) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(UserError) as refused:
        hf_config.model_config(hf_files.find_model(str(folder), "policy.model_name"), "policy.model_name")
    return str(refused.value)


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("gpt2", "gpt2"),
        ("gemma3", "gemma3"),  # its text is a part of a model that also sees
        ("qwen3_moe", "qwen3_moe, a mixture of experts"),
        ("mixtral", "mixtral, a mixture of experts"),
        ("deepseek_v3", "deepseek_v3, a mixture of experts"),
    ],
)
def test_a_family_without_a_tested_path_is_refused_by_name(tmp_path, family, named) -> None:
    assert f"is of the family {named}, which is not supported yet: choose a dense" in _refusal(
        tmp_path, model_type=family
    )


@pytest.mark.parametrize(
    ("setting", "value"),
    [("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0), ("use_bidirectional_attention", True)],
)
def test_what_the_packed_path_would_pass_over_is_refused_by_name(tmp_path, setting, value) -> None:
    said = _refusal(tmp_path, model_type="gemma3_text", **{setting: value})
    assert said == (
        f"policy.model_name={tmp_path} has {setting}={value} in its config.json, which is not supported:"
        " choose a model without it"
    )


def test_restoring_buffers_draws_no_weights_and_no_random_numbers(root) -> None:
    """Gemma's scaled embedding holds a buffer beside its weight, and transformers would initialise both."""
    config = hf_config.model_config(hf_files.find_model(str(root / "gemma3_text"), "a model"), "a model")
    model = hf_load.meta_model(config, "eager", torch.float32)
    hf_load.materialize(model, torch.device("cpu"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(7.0)
    random_state = torch.get_rng_state()
    hf_load.restore_buffers(model, torch.device("cpu"))
    assert all(bool((parameter == 7).all()) for parameter in model.parameters())
    assert torch.equal(torch.get_rng_state(), random_state)
    whole = dict(AutoModelForCausalLM.from_pretrained(root / "gemma3_text", dtype=torch.float32).named_buffers())
    restored = dict(model.named_buffers())
    assert restored.keys() == whole.keys() and len(whole) == 5  # local and global frequencies, twice, and the scale
    assert all(torch.equal(buffer, whole[name]) for name, buffer in restored.items())


def test_a_folder_with_pickled_weights_only_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="no safetensors"):
        hf_files.find_model(str(tmp_path), "policy.model_name")


def test_released_weights_take_no_memory_and_come_back_bit_for_bit() -> None:
    tensors = [torch.randn(100, 30), torch.randn(7).bfloat16()]
    views = [tensors[0][10:20], tensors[1]]
    before = [t.clone() for t in tensors]
    copy = FrozenOffload(views)
    assert copy.nbytes == 100 * 30 * 4 + 7 * 2
    copy.release()
    copy.release()
    assert all(t.untyped_storage().nbytes() == 0 for t in tensors)
    copy.restore()
    copy.restore()
    assert all(torch.equal(t, b) for t, b in zip(tensors, before, strict=True))


def _moved_sometimes(away: bool) -> tuple[list[Tensor], list[int]]:
    """Two parameters after four steps, the second's first step being the third; bytes of their moments when away."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.nn.Parameter(torch.randn(n, 30, generator=generator)) for n in (100, 7))
    optimizer = torch.optim.AdamW([first, second], lr=0.1)
    host, left = OptimizerOffload(optimizer), []
    for step in range(4):
        if away:
            host.release()
            host.release()
            moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
            assert all(t.untyped_storage().nbytes() == 0 for t in moments) and len(moments) == (0, 2, 2, 4)[step]
            left.append(host.nbytes)
            host.restore()
            host.restore()
            host.wait()
        first.grad = torch.randn(first.shape, generator=generator)
        second.grad = torch.randn(second.shape, generator=generator)
        if step < 2:
            second.grad = None
        optimizer.step()
    states = [optimizer.state[parameter][name] for parameter in (first, second) for name in ("exp_avg", "exp_avg_sq")]
    return [first, second, *states], left


def test_moments_that_were_away_between_steps_are_what_they_would_be() -> None:
    """Released they take no memory; there are none before the first step, and some that appear later."""
    (there, _), (moved, left) = _moved_sometimes(away=False), _moved_sometimes(away=True)
    assert all(torch.equal(a, b) for a, b in zip(there, moved, strict=True))
    assert left == [0, 8 * 3000, 8 * 3000, 8 * 3210]


def test_moments_made_while_others_are_away_go_with_the_next_release() -> None:
    parameters = [torch.nn.Parameter(torch.randn(5, 3)) for _ in range(2)]
    optimizer = torch.optim.AdamW(parameters)
    host = OptimizerOffload(optimizer)
    for parameter in parameters:
        host.release()
        for other in parameters:
            other.grad = None
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
    host.release()
    assert host.nbytes == 2 * 8 * 15
    assert all(optimizer.state[p]["exp_avg"].untyped_storage().nbytes() == 0 for p in parameters)
    host.restore()
    host.wait()
    assert all(torch.equal(optimizer.state[p]["exp_avg"], torch.full((5, 3), 0.1)) for p in parameters)


def test_the_learning_rate_warms_up_as_in_the_reference() -> None:
    config = config_for(Path("a"), Path("b"))
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.AdamW([parameter], lr=2e-5)
    scheduler = build_scheduler(optimizer, config.policy.scheduler)
    rates = []
    for _ in range(13):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    assert rates == pytest.approx([2e-5 * min(1.0, 0.1 + 0.09 * step) for step in range(13)])


def test_attention_keeps_to_its_own_sequence_and_its_past() -> None:
    from distill.model.attention import packed_attention

    torch.manual_seed(0)
    q, k, v = torch.randn(1, 4, 9, 8), torch.randn(1, 2, 9, 8), torch.randn(1, 2, 9, 8)

    def attend(bounds: tuple[int, ...], **more: Any) -> Tensor:
        return packed_attention(torch.nn.Module(), q, k, v, None, packed_bounds=bounds, **more)[0]

    for bounds, window in (((0, 4, 9), None), ((0, 9), None), ((0, 1, 2, 9), 3)):
        got = attend(bounds, scaling=0.3, sliding_window=window)
        expected = torch.zeros(1, 9, 4, 8)
        for start, stop in pairwise(bounds):
            for t in range(start, stop):
                first = start if window is None else max(start, t - window + 1)
                for head in range(4):
                    scores = 0.3 * k[0, head // 2, first : t + 1] @ q[0, head, t]
                    expected[0, t, head] = scores.softmax(0) @ v[0, head // 2, first : t + 1]
        assert (got - expected).abs().max() < 1e-5


def _own_plan(change: dict[str, str | None] | None = None) -> dict[str, str]:
    """Qwen3's own plan with some entries set otherwise, or left out (None)."""
    plan = dict(tiny_config("qwen3", True).base_model_tp_plan) | (change or {})
    return {pattern: style for pattern, style in plan.items() if style is not None}


_WHOLE_MLP: dict[str, str | None] = {f"layers.*.mlp.{name}_proj": None for name in ("gate", "up", "down")}


@pytest.mark.parametrize(
    ("plan", "sentence"),
    [
        ({"model.layers.*.mlp.up_proj": "colwise"}, "fits nothing of a qwen3"),
        ({"layers.*.mlp": "colwise"}, "fits no linear layer of a qwen3"),
        ({"layers.*.mlp.up_proj": "sequence"}, "has the style sequence for layers.*.mlp.up_proj"),
        (_own_plan({"layers.*.self_attn.k_proj": None}), "says nothing of layers.*.self_attn.k_proj: make it colwise"),
        (_own_plan({"layers.*.self_attn.o_proj": "colwise"}), "layers.*.self_attn.o_proj: make it rowwise"),
        (_own_plan({"layers.*.self_attn.q_norm": None}), "layers.*.self_attn.q_norm: make it replicated_with_grad"),
        (_own_plan(_WHOLE_MLP) | {"layers.*.mlp.down_proj": "rowwise"}, "layers.*.mlp.gate_proj: make it colwise"),
        (
            _own_plan({"layers.*.input_layernorm": "replicated_with_grad_allreduce"}),
            "leaves layers.* whole, so what it says of layers.*.input_layernorm adds up whole gradients",
        ),
    ],
)
def test_a_plan_that_would_split_a_model_wrongly_is_refused(plan: dict[str, str], sentence: str) -> None:
    with pytest.raises(UserError, match=re.escape(sentence)):
        check_plan(tiny_config("qwen3", True), plan, "a model")


def test_a_plan_that_splits_as_the_family_does_or_leaves_a_block_whole_is_taken() -> None:
    for family in ("llama", "qwen2", "qwen3", "gemma3_text"):
        assert check_plan(tiny_config(family, True), None, "a model")["layers.*.self_attn.q_proj"] == "colwise"
    config = tiny_config("qwen3", True)
    assert not [name for name in check_plan(config, _own_plan(_WHOLE_MLP), "a model") if ".mlp." in name]
    by_layer = {p.replace("*", str(i)): s for p, s in _own_plan().items() for i in range(2)}
    check_plan(config, by_layer, "a model")
    config.base_model_tp_plan = None
    with pytest.raises(UserError, match=r"k_proj: make it colwise or rowwise"):
        check_plan(config, _own_plan({"layers.*.self_attn.k_proj": None}), "a model")
    check_plan(config, _own_plan(), "a model")
