"""vLLM on CPU: its responses equal those of transformers and the trainer, and every fault is detected.

Each fixture starts its ranks once and runs all scenarios there, because importing vLLM takes long; the tests check the
results.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, GenerationConfig

from distill.rollout.requests import Request, Segment
from distill.rollout.sync import FLOAT32_LIMIT
from distill.rollout.vllm_config import ARCHITECTURES
from distill.types import Rollout, Sampling
from tests.helpers import free_port, run_ranks, save_tiny_model
from tests.rollout import segment_scenarios as scenarios
from tests.rollout import speculation_scenarios as speculation
from tests.rollout.vllm_scenarios import (
    CYCLES,
    KEY,
    NUCLEUS,
    OMITTED,
    PROMPTS,
    SAMPLED,
    SEGMENTS,
    VALID,
    WINDOW,
    difference,
    ids_of,
    on_gpu,
    on_two_ranks,
    one_rank,
)
from tests.variants import ENGINE_VARIANTS, save_variant

pytestmark = pytest.mark.slow


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_engine_on_a_gpu_sleeps_loads_weights_in_place_and_generates(tmp_path: Path) -> None:
    (seen,) = run_ranks(1, on_gpu, save_tiny_model(tmp_path / "m", "qwen3", True, seed=1))
    assert seen["loads by"] == "load_weights" and "asleep" in seen["asleep"]
    assert seen["report"].tensors > 20 and seen["probe"] != seen["second probe"]
    test_responses_end_at_a_stop_token_or_the_limit_and_keep_their_order(seen)
    assert seen["cancelled"] == ([], 3, False)
    assert seen["residual"] > 0
    assert seen["overwritten"] == ("model.norm.weight", "memory")


def _skip_on_gpu() -> None:
    if torch.cuda.is_available():
        pytest.skip("compares bits and memory formats of vLLM on CPU; python -m scripts.accept checks vLLM on a GPU")


@pytest.fixture(scope="module")
def speculating(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the model that generates with speculation."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "m", "qwen3", True, seed=3)


def _save_variants(folder: Path, ranks: int) -> dict[str, Path]:
    """Save the checkpoints that engines of ``ranks`` ranks load; return their folders by name."""
    named = {name: variant for name, (variant, of_engine) in ENGINE_VARIANTS.items() if of_engine == ranks}
    return {name: save_variant(folder / str(i), variant) for i, (name, variant) in enumerate(named.items())}


@pytest.fixture(scope="module")
def alone(speculating: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    _skip_on_gpu()
    models = tmp_path_factory.mktemp("models")
    folder = save_tiny_model(models / "m", "qwen3", True, seed=1)
    GenerationConfig(eos_token_id=list(range(1, VALID, 2))).save_pretrained(
        folder
    )  # the recipe's stop ids count instead
    soaked = save_tiny_model(models / "soaked", "llama", True, vocab=4096, hidden=256)
    variants = _save_variants(models, 1)
    ports = [free_port() for _ in range(2 + len(variants))]
    return dict(run_ranks(1, one_rank, folder, soaked, speculating, variants, ports)[0])


def test_creating_the_engine_keeps_the_global_random_states(alone) -> None:
    before, after = alone["random states"]
    assert before == after


def test_a_sleeping_engine_neither_generates_nor_syncs(alone) -> None:
    assert all("asleep" in error for error in alone["asleep"].values())


def test_both_engines_give_the_same_greedy_responses_and_log_probs(alone) -> None:
    ours, plain = alone["greedy"]
    assert ids_of(ours) == ids_of(plain)
    assert difference(ours, plain) < 1e-4
    assert max(abs(a - b) for a, b in zip(*alone["probe"], strict=True)) < 1e-4


def test_log_probs_are_those_of_the_sampled_distribution(alone) -> None:
    _check_logprobs(alone["folder"], alone["sampled"][0], SAMPLED)
    _check_logprobs(alone["folder"], alone["nucleus"], NUCLEUS)


def _check_logprobs(folder: Path, rollouts: list[Rollout], sampling: Sampling, valid: int = VALID) -> None:
    """Check log-probs against a forward pass of transformers over prompt and response."""
    requests = [Request(r.prompt, r.response_index, 0, len(r.response_ids), True) for r in rollouts]
    segments = [
        Segment(request, r.response_ids, r.logprobs, r.finish) for request, r in zip(requests, rollouts, strict=True)
    ]
    scenarios.check_logprobs(folder, segments, sampling, valid)


def test_responses_repeat_and_do_not_depend_on_the_batch(alone) -> None:
    first, second = alone["sampled"]
    assert first == second
    assert alone["separately"] == first
    assert ids_of(alone["another step"]) != ids_of(first)
    assert len({r.response_ids for r in first}) > len(PROMPTS), "responses with equal seeds"


def test_omitted_responses_are_not_requested_and_the_others_do_not_change(alone) -> None:
    kept, requests = alone["omitted"]
    assert kept == [r for r in alone["sampled"][0] if (r.prompt.prompt_id, r.response_index) not in OMITTED]
    assert requests == len(kept) == len(alone["sampled"][0]) - len(OMITTED)


def test_responses_equal_those_of_vllms_own_loop(alone) -> None:
    ours = [(list(r.response_ids), list(r.logprobs), r.finish) for r in alone["sampled"][0]]
    assert ours == alone["plain loop"]


def test_some_responses_have_log_probs_if_few_are_needed(alone) -> None:
    """The log-probs that are computed are those of the same responses with all log-probs."""
    ours, plain = alone["some log-probs"]
    assert ids_of(ours) == ids_of(alone["sampled"][0])
    kept = [bool(r.logprobs) for r in ours]
    assert kept == [bool(r.logprobs) for r in plain] and 0 < sum(kept) < len(kept)
    assert all(r.logprobs in ((), full.logprobs) for r, full in zip(ours, alone["sampled"][0], strict=True))


def test_cancelled_generation_returns_no_rollouts_and_removes_the_requests(alone) -> None:
    assert alone["cancelled"] == ([], 3, False)


def test_more_prompts_than_fit_into_a_step_give_the_same_responses(alone) -> None:
    together, separately = alone["many"]
    assert 2 * WINDOW < 8 * 40 and together == separately


def test_responses_share_the_cache_of_their_prompt_until_the_next_sync(alone) -> None:
    block = 32
    assert alone["cached"] == [[0, block], [0]]


def test_responses_end_at_a_stop_token_or_the_limit_and_keep_their_order(alone) -> None:
    rollouts = alone["sampled"][0]
    assert [(r.prompt.prompt_id, r.response_index) for r in rollouts] == [(p, a) for p in range(4) for a in range(3)]
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        assert (r.response_ids[-1] in SAMPLED.stop_token_ids) == (r.finish == "stop")
        assert r.finish == "stop" or len(r.response_ids) == 10
        assert max(r.response_ids) < VALID and r.version == 3


@pytest.fixture(params=["one rank", "two ranks", "speculation"])
def ranks(request: pytest.FixtureRequest) -> list[dict[str, Any]]:
    """Results of each rank of an engine."""
    if request.param == "two ranks":
        return list(request.getfixturevalue("qwen3")[2])
    alone = request.getfixturevalue("alone")
    return [alone["speculation"] if request.param == "speculation" else alone]


def test_a_cutoff_only_truncates_segments(ranks) -> None:
    for seen in (rank[name] for rank in ranks for name, *_ in SEGMENTS):
        scenarios.check_cut(seen)


def test_continued_segments_depend_on_input_and_seed_only(ranks) -> None:
    for rank in ranks:
        scenarios.check_continued(rank["sampled segments"])
        scenarios.check_greedy_continuation(rank["greedy segments"])


def test_log_probs_of_continued_segments_are_those_of_the_sampled_distribution(alone) -> None:
    continued = alone["sampled segments"]["continued"]
    scenarios.check_logprobs(alone["folder"], continued, scenarios.SAMPLED)


def test_ended_segments_are_reported_once_by_the_rank_that_returns_them(alone, qwen3) -> None:
    for name, *_ in SEGMENTS:
        scenarios.check_reports(alone[name])
        scenarios.check_reports(alone["speculation"][name])
        first, second = (rank[name] for rank in qwen3[2])
        assert first["called"] and second["called"], "both ranks return segments"
        scenarios.check_reports({**first, "called": first["called"] + second["called"]})
        assert (second["cutoff"].lengths, second["cutoff"].reads) == ([], 0), "only the first rank has a cutoff"


def test_a_continued_segment_uses_the_cache_of_the_tokens_before_it(alone) -> None:
    """Its first block of 32 tokens contains the prompt of 30 tokens and two generated tokens."""
    seen = alone["sampled segments"]
    cached = dict(zip([s.request.prompt.prompt_id for s in seen["continued"]], seen["after cut"], strict=True))
    assert cached == {0: 32, 2: 32, 4: 32}


def test_memory_is_checked_before_waking_and_measured_after_sleep(alone) -> None:
    assert "gpu_memory_utilization" in alone["no memory"]
    assert alone["residual"] == 5 * 2**30


def test_a_prompt_outside_window_or_vocabulary_is_refused(alone) -> None:
    refused = alone["refused"]
    assert str(WINDOW) in refused["a prompt as long as the window"]
    assert f"0..{VALID - 1}" in refused["an id of the padding"]


def test_a_sync_reports_what_changed_and_the_probe_changes(alone) -> None:
    assert alone["report"].changed == alone["report"].tensors > 20
    assert alone["second report"].changed == 1
    assert alone["second probe"] != alone["probe"][0]


@pytest.mark.parametrize(
    ("fault", "tensor"),
    [
        ("overwritten", "model.norm.weight"),
        ("half of a fused parameter missing", "model.layers.1.mlp.up_proj.weight"),
        ("norm missing", "model.norm.weight"),
        ("rows exchanged", "model.norm.weight"),
        ("key and value exchanged", KEY),
        ("head not repacked", "lm_head.weight"),
    ],
)
def test_a_wrong_weight_in_the_engines_memory_is_found(alone, fault, tensor) -> None:
    faults = alone["faults"]
    assert faults[fault] == (tensor, "repacking" if "repacked" in fault else "memory"), faults
    assert faults["none"] == faults["repaired"] == ("", "")


def test_a_stale_tensor_is_found_during_the_sync(alone) -> None:
    tensor, found_in = alone["faults"]["stale"]
    assert "norm" in tensor and found_in == "transfer"


@pytest.mark.parametrize(("fault", "message"), [("asleep", "asleep"), ("no progress", "no token"), ("nan", "finite")])
def test_a_broken_engine_raises_instead_of_generating(alone, fault, message) -> None:
    assert message in alone["faults"][fault]


def test_closing_destroys_the_process_groups_and_the_world_reports_it(alone) -> None:
    initialized, error = alone["groups after closing"]
    assert not initialized
    assert "engine" in error


@pytest.fixture(scope="module")
def pairs(speculating: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str | int, list[dict[str, Any]]]:
    """Results of the two ranks by size of the qwen3 engine, of variants of checkpoints, and with speculation."""
    _skip_on_gpu()
    models = tmp_path_factory.mktemp("models")
    folder = save_tiny_model(models / "m", "qwen3", True, seed=2)
    variants = _save_variants(models, 2)
    left = Path("/dev/shm/-tp:0-[0-1]-cpushm_0")  # left by a killed run of two ranks with vLLM's names
    created = not left.exists()
    left.touch()
    ranks = run_ranks(2, on_two_ranks, folder, speculating, variants, [free_port() for _ in range(3 + len(variants))])
    if created:
        left.unlink()
    return {name: [rank[name] for rank in ranks] for name in ranks[0]}


@pytest.fixture(scope="module")
def qwen3(pairs) -> dict[int, list[dict[str, Any]]]:
    return {tp: pairs[tp] for tp in (1, 2)}


def test_one_engine_of_two_ranks_generates_as_two_of_one(qwen3) -> None:
    (one, _), (two, same) = qwen3[1], qwen3[2]
    for name in ("greedy", "sampled"):
        assert ids_of(one[name]) == ids_of(two[name]) == ids_of(same[name])
        assert difference(one[name], two[name]) < 1e-4
    assert max(abs(a - b) for a, b in zip(one["probe"], two["probe"], strict=True)) < 1e-4


def test_the_sharded_students_responses_equal_those_of_transformers(qwen3) -> None:
    for seen, _ in qwen3.values():
        assert ids_of(seen["greedy"]) == ids_of(seen["plain"])
        assert difference(seen["greedy"], seen["plain"]) < 1e-4


@pytest.mark.parametrize("name", ENGINE_VARIANTS)
def test_log_probs_of_a_variant_equal_those_of_from_pretrained(alone, pairs, name: str) -> None:
    for rank in [alone] if ENGINE_VARIANTS[name][1] == 1 else pairs["variants"]:
        assert (rank["variants"] if rank is alone else rank)[name]["difference"] < 1e-4


@pytest.mark.parametrize("tp", [1, 2])
def test_an_engine_computes_the_log_probs_of_merged_adapters_after_each_sync(pairs, tp: int) -> None:
    for rank in (each["lora"] for each in pairs[tp]):
        assert "trainer" in rank["without adapters"]
        assert max(rank["difference"]) < FLOAT32_LIMIT and len(rank["difference"]) == 3
        base, first, second = rank["probes"]
        for other in (first, base):
            assert max(abs(a - b) for a, b in zip(second, other, strict=True)) > 0.01


def test_every_fault_is_found_also_with_merged_adapters(alone, pairs) -> None:
    for rank in pairs[1]:
        faults = dict(rank["lora"]["faults"])
        tensor, found_in = faults.pop("stale")  # the first norm in the order of the sent tensors
        assert "norm" in tensor and found_in == "transfer"
        assert faults == {name: found for name, found in alone["faults"].items() if name != "stale"}


def test_sleep_discards_only_tensors_that_waking_restores(alone, pairs) -> None:
    """Level 2 discards tensors that are neither parameters nor buffers, so each supported family must have none."""
    seen = alone["variants"] | pairs["variants"][0]
    found = {ENGINE_VARIANTS[name][0].family: variant["loose tensors"] for name, variant in seen.items()}
    assert found == {family: [] for family in ARCHITECTURES}


def test_every_response_is_returned_by_one_rank(qwen3) -> None:
    for ranks in qwen3.values():
        assert [sum(counts) for counts in zip(*(rank["own"] for rank in ranks), strict=True)] == [4, 12]


def test_the_ranks_of_an_engine_use_the_bound_of_the_first_rank(qwen3) -> None:
    bounded = [segment for rank in qwen3[2] for segment in rank["bound"]]
    assert len(bounded) == len(PROMPTS) and {len(segment.ids) for segment in bounded} == {3}


def test_different_inputs_weights_or_outputs_of_an_engines_ranks_are_found(qwen3) -> None:
    for rank in qwen3[2]:
        assert "prompts" in rank["prompts"]
        assert "sampling" in rank["sampling"]
        assert "sampling" in rank["cutoff"]
        assert "responses" in rank["responses"]
        assert rank["one rank's weights"] == ("model.norm.weight", "memory")


def test_speculation_does_not_change_the_distribution_of_responses(alone) -> None:
    seen = alone["speculation"]
    proposed, accepted = seen["drafts"]
    assert 300 < accepted < proposed - 300, "too few drafts were accepted or rejected"
    model = AutoModelForCausalLM.from_pretrained(seen["folder"], dtype=torch.float32)
    assert speculation.p_value(model, seen["counted"]) > speculation.RARE
    wrong = speculation.p_value(model, seen["all accepted"])
    assert wrong < speculation.RARE, "the test does not find a wrong distribution"


def test_log_probs_with_speculation_are_those_of_the_sampled_distribution(alone) -> None:
    """Also those of segments that were cut, and that continue them."""
    seen = alone["speculation"]
    samplings = {"sampled": speculation.SAMPLED, "nucleus": speculation.NUCLEUS}
    for name, sampling in samplings.items():
        _check_logprobs(seen["folder"], seen[name], sampling, speculation.VALID)
    for name in ("cut", "continued"):
        segments = seen["sampled segments"][name]
        scenarios.check_logprobs(seen["folder"], segments, speculation.CUT, speculation.VALID)


def test_responses_with_speculation_repeat_and_do_not_depend_on_the_batch(alone) -> None:
    seen = alone["speculation"]
    assert seen["again"] == seen["separately"] == seen["sampled"]


def test_responses_with_speculation_end_at_a_stop_token_or_the_limit(alone) -> None:
    rollouts = alone["speculation"]["sampled"]
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        assert (4 in r.response_ids) == (r.finish == "stop") and 4 not in r.response_ids[:-1]
        assert len(r.response_ids) == 40 or r.finish == "stop"


def test_greedy_responses_are_the_same_with_speculation_also_after_a_sync(alone) -> None:
    seen = alone["speculation"]
    ours, plain = seen["moved"]
    assert ids_of(ours) == ids_of(plain) != ids_of(seen["greedy"])
    model = AutoModelForCausalLM.from_pretrained(seen["folder"], dtype=torch.float32)
    for rollout in seen["greedy"]:
        prompt, ids = rollout.prompt.student_ids, rollout.response_ids
        assert tuple(speculation.logprobs_of(model, prompt, ids).argmax(1).tolist()) == ids


def test_a_late_cutoff_returns_the_same_first_tokens_with_speculation(alone) -> None:
    """A step adds up to four tokens to a response, so segments have different lengths when they are cut."""
    seen = alone["speculation"]
    cut = [seen["cut"], *seen["cut late"]]
    assert len({sum(len(segment.ids) for segment in segments) for segments in cut}) == len(cut), "cut at other times"
    for segments in zip(*cut, strict=True):
        assert min(len(segment.ids) for segment in segments) >= 7
        assert len({(segment.ids[:7], segment.logprobs[:7]) for segment in segments}) == 1
        assert len({len(segment.ids) for segment in segments}) > 1 or segments[0].finish == "length"


def test_an_engine_of_two_ranks_speculates_as_one_rank(alone, pairs) -> None:
    one = alone["speculation"]
    for name in ("greedy", "sampled"):
        found = [rollout for rank in pairs["speculation"] for rollout in rank[name]]
        assert ids_of(sorted(found, key=lambda r: (r.prompt.prompt_id, r.response_index))) == ids_of(one[name])
    cut = [segment for rank in pairs["speculation"] for segment in rank["cut"]]
    complete = one["sampled segments"]["complete"]
    assert len(cut) == len(complete) and "cut" in {segment.finish for segment in cut} <= {"cut", "length"}
    for full in complete:
        (segment,) = (each for each in cut if each.request == full.request)
        assert segment.ids == full.ids[: len(segment.ids)] and len(segment.ids) >= 7


def test_cycles_of_sync_and_generation_leak_no_memory_handles_or_threads(alone) -> None:
    cycles, weights = alone["soak"]["cycles"], alone["soak"]["weights"]
    (memory, handles, threads), (memory_end, handles_end, threads_end) = cycles[9], cycles[-1]
    assert len(cycles) == CYCLES and weights > 6 * 2**20
    assert memory_end - memory < 2 * weights
    assert (handles_end, threads_end) == (handles, threads)


def test_the_loop_returns_the_tokens_log_probs_and_finish_reasons_of_vllms_engine(alone) -> None:
    seen = alone["loop"]
    assert seen["asynchronous"] == (True, 2)
    assert seen["loop"] == seen["plain"] == seen["expected"]
    assert {finish for _, _, finish in seen["loop"]} == {"stop", "length"}
    assert {bool(logprobs) for _, logprobs, _ in seen["loop"]} == {True, False}


def test_aborted_requests_leave_nothing_behind(alone) -> None:
    seen = alone["loop"]
    early, *left = seen["aborted"]
    assert 0 < early < 60 and left == [0, False, 0]
    assert seen["after abort"] == seen["expected"]


def test_cut_requests_return_their_tokens_although_some_started_late(alone) -> None:
    """With asynchronous scheduling, results in progress at the cut are discarded."""
    seen = alone["loop"]
    _check_cut_requests(seen["cut"], seen["expected"])
    assert seen["after cut"] == seen["expected"]


def _check_cut_requests(found: list[Any], expected: list[Any]) -> None:
    """Check that cut requests have at least 5 tokens, and that all others ended as expected."""
    pairs = list(zip(found, expected, strict=True))
    cut = [(ids, len(full)) for (ids, _, finish), (full, *_) in pairs if not finish]
    assert cut and all(5 <= len(ids) < complete for ids, complete in cut)
    for (ids, logprobs, finish), (full, full_logprobs, full_finish) in pairs:
        assert (ids, logprobs) == (full[: len(ids)], full_logprobs[: len(ids)])
        assert finish in ("", full_finish) and (not finish or ids == full)


def test_the_loop_returns_several_tokens_of_a_step_up_to_the_stop_token_or_the_limit(alone) -> None:
    """With draft tokens, of which vLLM accepts a part, and its asynchronous scheduler."""
    expected, seen = alone["loop"]["expected"], alone["loop"]["several"]
    assert seen["asynchronous"] and seen["most per step"] == 4
    assert seen["loop"] == seen["plain"] == seen["after cut"] == expected
    _check_cut_requests(seen["cut"], expected)


def test_a_sleeping_engine_accepts_no_requests(alone) -> None:
    seen = alone["loop"]
    assert "asleep" in seen["asleep"]
