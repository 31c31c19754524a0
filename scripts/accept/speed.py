"""Timings: the loss kernels against the roofline, and generation against vLLM without the trainer."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from scripts.accept.results import Bound, Check, NotApplicable, at_least
from scripts.accept.settings import Context


def loss(context: Context) -> Iterator[Check]:
    """Run scripts/bench_loss; its checks with a bound are checked here too."""
    from scripts.bench_loss.__main__ import main

    path = Path(context.settings.scratch) / "bench_loss.json"
    quick = ["--quick"] if context.settings.quick else []
    main(["--device", context.settings.device, "--repeats", "5", "--json", str(path), *quick])
    found = json.loads(path.read_text())
    for result in found["results"]:
        name = f"{result['contender']}, {result['case']}"
        if result["seconds"] is not None:
            yield Check(name, result["seconds"] * 1e3, "ms", note=result["wrong"] or result["note"])
        if result["contender"] == "fused":
            wrong = float(bool(result["wrong"]))
            yield Check(f"{name}: wrong results", wrong, "", Bound("==", 0), result["wrong"])
            if result["share"] is not None:
                yield Check(f"{name}: share of the roofline", result["share"])
    for check in found["checks"]:
        bound = Bound(check["relation"], check["limit"]) if check["relation"] else None
        yield Check(check["name"], check["value"], "", bound, check["note"])


def alone(context: Context) -> Iterator[Check]:
    """Measure vLLM's offline throughput, with plain requests and with requests like the trainer's.

    In this process vLLM may use its own process for the engine core, as its benchmark does.
    """
    from vllm import LLM, SamplingParams

    from scripts.accept.engine_stage import ALONE_ON_CPU, MEMORY, WINDOW, random_prompts, work_of

    settings, work = context.settings, work_of(context.settings)
    llm = LLM(
        model=str(settings.student),
        dtype="bfloat16",
        max_model_len=WINDOW,
        gpu_memory_utilization=MEMORY,
        **({} if settings.on_gpu else ALONE_ON_CPU),
    )
    vocab = int(llm.llm_engine.vllm_config.model_config.get_vocab_size())
    plain: dict[str, Any] = dict(temperature=1.0, max_tokens=work.new_tokens, ignore_eos=True, detokenize=False)

    def rate(seed: int, like_ours: bool) -> float:
        ids = random_prompts(work.prompts, work.prompt_tokens, vocab, seed)
        prompts: Any = [{"prompt_token_ids": one} for one in ids]
        more = [dict(seed=i, logprobs=0, flat_logprobs=True) if like_ours else {} for i in range(work.prompts)]
        params = [SamplingParams(**plain, **one) for one in more]
        started = time.perf_counter()
        outputs = llm.generate(prompts, params, use_tqdm=False)
        seconds = time.perf_counter() - started
        return sum(len(output.outputs[0].token_ids) for output in outputs) / seconds

    rates = {}
    for like_ours, name in ((False, "plain"), (True, "like_ours")):
        rate(int(like_ours), like_ours)
        rates[name] = [rate(10 + 10 * like_ours + i, like_ours) for i in range(work.passes)]
    _alone_file(context).write_text(json.dumps(rates), encoding="utf-8")
    note = f"{work.prompts} x ({work.prompt_tokens} + {work.new_tokens}), {runner_of(llm)}"
    yield Check("plain requests", statistics.median(rates["plain"]), "tokens/s", note=note)
    yield Check("requests with seeds and log-probs", statistics.median(rates["like_ours"]), "tokens/s")


def _alone_file(context: Context) -> Path:
    return Path(context.settings.scratch) / "alone.json"


def runner_of(llm: Any) -> str:
    """Return the version of vLLM's model runner; V1 samples seeded requests one by one, which is slower."""
    second: bool | None = getattr(llm.llm_engine.vllm_config, "use_v2_model_runner", None)
    return "unknown model runner" if second is None else f"model runner V{2 if second else 1}"


def ours(context: Context) -> Iterator[Check]:
    """Measure the trainer's engine, and compare it with vLLM alone at equal requests and lengths."""
    if not _alone_file(context).exists():
        raise NotApplicable("the part vLLM alone has no result")
    from scripts.accept.engine_stage import Stage

    stage = Stage.of(context)
    stage.ready()
    work = stage.work
    rates = []
    for seed in range(30, 31 + work.passes):
        prompts, sampling = stage.prompts(work.prompts, work.prompt_tokens, seed), stage.sampling(work.new_tokens)
        started = time.perf_counter()
        rollouts = stage.engine.generate(prompts, sampling, seed)
        seconds = time.perf_counter() - started
        tokens = sum(len(rollout.response_ids) for rollout in rollouts)
        assert tokens == work.prompts * work.new_tokens, (tokens, work)
        rates.append(tokens / seconds)
    peer = json.loads(_alone_file(context).read_text(encoding="utf-8"))
    yield from compare(rates, peer, bounded=stage.on_gpu and not context.settings.quick)


def compare(rates: Sequence[float], peer: dict[str, list[float]], bounded: bool) -> Iterator[Check]:
    """Yield the median of our ``rates`` without the first pass, a warm-up, and its ratios to vLLM alone."""
    median = statistics.median(rates[1:])
    plain, like_ours = statistics.median(peer["plain"]), statistics.median(peer["like_ours"])
    yield Check("ours", median, "tokens/s")
    bound = at_least(0.9) if bounded else None
    note = "" if bounded else "no bound at tiny sizes"
    yield Check("ours / vLLM alone, equal requests", median / like_ours, "", bound, note)
    yield Check("ours / vLLM alone, plain requests", median / plain, note="vLLM computes no log-probs there")
