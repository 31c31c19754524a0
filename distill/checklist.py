"""The checklist that ``--dry-run`` prints: eight points to check before a run is scaled up."""

from __future__ import annotations

from dataclasses import dataclass

from distill.config import Config
from distill.errors import UserError

_PASSED, _FAILED, _OPEN = "passed", "FAILED", "open"
_KEYS: dict[int, tuple[str, ...]] = {
    2: ("cluster.num_nodes",),
    3: ("cluster.gpus_per_node", "runtime.device"),
    4: (
        *("cluster.gpu_memory_gb", "policy.generation.vllm_cfg.gpu_memory_utilization"),
        *("policy.max_total_sequence_length", "teacher.max_total_sequence_length"),
    ),
    5: ("policy.dtensor_cfg.", "teacher.dtensor_cfg.", "policy.generation.vllm_cfg.tensor_parallel_size"),
    8: ("distillation.topk_logits_k",),
}
"""Maps a point's number to configuration keys or prefixes of keys; an error of such a key fails the point.

The points 6 and 7 have no keys: their errors are found when the recipe is read, before the checklist is printed.
"""


@dataclass
class Checklist:
    """Results of checks, which determine each point's state: passed, FAILED or open (not checked)."""

    config: Config
    nodes: str | None = None
    """What cluster.num_nodes was compared with, such as "the Slurm job"; None if it was not compared."""
    gpus: str | None = None
    """What cluster.gpus_per_node was compared with, such as "the Slurm job"; None if it was not compared."""
    too_few_gpus: bool = False
    """Whether this machine has fewer GPUs than cluster.gpus_per_node, so ranks would share a GPU."""
    layout_checked: bool = False
    """Whether the tensor- and context-parallel sizes were checked against the shapes of the models."""
    memory: str | None = None
    """Text that compares the memory forecast with the memory of a GPU; None if they were not compared."""
    exceeds_memory: bool = False
    """Whether the forecast exceeds the memory of the GPU."""

    def table(self, error: UserError | None = None) -> str:
        """Return the checklist as text, one line per point.

        ``error``: the error that ended the checks. The point to which its configuration key belongs is FAILED.
        """
        config, lines = self.config, ["checklist before a run is scaled up"]
        cluster, generation = config.cluster, config.policy.generation
        parallel, loop = config.policy.dtensor_cfg, config.distillation
        context = loop.context_distillation
        vllm = generation.backend == "vllm"
        names = "teacher and student are the same model" if context.enabled else "not a context distillation run"
        points = (
            (None, "smoke tests pass", "run make smoke"),
            (self.nodes, f"cluster.num_nodes={cluster.num_nodes}", f"submit with sbatch -N{cluster.num_nodes}"),
            (self.gpus, f"cluster.gpus_per_node={cluster.gpus_per_node}", "compare it with the GPUs of a node"),
            (
                self.memory,
                f"max_total_sequence_length={config.policy.max_total_sequence_length} (policy),"
                f" {config.teacher.max_total_sequence_length} (teacher) fit the memory",
                "compare it with the forecast, or set cluster.gpu_memory_gb",
            ),
            (
                "they fit the ranks and the models" if self.layout_checked else None,
                f"tensor_parallel_size={parallel.tensor_parallel_size},"
                f" context_parallel_size={parallel.context_parallel_size}",
                "the models were not checked",
            ),
            (
                f"at least policy.max_total_sequence_length={config.policy.max_total_sequence_length}"
                if vllm
                else "not used by the transformers backend",
                f"vllm_cfg.max_model_len={generation.vllm_cfg.max_model_len}",
                "",
            ),
            (
                names if not context.enabled or config.policy.model_name == config.teacher.model_name else None,
                "models of context distillation",
                f"context_distillation.mode={context.mode} with another teacher",
            ),
            (None, f"distillation.topk_logits_k={loop.topk_logits_k}", "check that it is the intended value"),
        )
        for number, (passed, text, fix) in enumerate(points, start=1):
            is_cause = error is not None and error.key.startswith(_KEYS.get(number, ("\0",)))
            failed = is_cause or (number == 3 and self.too_few_gpus) or (number == 4 and self.exceeds_memory)
            state = _FAILED if failed else _OPEN if passed is None else _PASSED
            note = error.problem if is_cause and error else fix if passed is None else passed
            lines.append(f"  {number}. {state:6}  {text}{f' ({note})' if note else ''}")
        return "\n".join(lines)
