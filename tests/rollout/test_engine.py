"""Engine: order of calls, completeness of a sync, and agreement of its responses with the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from distill.model.checksum import bit_sums_by_name
from distill.model.hf_config import model_config
from distill.model.hf_files import find_model
from distill.rollout.engine import SyncError
from distill.rollout.requests import Segment, longest_first, requests_of, response_seed, rollout_of
from distill.rollout.transformers_engine import (
    TransformersEngine,
    batches_of,
    draw,
    processed_logprobs,
)
from distill.types import Problem, Prompt, Rollout, Sampling
from tests.harness import CompleteWeights
from tests.helpers import save_tiny_model
from tests.rollout.segment_scenarios import (
    GREEDY,
    SAMPLED,
    FixedCutoff,
    check_continued,
    check_cut,
    check_greedy_continuation,
    check_logprobs,
    check_reports,
    segment_scenarios,
)

VALID = 300  # ids from this one on are padding of the vocabulary
WINDOW = 100


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "m", "qwen3", True, seed=1)


def _engine(folder: Path, batch_size: int = 64) -> TransformersEngine:
    config = model_config(find_model(str(folder), "policy.model_name"), "policy.model_name")
    return TransformersEngine(config, torch.float32, torch.device("cpu"), batch_size, WINDOW, VALID)


def _tensors(folder: Path) -> list[tuple[str, torch.Tensor]]:
    files = find_model(str(folder), "policy.model_name")
    return [(name, files.tensor(name)) for name in files.files]


def _weights(folder: Path) -> CompleteWeights:
    return CompleteWeights(_tensors(folder))


@pytest.fixture
def ready(folder: Path) -> TransformersEngine:
    return _ready(folder)


def _ready(folder: Path, batch_size: int = 64) -> TransformersEngine:
    engine = _engine(folder, batch_size)
    engine.wake("weights")
    engine.sync(_weights(folder), version=7)
    engine.wake("kv")
    return engine


def _prompts(*lengths: int) -> list[Prompt]:
    return [Prompt(i, tuple(range(10 * i, 10 * i + n)), Problem("p")) for i, n in enumerate(lengths)]


def _sampling(**settings: object) -> Sampling:
    return Sampling(**{"temperature": 1.0, "max_new_tokens": 12, "stop_token_ids": (5,), "seed": 3, **settings})  # type: ignore[arg-type]


def _ids(rollouts: list[Rollout]) -> list[tuple[int, int, tuple[int, ...]]]:
    return [(r.prompt.prompt_id, r.response_index, r.response_ids) for r in rollouts]


CALLS: dict[str, Callable[[TransformersEngine], object]] = {
    "weights": lambda engine: engine.wake("weights"),
    "sync": lambda engine: engine.sync(CompleteWeights([]), 0),
    "probe": lambda engine: engine.probe((1, 2, 3)),
    "kv": lambda engine: engine.wake("kv"),
    "generate": lambda engine: engine.generate(_prompts(3), _sampling(), 0),
    "sleep": lambda engine: engine.sleep(),
}
ORDER = ["weights", "sync", "kv", "generate", "sleep"]


@pytest.mark.parametrize("done", range(5))
def test_a_call_in_the_wrong_state_raises(folder, done) -> None:
    ready = {"generate", "sleep", "probe"}
    allowed = {0: {"weights"}, 1: {"sync"}, 2: {"kv"}, 3: ready, 4: ready}[done]
    for call in CALLS.keys() - allowed:
        engine = _engine(folder)
        for earlier in ORDER[:done]:
            engine.sync(_weights(folder), 0) if earlier == "sync" else CALLS[earlier](engine)
        state = engine.state
        with pytest.raises(RuntimeError, match=state):
            CALLS[call](engine)
        assert engine.state == state


LAST = "model.norm.weight"


@pytest.mark.parametrize(
    ("change", "tensor", "values"),
    [
        (lambda weights: [pair for pair in weights if pair[0] != LAST], LAST, "1 tensors"),
        (lambda weights: [*weights, weights[0]], "model.embed_tokens.weight", "twice"),
        (lambda weights: [*weights, ("lm_head.bias", weights[0][1])], "lm_head.bias", "engine"),
        (lambda weights: [(weights[0][0], weights[0][1][:-1])], "model.embed_tokens.weight", "(383, 64)"),
    ],
    ids=["missing", "duplicate", "unknown", "shape"],
)
def test_an_incomplete_sync_raises(folder, change, tensor, values) -> None:
    engine = _engine(folder)
    engine.wake("weights")
    tensors = sorted(_tensors(folder), key=lambda pair: pair[0] != "model.embed_tokens.weight")
    with pytest.raises(SyncError) as raised:
        engine.sync(CompleteWeights(change(tensors)), 0)
    assert raised.value.tensor == tensor
    assert values in str(raised.value)


def _swapped(tensors: dict[str, torch.Tensor]) -> None:
    first, second = (f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2))
    tensors[first], tensors[second] = tensors[second], tensors[first]


def _stale(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.mlp.down_proj.weight"
    tensors[name] = torch.nextafter(tensors[name], torch.tensor(torch.inf))  # changes every element


def _with_rows_exchanged(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"].flip(0)


@pytest.mark.parametrize("spoil", [_swapped, _stale, _with_rows_exchanged])
def test_a_tensor_that_changed_during_the_sync_is_refused(folder, spoil) -> None:
    engine = _engine(folder)
    engine.wake("weights")
    tensors = dict(_tensors(folder))
    sent = bit_sums_by_name(tensors.items())
    spoil(tensors)
    arriving = CompleteWeights(tensors.items())
    arriving.sums = sent
    with pytest.raises(SyncError) as raised:
        engine.sync(arriving, 0)
    assert raised.value.found_in == "transfer"
    assert not torch.equal(tensors[raised.value.tensor], dict(_tensors(folder))[raised.value.tensor])


def test_a_weight_that_the_engine_does_not_load_is_found(folder, monkeypatch) -> None:
    engine = _engine(folder)
    engine.wake("weights")
    receive = engine._receive

    def receive_all_but_one(weights):
        receive((name, tensor) for name, tensor in weights if name != LAST)

    monkeypatch.setattr(engine, "_receive", receive_all_but_one)
    with pytest.raises(SyncError) as raised:
        engine.sync(_weights(folder), 0)
    assert (raised.value.tensor, raised.value.found_in) == (LAST, "memory")


def test_a_sync_reports_its_tensors_bytes_and_changes(folder) -> None:
    engine = _engine(folder)
    tensors = _tensors(folder)
    parameters = sum(tensor.numel() for _, tensor in tensors)
    for version, changed in ((4, len(tensors)), (5, 0), (6, 1)):
        if version == 6:
            tensors[0] = (tensors[0][0], -tensors[0][1])
        engine.wake("weights")
        report = engine.sync(CompleteWeights(tensors), version)
        assert (report.version, report.tensors, report.bytes) == (version, len(tensors), 4 * parameters)
        assert report.changed == changed
        engine.wake("kv")
        engine.sleep()


def test_the_probe_equals_the_log_probs_of_the_model(folder, ready) -> None:
    ids = list(range(40, 60))
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        logprobs = plain(input_ids=torch.tensor([ids])).logits[0, :-1, :VALID].log_softmax(-1)
    expected = logprobs.gather(1, torch.tensor(ids)[1:, None])[:, 0]
    assert (expected - torch.tensor(ready.probe(ids))).abs().max() < 2e-5


@pytest.mark.parametrize("ids", [tuple(range(WINDOW)), (), (1, VALID), (-1,)])
def test_a_prompt_outside_window_or_vocabulary_is_refused(ready, ids) -> None:
    limit = VALID - 1 if 0 < len(ids) < WINDOW else WINDOW
    with pytest.raises(RuntimeError, match=rf"prompt 8 .*\b{limit}\b"):
        ready.generate([Prompt(8, ids, Problem("p"))], _sampling(), 0)


def test_log_probs_that_are_not_finite_are_refused(ready) -> None:
    ready._model.model.norm.weight.data.fill_(torch.nan)
    with pytest.raises(RuntimeError, match="not finite"):
        ready.probe(range(10))
    with pytest.raises(RuntimeError, match=r"response 0 .*not finite"):
        ready.generate(_prompts(3), _sampling(temperature=0.0), 0)


def test_sleep_frees_memory_and_discards_the_weights(ready) -> None:
    ready.sleep()
    assert all(parameter.is_meta for parameter in ready._model.parameters())
    ready.wake("weights")
    with pytest.raises(RuntimeError, match="synced"):
        ready.wake("kv")


@pytest.mark.parametrize("batch_size", [64, 4, 1])
def test_response_log_probs_equal_those_of_the_model_for_mixed_prompt_lengths(folder, batch_size) -> None:
    engine, plain = _ready(folder, batch_size), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stops = tuple(range(0, VALID, 8))  # responses finish at different steps, and their rows are dropped
    sampling = _sampling(responses_per_prompt=3, temperature=0.7, stop_token_ids=stops)
    rollouts = engine.generate(_prompts(7, 1, 30), sampling, step=0)
    assert [(r.prompt.prompt_id, r.response_index) for r in rollouts] == [(p, a) for p in range(3) for a in range(3)]
    for rollout in rollouts:
        prompt = rollout.prompt.student_ids
        with torch.no_grad():
            logits = plain(input_ids=torch.tensor([prompt + rollout.response_ids])).logits[0, len(prompt) - 1 : -1]
        expected = (
            (logits[:, :VALID] / 0.7).log_softmax(-1).gather(1, torch.tensor(rollout.response_ids)[:, None])[:, 0]
        )
        assert (expected - torch.tensor(rollout.logprobs)).abs().max() < 2e-5


def test_a_response_depends_on_its_seed_and_not_on_the_batch(folder) -> None:
    prompts = _prompts(7, 3, 20)
    together = _ids(_ready(folder).generate(prompts, _sampling(responses_per_prompt=2), step=4))
    alone = [_ids(_ready(folder, 1).generate([p], _sampling(responses_per_prompt=2), step=4)) for p in prompts]
    assert together == [response for responses in alone for response in responses]
    assert len({response for _, _, response in together}) == len(together), "responses with equal seeds"
    assert _ids(_ready(folder).generate(prompts, _sampling(responses_per_prompt=2, seed=4), step=4)) != together
    assert _ids(_ready(folder).generate(prompts, _sampling(responses_per_prompt=2), step=5)) != together


@pytest.mark.parametrize("batch_size", [64, 2])
def test_omitted_responses_are_not_generated_and_the_others_do_not_change(folder, batch_size, monkeypatch) -> None:
    prompts, engine = _prompts(7, 3, 20), _ready(folder, batch_size)
    complete = engine.generate(prompts, _sampling(responses_per_prompt=3), step=4)
    omitted = ((0, 1), (1, 0), (1, 1), (1, 2), (2, 2))
    rows: list[int] = []
    forward = engine._forward

    def counted(tokens: torch.Tensor, *rest: object) -> torch.Tensor:
        rows.append(len(tokens))
        return forward(tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(engine, "_forward", counted)
    kept = engine.generate(prompts, _sampling(responses_per_prompt=3, omitted=omitted), step=4)
    assert _ids(kept) == [r for r in _ids(complete) if r[:2] not in omitted]
    assert rows[0] == (2 if batch_size == 64 else 1) and max(rows) == (4 if batch_size == 64 else 2)
    everything = tuple((prompt, index) for prompt in range(3) for index in range(3))
    assert engine.generate(prompts, _sampling(responses_per_prompt=3, omitted=everything), step=4) == []


@pytest.mark.parametrize("batch_size", [64, 1])
def test_cancelled_generation_returns_no_rollouts_and_leaves_the_engine_ready(folder, batch_size) -> None:
    engine, calls = _ready(folder, batch_size), []

    def cancelled() -> bool:
        calls.append(engine.state)
        return len(calls) == 3

    complete = _ids(engine.generate(_prompts(5, 6), _sampling(), step=0))
    assert engine.generate(_prompts(5, 6), _sampling(), step=0, cancelled=cancelled) == []
    assert len(calls) == 3
    assert _ids(engine.generate(_prompts(5, 6), _sampling(), step=0, cancelled=lambda: False)) == complete
    engine.sleep()


def test_generation_neither_reads_nor_changes_the_global_random_state(ready) -> None:
    torch.manual_seed(1)
    first = _ids(ready.generate(_prompts(5), _sampling(), step=0))
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.rand(1) == after
    torch.manual_seed(2)
    assert _ids(ready.generate(_prompts(5), _sampling(), step=0)) == first


def test_the_longest_prompt_comes_first() -> None:
    assert longest_first(requests_of(_prompts(3, 9, 20, 9), _sampling(), 0, WINDOW)) == [2, 1, 3, 0]


def test_seeds_of_neighbouring_responses_differ() -> None:
    seeds = {response_seed(s, step, p, a) for s in range(3) for step in range(5) for p in range(5) for a in range(5)}
    assert len(seeds) == 375 and all(0 <= seed < 2**63 for seed in seeds)
    assert response_seed(1, 23, 4, 5) != response_seed(12, 3, 4, 5)


def test_a_response_ends_with_a_stop_token_or_at_the_limit(ready) -> None:
    stops = tuple(range(0, VALID, 6))
    rollouts = ready.generate(_prompts(4, 9), _sampling(responses_per_prompt=8, stop_token_ids=stops), step=0)
    assert {r.finish for r in rollouts} == {"stop", "length"}
    for r in rollouts:
        assert not set(r.response_ids[:-1]) & set(stops)
        assert (r.response_ids[-1] in stops) == (r.finish == "stop")
        assert r.finish == "stop" or len(r.response_ids) == 12
        assert max(r.response_ids) < VALID and r.version == 7


def test_prompt_and_response_fit_into_max_total_length(ready) -> None:
    rollouts = ready.generate(_prompts(4, 9), _sampling(stop_token_ids=(), max_total_length=14), step=0)
    assert [len(r.response_ids) for r in rollouts] == [10, 5]


def test_sampling_follows_the_distribution() -> None:
    logprobs = torch.tensor([[0.5, 0.0, 0.3, 0.2]]).log().expand(20_000, 4)
    uniforms = torch.rand(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    fractions = torch.bincount(draw(logprobs, uniforms), minlength=4) / 20_000
    assert fractions[1] == 0
    assert (fractions - torch.tensor([0.5, 0.0, 0.3, 0.2])).abs().max() < 0.015
    edges = draw(logprobs[:3], torch.tensor([0.0, 0.50001, 1 - 1e-16], dtype=torch.float64))
    assert edges.tolist() == [0, 2, 3]


def test_processed_log_probs_are_those_of_the_sampled_distribution() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0, 9.0]])
    sampling = _sampling(temperature=0.5)
    assert processed_logprobs(logits, sampling, 4).exp()[0].tolist() == pytest.approx(
        [*torch.tensor([4.0, 2.0, 0.0, -2.0]).softmax(0).tolist(), 0.0]
    )
    top2 = processed_logprobs(logits, _sampling(top_k=2), 4).exp()[0]
    assert top2.tolist() == pytest.approx([*torch.tensor([2.0, 1.0]).softmax(0).tolist(), 0.0, 0.0, 0.0])
    nucleus = processed_logprobs(logits, _sampling(top_p=0.7), 4).exp()[0]  # the two largest have 0.64 and 0.24
    assert nucleus.tolist() == pytest.approx(top2.tolist())


def test_a_response_whose_stop_tokens_contradict_its_finish_is_refused(ready, monkeypatch) -> None:
    def generate(response: tuple[int, ...], finish: str) -> None:
        (request,) = requests_of(_prompts(3), _sampling(), 0, WINDOW)
        made = [Segment(request, response, (-1.0,) * len(response), finish)]  # type: ignore[arg-type]
        monkeypatch.setattr(ready, "_segments", lambda *args: made)
        ready.generate(_prompts(3), _sampling(), 0)

    generate((1, 2, 5), "stop")
    generate((1, 2), "length")
    for response, finish in (((1, 2, 3), "stop"), ((1, 5, 2), "length"), ((5, 2, 5), "stop"), ((1, 5), "length")):
        with pytest.raises(RuntimeError, match=rf"{len(response)} tokens.*{finish}"):
            generate(response, finish)


def test_a_cut_segment_contains_no_stop_token_and_may_be_empty(ready, monkeypatch) -> None:
    (request,) = requests_of(_prompts(3), _sampling(), 0, WINDOW)

    def run(ids: tuple[int, ...], finish: str) -> list[Segment]:
        made = [Segment(request, ids, (-1.0,) * len(ids), finish)]  # type: ignore[arg-type]
        monkeypatch.setattr(ready, "_segments", lambda *args: made)
        found: list[Segment] = ready.segments([request], _sampling())
        assert found == made
        return found

    run((), "cut")
    run((1, 2), "cut")
    for ids, finish in (((1, 5), "cut"), ((5, 1), "cut"), ((), "length"), ((), "stop")):
        with pytest.raises(RuntimeError, match=finish):
            run(ids, finish)


def test_a_cutoff_only_truncates_segments(folder) -> None:
    seen = segment_scenarios(_ready(folder), SAMPLED, needed=6)
    check_cut(seen)
    check_reports(seen)
    check_continued(seen)
    check_logprobs(folder, seen["continued"], SAMPLED)
    lengths = [len(segment.ids) for segment in seen["called"]]
    assert lengths == sorted(lengths), "reported in the order in which they end"
    assert 1 < seen["cutoff"].reads < max(map(len, (s.ids for s in seen["cut"]))), "not read at every token"


def test_a_continued_greedy_segment_equals_the_uninterrupted_response(folder) -> None:
    check_greedy_continuation(segment_scenarios(_ready(folder), GREEDY, needed=2))


def test_every_batch_runs_until_the_bound(folder) -> None:
    requests = requests_of(_prompts(3, 9, 20), _sampling(stop_token_ids=()), 0, WINDOW)
    for batch_size in (64, 2):
        segments = _ready(folder, batch_size).segments(requests, _sampling(stop_token_ids=()), FixedCutoff(3))
        assert [(len(segment.ids), segment.finish) for segment in segments] == [(3, "cut")] * 3


def test_generate_returns_the_complete_segments(ready) -> None:
    sampling = _sampling(responses_per_prompt=2, logprob_interval=2)
    segments = ready.segments(requests_of(_prompts(7, 3, 20), sampling, 4, WINDOW), sampling)
    rollouts = ready.generate(_prompts(7, 3, 20), sampling, 4)
    assert rollouts == [rollout_of(segment, 7) for segment in segments]
    assert {bool(rollout.logprobs) for rollout in rollouts} == {True, False}


def test_an_error_in_a_callback_ends_the_generation_and_cancelling_returns_nothing(ready) -> None:
    requests = requests_of(_prompts(7, 3), _sampling(), 4, WINDOW)

    def failing(segment: Segment) -> None:
        raise LookupError(segment.request.prompt.prompt_id)

    with pytest.raises(LookupError):
        ready.segments(requests, _sampling(), on_ended=failing)
    assert ready.segments(requests, _sampling(), FixedCutoff(3), cancelled=lambda: True) == []
    assert [len(segment.ids) for segment in ready.segments(requests, _sampling(), FixedCutoff(3))] == [3, 3]


def test_an_invalid_segment_is_refused_before_it_is_reported(ready) -> None:
    requests = requests_of(_prompts(3), _sampling(), 0, WINDOW)
    ready._model.model.norm.weight.data.fill_(torch.nan)
    called: list[Segment] = []
    with pytest.raises(RuntimeError, match="not finite"):
        ready.segments(requests, _sampling(temperature=0.0), on_ended=called.append)
    assert not called


def test_a_continued_input_outside_window_or_vocabulary_is_refused(ready) -> None:
    (request,) = requests_of(_prompts(3), _sampling(), 0, WINDOW)
    for ids, limit in (((1,) * (WINDOW - 3), WINDOW), ((VALID,), VALID - 1)):
        with pytest.raises(RuntimeError, match=rf"prompt 0 .*\b{limit}\b"):
            ready.segments([replace(request, generated_ids=ids)], _sampling())


@pytest.mark.parametrize(
    ("batch_size", "batches"),
    [
        (8, [[[2, 3], [4], [5], [0, 1], [6, 7]]]),
        (4, [[[2, 3], [4], [5]], [[0, 1], [6, 7]]]),
        (3, [[[2, 3], [4]], [[5], [0, 1]], [[6, 7]]]),
        (1, [[[2, 3]], [[4]], [[5]], [[0, 1]], [[6, 7]]]),
    ],
)
def test_requests_with_the_same_input_share_a_prefill(batch_size, batches) -> None:
    two = requests_of(_prompts(5, 9), _sampling(responses_per_prompt=2), 0, WINDOW)
    continued = [replace(two[i], generated_ids=(1, 2, 3, i)) for i in (0, 1)]
    other = requests_of(_prompts(5, 5, 5)[2:], _sampling(responses_per_prompt=2), 0, WINDOW)
    assert batches_of([*two, *continued, *other], batch_size) == batches


def test_omitted_responses_do_not_change_the_batches_of_prompts() -> None:
    sampling = _sampling(responses_per_prompt=3, omitted=((0, 1), (1, 0), (1, 2)))
    requests = requests_of(_prompts(9, 7, 5), sampling, 0, WINDOW)
    assert batches_of(requests, 7, per_prompt=3) == [[[0, 1], [2]], [[3, 4, 5]]], "two prompts of three responses fit"
    assert batches_of(requests, 7) == [[[0, 1], [2], [3, 4, 5]]]
