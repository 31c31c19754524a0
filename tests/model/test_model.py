"""Sharded models: loading, packed forward, offload to host memory, tensor-parallel plans."""

from __future__ import annotations

import json
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
from distill.config import SchedulerStage
from distill.distributed.world import World
from distill.errors import RunFailed, UserError
from distill.metrics.step import Metrics
from distill.model import hf_config, hf_files, hf_load
from distill.model.host_offload import FrozenOffload, OptimizerOffload
from distill.model.learning_rate import build_scheduler
from distill.model.sharded import ShardedLM, Sharding, load_sharded
from distill.model.student import Student
from distill.model.teacher import ShardedTeacher
from distill.model.teacher_check import plain_logits, verify_teacher
from distill.model.weights import GatheredWeights
from tests.harness import config_for, fixed_rollouts
from tests.helpers import run_ranks, save_tiny_model

SEQUENCES = [((5, 6, 7), tuple(range(8, 30))), ((11,), (13, 14, 15, 16)), ((1, 2), (3,))]
SHAPES = [("llama", False), ("qwen3", True), ("qwen2", False), ("gemma3_text", True)]
_BIG = dict(vocab=20_000, hidden=1024, layers=4)


def _on_two_ranks(root: str) -> dict[str, Any]:
    """Return measurements on sharded models: logits, weights, verification, peak memory."""
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
    found["verification"] = _verifications(f"{root}/qwen3", world)
    found["rows alive"] = _rows_alive(f"{root}/qwen3", world)
    found["memory"] = _peak_while_loading(f"{root}/big", world)
    world.close()
    return found


def _load(
    files: hf_files.ModelFiles, world: World, dtype: torch.dtype, trainable: bool = False, reshard: bool = True
) -> ShardedLM:
    sharding = Sharding(world.shard_mesh, reshard_after_forward=reshard)
    return load_sharded(files, "policy.model_name", world, sharding, dtype, dtype, trainable)


def _gathered_after_a_forward(folder: str, world: World) -> tuple[int, int]:
    """Return the number of gathered weights after a forward without backward, and after ``reshard_all``."""
    files = hf_files.find_model(folder, "policy.model_name")
    model = _load(files, world, torch.float32, trainable=True, reshard=False)

    def gathered() -> int:
        return sum(not isinstance(parameter, DTensor) for _, parameter in model.named_hf_parameters())

    with torch.no_grad():
        model(view_of(SEQUENCES), lambda hidden, head: hidden)
    before = gathered()
    model.reshard_all()
    return before, gathered()


def _verifications(folder: str, world: World) -> tuple[float, float, str]:
    """Return the differences of a correct teacher at temperatures 1 and 1e-6, and the error of a wrong teacher."""
    config = config_for(Path(folder), Path(folder), "distillation.allow_degenerate=true", ranks=2)
    teacher = ShardedTeacher(config, hf_files.find_model(folder, "teacher.model_name"), world, 384)
    sequences = [tuple(range(40)), tuple(range(50, 90))]
    right = verify_teacher(teacher, sequences)
    teacher.temperature = 1e-6
    cold = verify_teacher(teacher, sequences)
    teacher.temperature = 1.0
    teacher.offload()
    with torch.no_grad():
        weight = teacher.model.causal_lm.model.layers[1].self_attn.k_norm.weight
        weight.to_local().mul_(1.05)
    try:
        verify_teacher(teacher, sequences)
    except RunFailed as error:
        return right, cold, str(error)
    return right, cold, ""


