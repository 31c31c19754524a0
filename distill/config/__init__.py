"""Read recipes (YAML files) and command-line overrides into a frozen Config.

The functions that read recipes are imported at their first use, because only they need OmegaConf: losses and kernels
also run where it is not installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from distill.config.command_line import print_flag
from distill.config.loop import (
    AlarmConfig,
    ContextDistillationConfig,
    ContextMetricsConfig,
    DistillationConfig,
    OffPolicyConfig,
    PartialRolloutsConfig,
    StaticTraceConfig,
    TraceExtractorConfig,
)
from distill.config.loss import KlType, LossConfig, PositionSigmoidConfig, SelectConfig, TokenWeightsConfig
from distill.config.models import (
    BatchingConfig,
    DtensorConfig,
    GenerationConfig,
    LoraConfig,
    OptimizerConfig,
    OptimizerKwargs,
    PolicyConfig,
    SchedulerStage,
    TeacherBatchingConfig,
    TeacherConfig,
    TeacherDtensorConfig,
    TokenizerConfig,
    VllmConfig,
)
from distill.config.schema import (
    CheckpointingConfig,
    ClusterConfig,
    Config,
    DataConfig,
    DatasetConfig,
    LoggerConfig,
    RuntimeConfig,
    WandbConfig,
)

if TYPE_CHECKING:
    from distill.config.load import Arguments, load_config, parse_args, to_yaml

__all__ = [
    "AlarmConfig",
    "Arguments",
    "BatchingConfig",
    "CheckpointingConfig",
    "ClusterConfig",
    "Config",
    "ContextDistillationConfig",
    "ContextMetricsConfig",
    "DataConfig",
    "DatasetConfig",
    "DistillationConfig",
    "DtensorConfig",
    "GenerationConfig",
    "KlType",
    "LoggerConfig",
    "LoraConfig",
    "LossConfig",
    "OffPolicyConfig",
    "PartialRolloutsConfig",
    "OptimizerConfig",
    "OptimizerKwargs",
    "PolicyConfig",
    "PositionSigmoidConfig",
    "RuntimeConfig",
    "SchedulerStage",
    "SelectConfig",
    "StaticTraceConfig",
    "TeacherBatchingConfig",
    "TeacherConfig",
    "TeacherDtensorConfig",
    "TokenWeightsConfig",
    "TokenizerConfig",
    "TraceExtractorConfig",
    "VllmConfig",
    "WandbConfig",
    "load_config",
    "parse_args",
    "print_flag",
    "to_yaml",
]


def __getattr__(name: str) -> Any:
    """Return a function or class of ``load.py``."""
    if name not in ("Arguments", "load_config", "parse_args", "to_yaml"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from distill.config import load

    return getattr(load, name)