def _rows_alive(folder: str, world: World) -> list[int]:
    """Return the number of hidden rows and heads before training and after it."""
    settings = ("distillation.topk_logits_k=0", "distillation.allow_degenerate=true")
    config = config_for(Path(folder), Path(folder), *settings, ranks=2)
    files = hf_files.find_model(folder, "teacher.model_name")
    teacher, student = ShardedTeacher(config, files, world, 384), Student(config, files, world, 384, (3,))
    packing = PackingConfig(4, sequences=1, tokens=None)
    batches = plan(fixed_rollouts(4), world.layout, packing, seed=0, step=0)
    with teacher.on_device():
        targets = [[teacher.targets(micro_batch) for micro_batch in batch] for batch in batches]
    parts = (part for of_batch in targets for rows in of_batch for part in vars(rows).values())
    made = {id(part): weakref.ref(part) for part in parts if isinstance(part, torch.Tensor)}

    def alive() -> int:
        return sum(tensor() is not None for tensor in made.values())

    counts = [alive()]
    for batch in batches:
        student.train(batch, targets.pop(0), Metrics())
    return [*counts, alive()]


def _peak_while_loading(folder: str, world: World) -> tuple[int, int]:
    """Return the peak bytes that loading added to this process, and the complete model's bytes."""
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
    """Return anonymous memory in bytes; pages of mapped files belong to the page cache."""
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
def test_sharded_packed_forward_equals_the_plain_model(root, seen, family) -> None:
    plain = AutoModelForCausalLM.from_pretrained(root / family, dtype=torch.float32, attn_implementation="eager")
    rows = []
    with torch.no_grad():
        for prefix, response in SEQUENCES:
            rows.append(plain(input_ids=torch.tensor([prefix + response])).logits[0, len(prefix) - 1 : -1])
    for rank in seen:
        assert (rank[family][0] - torch.cat(rows)).abs().max() < 1e-4
        complete = dict(plain.named_parameters())
        assert rank[family][1].keys() == complete.keys()
        assert all(torch.equal(tensor, complete[name]) for name, tensor in rank[family][1].items())


@pytest.mark.slow
def test_loading_never_needs_the_memory_of_a_complete_model(seen) -> None:
    for rank in seen:
        peak, complete = rank["memory"]
        # Half of the model, one tensor being read (half of the embedding: 1/6 of the model), the allocator's rounding.
        assert peak < 0.7 * complete, f"loading took {peak / complete:.2f} of the complete model"


@pytest.mark.slow
def test_reshard_all_frees_the_gathered_weights_of_every_layer(seen) -> None:
    for rank in seen:
        before, after = rank["gathered"]
        assert before > 20 and after == 0, (before, after)


@pytest.mark.slow
def test_verify_teacher_accepts_a_correct_teacher_and_rejects_a_wrong_one(seen) -> None:
    for rank in seen:
        right, cold, message = rank["verification"]
        assert right < 1e-5 and cold > 1e-3
        assert "0.001" in message


@pytest.mark.slow
def test_the_teachers_hidden_rows_and_head_are_freed_after_the_last_batch(seen) -> None:
    """Two micro-batches per rank have two tensors of hidden rows, and share a head."""
    for rank in seen:
        assert rank["rows alive"] == [3, 0]


def test_plain_logits_equal_transformers_logits(root) -> None:
    for family in ("llama", "qwen3", "gemma3_text"):
        files = hf_files.find_model(str(root / family), "policy.model_name")
        config = hf_config.model_config(files, "policy.model_name")
        sequences = [(1, 2, 3, 4), (9, 8, 7, 6)]
        streamed = plain_logits(files, config, sequences, torch.float32, torch.device("cpu"))
        plain = AutoModelForCausalLM.from_pretrained(root / family, dtype=torch.float32, attn_implementation="eager")
        with torch.no_grad():
            assert torch.equal(streamed, plain(input_ids=torch.tensor(sequences)).logits)


def _refusal(folder: Path, **config: Any) -> UserError:
    (folder / "config.json").write_text(json.dumps(config))
    save_file({"w": torch.zeros(1)}, folder / "model.safetensors")
    with pytest.raises(UserError) as refused:
        hf_config.model_config(hf_files.find_model(str(folder), "policy.model_name"), "policy.model_name")
    return refused.value


@pytest.mark.parametrize(
    ("family", "named"),
    [
        ("gpt2", "gpt2"),
        ("gemma3", "gemma3"),  # its language model is a part of a vision-language model
        ("qwen3_moe", "qwen3_moe, a mixture of experts"),
        ("mixtral", "mixtral, a mixture of experts"),
        ("deepseek_v3", "deepseek_v3, a mixture of experts"),
    ],
)
def test_an_unsupported_family_is_refused_by_name(tmp_path, family, named) -> None:
    assert named in str(_refusal(tmp_path, model_type=family))


@pytest.mark.parametrize(
    ("setting", "value"),
    [("attn_logit_softcapping", 50.0), ("final_logit_softcapping", 30.0), ("use_bidirectional_attention", True)],
)
def test_a_setting_that_packed_attention_ignores_is_refused_by_name(tmp_path, setting, value) -> None:
    message = str(_refusal(tmp_path, model_type="gemma3_text", **{setting: value}))
    assert f"policy.model_name={tmp_path}" in message and f"{setting}={value}" in message


def test_restore_buffers_changes_no_weights_and_no_random_state(root) -> None:
    """Gemma's scaled embedding has a buffer and a weight, and transformers would initialise both."""
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
    expected = dict(AutoModelForCausalLM.from_pretrained(root / "gemma3_text", dtype=torch.float32).named_buffers())
    restored = dict(model.named_buffers())
    assert (
        restored.keys() == expected.keys() and len(expected) == 5
    )  # local and global frequencies, twice, and the scale
    assert all(torch.equal(buffer, expected[name]) for name, buffer in restored.items())


def test_a_folder_with_only_pickled_weights_is_refused(tmp_path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UserError, match="safetensors"):
        hf_files.find_model(str(tmp_path), "policy.model_name")


def test_frozen_offload_frees_memory_and_restores_bit_exactly() -> None:
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


def _train_two_parameters(offload: bool) -> tuple[list[Tensor], list[int]]:
    """Train two parameters for four steps; return them, their moments and the released bytes.

    The second parameter gets gradients from the third step on. ``offload``: release the moments between steps.
    """
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.nn.Parameter(torch.randn(n, 30, generator=generator)) for n in (100, 7))
    optimizer = torch.optim.AdamW([first, second], lr=0.1)
    host, released = OptimizerOffload(optimizer), []
    for step in range(4):
        if offload:
            host.release()
            host.release()
            moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
            assert all(t.untyped_storage().nbytes() == 0 for t in moments) and len(moments) == (0, 2, 2, 4)[step]
            released.append(host.nbytes)
            host.restore()
            host.restore()
            host.wait()
        first.grad = torch.randn(first.shape, generator=generator)
        second.grad = torch.randn(second.shape, generator=generator)
        if step < 2:
            second.grad = None
        optimizer.step()
    states = [optimizer.state[parameter][name] for parameter in (first, second) for name in ("exp_avg", "exp_avg_sq")]
    return [first, second, *states], released


def test_training_with_offloaded_moments_is_bit_exact() -> None:
    """Includes moments that are created while other moments are released."""
    (kept, _), (offloaded, released) = _train_two_parameters(offload=False), _train_two_parameters(offload=True)
    assert all(torch.equal(a, b) for a, b in zip(kept, offloaded, strict=True))
    assert released == [0, 8 * 3000, 8 * 3000, 8 * 3210]


def test_moments_created_after_a_release_are_released_next() -> None:
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


def test_learning_rate_warms_up_linearly_over_ten_steps() -> None:
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


def test_without_stages_the_learning_rate_is_constant() -> None:
    for entries in ((), (SchedulerStage(),)):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=2e-5)
        assert build_scheduler(optimizer, entries).get_last_lr() == [2e-5]


def test_attention_is_causal_within_each_sequence() -> None:
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
